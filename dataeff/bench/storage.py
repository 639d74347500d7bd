"""The file engines against a plain thread pool and fio: one file, the same blocks and depth."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

from dataeff import _core
from dataeff.bench.case import Case, Options, Provider, Step, Unavailable
from dataeff.memory import HostBuffer
from dataeff.storage import SpillFile, open_engine, uring_refusal

Way = Literal["read", "write"]
FIO_PASSES = 4  # in one run of fio: its first requests count for less in its own figure
# fio's buffers on huge pages, as ours are: of 4 KiB pages a disk may take half as many bytes at a
# time (1 to 8 MiB blocks on a virtio disk: 1.5 to 2.5 times the rate on huge ones).
FIO_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
WAYS: tuple[Way, ...] = ("write", "read")


class Blocks:
    """An unnamed file of `nbytes`, its contents in memory, and the blocks it is moved in."""

    def __init__(self, directory: Path, nbytes: int, block_nbytes: int, depth: int) -> None:
        self.block_nbytes, self.depth = block_nbytes, depth
        self.fio_gbs: dict[str, list[float]] = {}  # by fio's engine, what it said of each run
        self.spill = SpillFile(directory)
        self.offset = self.spill.allocate(nbytes).offset
        self.buffer = HostBuffer(nbytes)
        memoryview(self.buffer)[:] = os.urandom(nbytes)
        self._crc = self._checksum()
        self.places = range(0, nbytes, block_nbytes)
        with open_engine() as engine:
            self.move(engine.write)  # the first write assigns the blocks; later ones do not

    def _checksum(self) -> int:
        return _core.crc32c(self.buffer.data_ptr, self.buffer.nbytes)

    def move(self, order: Callable[[int, int, int, int], _core.Transfer]) -> int:
        """Moves every block once through an engine; returns the bytes moved."""
        address, fd, nbytes = self.buffer.data_ptr, self.spill.fd, self.block_nbytes
        transfers = [order(fd, address + at, nbytes, self.offset + at) for at in self.places]
        for transfer in transfers:
            transfer.wait()
        return self.buffer.nbytes

    def check(self, call: Callable[[], int], way: Way) -> None:
        """Runs `call` once and asserts that it moved the very bytes; raises AssertionError."""
        if way == "read":
            memoryview(self.buffer)[:] = bytes(self.buffer.nbytes)
            call()
        else:
            call()
            memoryview(self.buffer)[:] = bytes(self.buffer.nbytes)
            view = memoryview(self.buffer)
            for at in self.places:
                block = view[at : at + self.block_nbytes]
                os.preadv(self.spill.fd, [block], self.offset + at)
        assert self._checksum() == self._crc, f"the {way} moved other bytes than it should"


def cases(options: Options) -> Iterator[Case]:
    """Writes and reads of one file past the page cache, by block size and depth."""
    for way in WAYS:
        for block_mib in options.pick(full=(1, 8), quick=(1,)):
            for depth in options.pick(full=(4, 16), quick=(4,)):
                yield case(options, way, block_mib << 20, depth)


def case(options: Options, way: Way, block_nbytes: int, depth: int) -> Case:
    """One way, one block size, one depth."""
    nbytes = options.pick(full=256 << 20, quick=32 << 20)
    directory = options.directory
    # No ceiling beside it: that would be another file, and where a file lies on the disk decides
    # more than how it is read. The plain system calls on this file are what there is to reach.
    return Case(
        size=f"{way} past the page cache: block={block_nbytes >> 20}MiB depth={depth}",
        group=f"{way} past the page cache",
        inputs=partial(Blocks, directory, nbytes, block_nbytes, depth),
        providers=(
            Provider(f"os.p{way}v threads", partial(_system_calls, way)),
            # Which of fio's engines is faster depends on the kernel and the disk: both.
            Provider("fio libaio", partial(_fio, way, "libaio")),
            Provider("fio io_uring", partial(_fio, way, "io_uring")),
            Provider("dataeff threads", partial(_ours, "threads", way), role="ours"),
            Provider("dataeff io_uring", partial(_ours, "io_uring", way), role="ours"),
        ),
        nbytes=nbytes,
    )


def _ours(kind: str, way: Way, blocks: Blocks) -> Step:
    if kind == "io_uring" and (reason := uring_refusal()):
        raise Unavailable(reason)
    engine = open_engine(kind, num_threads=blocks.depth, queue_depth=blocks.depth)
    order = engine.write if way == "write" else engine.read
    rates: list[float] = []

    def call() -> int:
        start = time.perf_counter()
        nbytes = blocks.move(order)
        rates.append(nbytes / (time.perf_counter() - start) / 1e9)
        return nbytes

    blocks.check(call, way)
    return Step(call, close=engine.close, metrics=partial(_beside_fio, rates, blocks))


def _beside_fio(rates: list[float], blocks: Blocks) -> dict[str, tuple[float, str]]:
    """The median rate as a share of that of fio's faster engine, as fio itself tells it."""
    if not blocks.fio_gbs:
        return {}
    best = max(statistics.median(found) for found in blocks.fio_gbs.values())
    return {"share_of_fio": (statistics.median(rates) / best, "1")}


def _system_calls(way: Way, blocks: Blocks) -> Step:
    view, fd = memoryview(blocks.buffer), blocks.spill.fd
    one = os.pwritev if way == "write" else os.preadv
    pool = ThreadPoolExecutor(blocks.depth)

    def move(at: int) -> int:
        return one(fd, [view[at : at + blocks.block_nbytes]], blocks.offset + at)

    def call() -> int:
        return sum(pool.map(move, blocks.places))

    blocks.check(call, way)
    return Step(call, close=pool.shutdown)


def _fio(way: Way, ioengine: str, blocks: Blocks) -> Step:
    """Runs fio over the same file, `FIO_PASSES` times at once, and takes a pass's time from it."""
    program = shutil.which("fio")
    if program is None:
        raise Unavailable("fio is not on the PATH")
    if ioengine == "io_uring" and (reason := uring_refusal()):
        raise Unavailable(reason)
    command = [
        program,
        "--name=blocks",
        f"--filename=/proc/{os.getpid()}/fd/{blocks.spill.fd}",
        f"--rw={way}",
        f"--bs={blocks.block_nbytes}",
        f"--iodepth={blocks.depth}",
        f"--size={blocks.buffer.nbytes}",
        f"--loops={FIO_PASSES}",
        f"--offset={blocks.offset}",
        f"--direct={int(blocks.spill.direct)}",
        f"--ioengine={ioengine}",
        "--output-format=json",
    ]
    rates = blocks.fio_gbs[ioengine] = []

    def call() -> int:
        environment = os.environ | FIO_ENVIRONMENT
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        job = json.loads(done.stdout)["jobs"][0][way]
        rates.append(job["bw_bytes"] / 1e9)
        return int(job["io_bytes"]) // FIO_PASSES

    def metrics() -> dict[str, tuple[float, str]]:
        return {"fio_bandwidth_gbs": (statistics.median(rates), "GB/s")}

    def seconds() -> float:
        return blocks.buffer.nbytes / 1e9 / rates[-1]

    return Step(call, metrics=metrics, seconds=seconds)
