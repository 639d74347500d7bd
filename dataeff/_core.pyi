# Types of the compiled core, one section per folder of csrc/.

from collections.abc import Callable
from typing import Any

from torch import Tensor

cuda_built: bool

# gather/: pointers are addresses; `table` is (address, num_rows, row_nbytes, row_stride)

def gather_cpu(
    table: int,
    num_rows: int,
    row_nbytes: int,
    row_stride: int,
    index: int,
    index_size: int,
    index_itemsize: int,
    out: int,
    num_threads: int,
) -> None: ...
def use_tensors(
    exchange_api: object,
    kinds: tuple[type, ...],
    guards: tuple[Callable[[], object], ...],
    get_num_threads: Callable[[], int],
) -> None: ...
def gather_tensors(
    table: Tensor, index: Tensor, out: Tensor | None, tally: int, /
) -> Tensor | None: ...
def gather_stored_tensors(
    table: Tensor,
    scales: Tensor | None,
    index: Tensor,
    out: Tensor | None,
    like: Tensor,
    format: int,
    element: int,
    tally: int,
    /,
) -> Tensor | None: ...
def sum_rows_tensors(
    index: Tensor,
    rows: Tensor,
    num_rows: int,
    padding: int,
    new: Callable[[int], tuple[Tensor, Tensor]],
    /,
) -> tuple[Tensor, Tensor] | None: ...
def strictly_ascending(ids: int, size: int) -> bool: ...
def scatter_cpu(
    table: int,
    num_rows: int,
    row_nbytes: int,
    row_stride: int,
    index: int,
    index_size: int,
    index_itemsize: int,
    rows: int,
    num_threads: int,
) -> None: ...
def gather_cuda(
    table: int,
    num_rows: int,
    row_nbytes: int,
    row_stride: int,
    index: int,
    index_size: int,
    index_itemsize: int,
    out: int,
    bad_count: int,
    bad_seen: int,
    device: int,
    stream: int,
    num_blocks: int = 0,
    places: int = 0,
    hot: int = 0,
    hot_rows: int = 0,
    hot_stride: int = 0,
    hot_slots: int = 0,
    hot_hits: int = 0,
    format: int = -1,
    element: int = 0,
    scales: int = 0,
) -> None: ...
def gather_decoded_cpu(
    table: int,
    num_rows: int,
    row_nbytes: int,
    row_stride: int,
    index: int,
    index_size: int,
    index_itemsize: int,
    out: int,
    num_threads: int,
    format: int,
    element: int,
    scales: int,
) -> None: ...
def encode_rows(
    source: int,
    num_rows: int,
    row_nbytes: int,
    row_stride: int,
    element: int,
    format: int,
    codes: int,
    scales: int,
    num_threads: int,
) -> None: ...
def count_requests(
    table: int,
    num_rows: int,
    row_nbytes: int,
    row_stride: int,
    index: int,
    index_size: int,
    index_itemsize: int,
) -> tuple[int, int]: ...

# memory/

class HostRegistration:
    def __init__(self, data: int, nbytes: int) -> None: ...
    def close(self) -> None: ...

def is_registered(data: int, nbytes: int) -> bool: ...

class HostBuffer:
    def __init__(
        self, nbytes: int, shared: bool = False, *, fd: int | None = None, inherited: bool = True
    ) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def data_ptr(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def capacity_nbytes(self) -> int: ...
    @property
    def fd(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    def close(self) -> None: ...

def copy_bytes(parts: int, num_parts: int, num_threads: int) -> None: ...
def same_bytes(parts: int, num_parts: int, num_threads: int) -> bool: ...
def alias_capsule(
    data: int, nbytes: int, device_type: int, device_id: int, owner: object
) -> object: ...

class ExtentMap:
    def __init__(self, capacity: int, alignment: int) -> None: ...
    def allocate(self, nbytes: int) -> int | None: ...
    def free(self, offset: int) -> None: ...
    def grow(self, capacity: int) -> None: ...
    def rounded(self, nbytes: int) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def peak(self) -> int: ...
    @property
    def num_used(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def largest_free(self) -> int: ...
    @property
    def tail_free(self) -> int: ...

class SlabPart:
    """Memory that is its holder's until `release`, or until it goes."""

    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def data_ptr(self) -> int: ...
    def release(self) -> None: ...

class IdleBlocks:
    """Blocks that nothing uses, oldest first; no line of Python runs when a loan of one ends."""

    def __init__(self, kept_nbytes: int) -> None: ...
    def give(self, block: object, nbytes: int) -> None: ...
    def take(self, least: int, most: int) -> Any: ...
    def shrink(self, nbytes: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def lent_nbytes(self) -> int: ...

class Loan:
    """Gives the block to `idle` when it goes."""

    def __init__(self, idle: IdleBlocks, block: object, nbytes: int) -> None: ...

class Slab:
    """One buffer, lent in parts of whole pages; best fit. Thread-safe."""

    def __init__(self, buffer: HostBuffer) -> None: ...
    def take(self, nbytes: int) -> SlabPart | None: ...
    def lend(self, nbytes: int) -> object | None:
        """The same as a DLPack capsule of bytes: whoever takes it holds the part."""
    @property
    def used(self) -> int: ...
    @property
    def peak(self) -> int: ...
    @property
    def largest_free(self) -> int: ...
    @property
    def capacity(self) -> int: ...

# storage/

class Transfer:
    """One read or write: the future that `Engine.read` and `Engine.write` return."""

    nbytes: int
    offset: int
    @property
    def op(self) -> str: ...
    @property
    def start_ns(self) -> int: ...
    @property
    def end_ns(self) -> int: ...
    def wait(self, timeout_s: float | None = None) -> None: ...
    def done(self) -> bool: ...
    def cancel(self) -> bool: ...
    def cancelled(self) -> bool: ...
    def failed(self) -> bool: ...

class FaultPlan:
    """What a failing, slow or crowded disk would answer: rules over the attempts of an engine."""

    def __init__(self) -> None: ...
    def add(
        self,
        op: str,
        *,
        error: int = 0,
        max_nbytes: int | None = None,
        delay_s: float = 0.0,
        corrupt: bool = False,
        nth: int = 1,
        every: int = 1,
        times: int | None = None,
    ) -> FaultPlan: ...
    @property
    def num_reads(self) -> int: ...
    @property
    def num_writes(self) -> int: ...
    @property
    def num_injected(self) -> int: ...

class Engine:
    """Moves bytes between memory and files while the caller goes on; see `open_engine`."""

    @property
    def name(self) -> str: ...
    @property
    def closed(self) -> bool: ...
    def write(self, fd: int, data_ptr: int, nbytes: int, offset: int) -> Transfer: ...
    def read(self, fd: int, data_ptr: int, nbytes: int, offset: int) -> Transfer: ...
    def close(self, cancel: bool = False) -> None: ...
    def __enter__(self) -> Engine: ...
    def __exit__(self, *exception: object) -> None: ...

class SpillSpace:
    """The space of a spill file; see `dataeff.storage.SpillFile`. Owns the descriptor."""

    @staticmethod
    def open(
        directory: str, flags: int, named: bool, limit: int | None, faults: FaultPlan | None
    ) -> SpillSpace: ...
    def allocate(self, nbytes: int) -> int: ...
    def free(self, offset: int) -> None: ...
    def rounded(self, nbytes: int) -> int: ...
    def close(self) -> None: ...
    @property
    def fd(self) -> int: ...
    @property
    def alignment(self) -> int: ...
    @property
    def reserved(self) -> bool: ...
    @property
    def used(self) -> int: ...
    @property
    def peak(self) -> int: ...
    @property
    def capacity(self) -> int: ...

class Stripe:
    """What one `StripedSpill.write` stored: a future at first, then a place to read from.

    When it goes, its write has ended or was stopped, and its extents go back.
    """

    @property
    def nbytes(self) -> int: ...
    @property
    def place(self) -> str:
        """Where it begins, for messages."""
    @property
    def start_ns(self) -> int:
        """When the first part began; 0 before."""
    @property
    def end_ns(self) -> int:
        """When the last part ended; 0 before."""
    def done(self) -> bool:
        """Whether every part has ended, well or not."""
    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until everything is written; what a directory refused is written to another.

        Raises OSError when no directory would take some part, or the write was cancelled (every
        part has ended then), TimeoutError when it is not done in time.
        """
    def cancel(self) -> bool:
        """Stops the write if no part of it has begun; True when nothing was or will be written."""
    def read(self, data_ptr: int, target: object = None) -> StripedRead:
        """Starts to read everything to `data_ptr`; the write must have been waited for.

        `target` is held until the read has gone.
        """
    def free(self) -> None:
        """Gives the extents back; a write still under way is stopped, or else awaited."""

class StripedRead:
    """A read of a whole stripe. When it goes, no byte is moved any more; then goes its target."""

    @property
    def failed_place(self) -> str:
        """Where the first part that failed reads, once the read is done; for messages."""
    @property
    def start_ns(self) -> int: ...
    @property
    def end_ns(self) -> int: ...
    def done(self) -> bool:
        """Whether every part has ended."""
    def wait(self, timeout_s: float | None = None) -> None:
        """Waits for every part.

        Raises OSError naming file, offset and cause when a part could not be read, EOFError when a
        file ended too early, TimeoutError when it is not done in time.
        """

class SpillLane:
    """How one directory does: bytes on their way to it and written, bytes per ns, failures."""

    @property
    def engine(self) -> Engine: ...
    @property
    def in_flight_nbytes(self) -> int: ...
    @property
    def written_nbytes(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def num_failures(self) -> int: ...
    @property
    def retired(self) -> str: ...

class StripedSpill:
    """Several spill files as one place; see `dataeff.storage.StripedSpill`."""

    def __init__(self, chunk_nbytes: int | None) -> None: ...
    def add(self, space: SpillSpace, engine: Engine) -> None: ...
    def write(self, data_ptr: int, nbytes: int, source: object = None) -> Stripe: ...
    def lanes(self) -> list[SpillLane]: ...
    def close(self) -> None: ...
    @property
    def used(self) -> int: ...
    @property
    def peak(self) -> int: ...

def make_threads_engine(num_threads: int, faults: FaultPlan | None) -> Engine: ...
def make_uring_engine(queue_depth: int, faults: FaultPlan | None) -> Engine: ...
def make_cufile_engine(library: str, num_threads: int) -> Engine: ...

# num_rows, rows_per_extent, offset, fds
_RowSegment = tuple[int, int, int, list[int]]

class RowReader:
    """Gathers rows that are in files; see `dataeff.features.disk_rows`."""

    def __init__(
        self,
        segments: list[_RowSegment],
        row_nbytes: int,
        queue_depth: int,
        cache_nbytes: int,
        engine: Engine | None,
        faults: FaultPlan | None,
    ) -> None: ...
    def gather(self, index: int, size: int, itemsize: int, out: int, num_threads: int) -> int: ...
    def counts(self) -> tuple[int, int, int, int]: ...
    @property
    def num_cache_rows(self) -> int: ...
    @property
    def queue_depth(self) -> int: ...

class RowCache:
    """Rows in host memory, replaced by S3-FIFO."""

    def __init__(self, budget_nbytes: int, row_nbytes: int, num_rows: int) -> None: ...
    def find(self, row: int, nbytes: int) -> bytes | None: ...
    def insert(self, row: int, data: bytes) -> None: ...
    def __contains__(self, row: int) -> bool: ...
    def __len__(self) -> int: ...
    @property
    def num_slots(self) -> int: ...

def plan_runs(
    segments: list[_RowSegment], row_nbytes: int, rows: list[int], max_run_nbytes: int
) -> list[tuple[int, int, int, int]]: ...
def prefer_huge_pages(data: int, nbytes: int) -> None: ...
def prefer_node(data: int, nbytes: int, node: int) -> bool: ...
def move_into_huge_pages(data: int, nbytes: int, num_threads: int) -> int: ...
def crc32c(data_ptr: int, nbytes: int, initial: int = 0) -> int: ...
def crc32c_by_table(data_ptr: int, nbytes: int, initial: int = 0) -> int: ...
def crc32c_in_hardware() -> bool: ...
def reserve_file(fd: int, offset: int, nbytes: int) -> bool: ...

# csrc/sampling: addresses are integers, ids are `id_nbytes` wide.

def build_csc(
    id_nbytes: int,
    src: int,
    dst: int,
    num_edges: int,
    num_src_nodes: int,
    num_dst_nodes: int,
    order: int,
    colptr: int,
    row: int,
    e_id: int,
) -> bool: ...
def check_csc(
    id_nbytes: int,
    colptr: int,
    num_dst_nodes: int,
    row: int,
    num_edges: int,
    num_src_nodes: int,
) -> None: ...
def sorted_in_columns(
    id_nbytes: int, colptr: int, num_dst_nodes: int, value_nbytes: int, value: int
) -> bool: ...

class RelationSpec:
    def __init__(
        self,
        *,
        src_type: int,
        dst_type: int,
        colptr: int,
        row: int,
        e_id: int,
        etype: int,
        weight: int,
        time: int,
        fanouts: list[list[int]],
    ) -> None: ...

class Sample:
    def nodes_per_hop(self, type: int) -> list[int]: ...
    def edges_per_hop(self, relation: int) -> list[int]: ...
    def write_nodes(self, type: int, id: int, tree: int, num_threads: int) -> None: ...
    def write_edges(
        self, relation: int, src: int, dst: int, e_id: int, etype: int, num_threads: int
    ) -> None: ...

class NeighborSampler:
    def __init__(
        self,
        *,
        id_nbytes: int,
        num_nodes: list[int],
        relations: list[RelationSpec],
        num_hops: int,
        replace: bool,
        disjoint: bool,
        last: bool,
        induced: bool,
    ) -> None: ...
    def sample(
        self, seeds: list[tuple[int, int, int]], random_seed: int, num_threads: int
    ) -> Sample: ...

class Frontier:
    def __init__(
        self,
        *,
        colptr: int,
        id_nbytes: int,
        node: int,
        tree: int,
        until: int,
        size: int,
        etype: int,
        weight: int,
        time: int,
        fanouts: int,
        num_fanouts: int,
        replace: bool,
        last: bool,
        random_seed: int,
        hop: int,
        relation: int,
    ) -> None: ...
    def count(self, counts: int) -> None: ...
    def choose(self, ends: int, places: int) -> None: ...
    def count_cuda(self, counts: int, device: int, stream: int) -> None: ...
    def choose_cuda(self, ends: int, places: int, device: int, stream: int) -> None: ...

# parallel/

def parallel_for_address() -> int: ...
def use_openmp_team(gomp_parallel: int) -> None: ...
def loop_threads_here() -> int: ...
def set_loop_threads_here(num_threads: int) -> None: ...

# graph/: arrays of int32 (itemsize 4) or int64 (8), given by address; 0 for what is absent

def counting_sort(
    itemsize: int,
    key: int,
    first: int,
    num_rows: int,
    num_keys: int,
    order: int,
    rank: int,
    ptr: int,
    num_threads: int,
) -> None: ...
def count_runs(itemsize: int, a: int, b: int, num_rows: int, num_threads: int) -> int: ...
def merge_edges(
    parts: int,
    num_parts: int,
    itemsize: int,
    src: int,
    dst: int,
    type: int,
    num_threads: int,
) -> int: ...
def number_runs(
    itemsize: int,
    a: int,
    b: int,
    order: int,
    num_rows: int,
    run_of: int,
    ptr: int,
    run_a: int,
    run_b: int,
    num_threads: int,
) -> None: ...
