"""Rows of a table on disk by random index, cold: nothing of the file is in the page cache.

The pages of the file are dropped before each call; the table reads past the page cache, with no
row cache of its own. fio reads as many random pages of the same file at the same depth: its rate is
what the disk gives, and `share_of_fio` is the table's rate of requests, some of several pages, over
fio's. Each provider draws rows of its own, so that none finds warm what another
read.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dataeff
from dataeff.bench.case import Case, Options, Provider, Step, Unavailable
from dataeff.bench.folder import new_folder
from dataeff.features.table_files import read_header
from dataeff.storage import uring_refusal

PAGE_NBYTES = 4096
NUM_IDS = 4096
CHUNK_NUM_ROWS = 65536
DEPTH = 128


@dataclass
class Inputs:
    """A table of random float32 rows in a file, and what fio made of that file."""

    path: Path
    num_rows: int
    folder: ExitStack
    num_open: int = 0
    fio_reads_per_s: list[float] = field(default_factory=list)

    def ids(self, seed: int) -> Callable[[], Tensor]:
        """Row numbers anew at each call, the first time the same for every seed."""
        seeds = iter([0, *range(seed * 1_000_000 + 1, (seed + 1) * 1_000_000)])

        def draw() -> Tensor:
            generator = torch.Generator().manual_seed(next(seeds))
            return torch.randint(self.num_rows, (NUM_IDS,), generator=generator)

        return draw

    def drop(self) -> None:
        """Leaves no page of the file in the page cache."""
        fd = os.open(self.path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    def opened(self, close: Callable[[], object] = lambda: None) -> Callable[[], None]:
        """What a provider's `close` is to be: the last one removes the file."""
        self.num_open += 1

        def closed() -> None:
            close()
            self.num_open -= 1
            if not self.num_open:
                self.folder.close()

        return closed


def cases(options: Options) -> Iterator[Case]:
    """Rows of a part of a page, and rows that cross pages."""
    nbytes = options.pick(full=1 << 30, quick=128 << 20)
    for dim in options.pick(full=(32, 256, 602), quick=(256,)):
        row_nbytes = dim * 4
        num_rows = nbytes // row_nbytes
        yield Case(
            size=f"disk rows={num_rows} dim={dim} ids={NUM_IDS} depth={DEPTH} f32 cold",
            group="rows on disk, cold",
            inputs=partial(make_inputs, options.directory, num_rows, dim),
            providers=(
                Provider("numpy.memmap", _memmap),
                Provider("fio", _fio),
                Provider("dataeff threads", partial(_ours, "threads"), role="ours"),
                Provider("dataeff io_uring", partial(_ours, "io_uring"), role="ours"),
            ),
            nbytes=NUM_IDS * row_nbytes,
            same=_same,
        )


def make_inputs(directory: Path, num_rows: int, dim: int) -> Inputs:
    """Writes the table: one chunk of random rows again and again, each with its number."""
    folder = ExitStack()
    path = new_folder(directory, folder) / "rows.npy"
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (num_rows, dim))
    some = np.random.default_rng(0).random((CHUNK_NUM_ROWS, dim), dtype=np.float32)
    for begin in range(0, num_rows, CHUNK_NUM_ROWS):
        part = rows[begin : begin + CHUNK_NUM_ROWS]
        part[:] = some[: len(part)]
        part[:, 0] = np.arange(begin, begin + len(part))  # no two rows alike
    rows.flush()
    return Inputs(path, num_rows, folder)


def _same(expected: Tensor, actual: Tensor | None) -> None:
    if actual is not None:  # fio returns no rows
        assert torch.equal(expected, actual), "the rows differ"


def _memmap(inputs: Inputs) -> Step:
    ids = inputs.ids(1)

    # The mapping keeps its pages from being dropped: each call maps the file anew.
    def call() -> Tensor:
        return torch.from_numpy(np.load(inputs.path, mmap_mode="r")[ids().numpy()])

    return Step(call, before=inputs.drop, close=inputs.opened())


def _ours(kind: str, inputs: Inputs) -> Step:
    if kind == "io_uring" and (reason := uring_refusal()):
        raise Unavailable(reason)
    table = dataeff.FeatureTable.open(inputs.path, cache_bytes=0, queue_depth=DEPTH, engine=kind)
    ids = inputs.ids(2 if kind == "threads" else 3)
    elapsed_s: list[float] = []

    def call() -> Tensor:
        start = time.perf_counter()
        rows = table[ids()]
        elapsed_s.append(time.perf_counter() - start)
        return rows

    def metrics() -> dict[str, tuple[float, str]]:
        stats = table.stats()
        assert stats.disk is not None
        num_reads = stats.disk.num_reads / stats.num_gathers
        found = {
            "num_reads": (num_reads, "1"),
            "nbytes_read": (stats.disk.nbytes_read / stats.num_gathers, "bytes"),
            "pages_wanted": (_pages_per_row(inputs) * NUM_IDS, "1"),
        }
        if inputs.fio_reads_per_s:
            rate = num_reads / statistics.median(elapsed_s)
            found["share_of_fio"] = (rate / statistics.median(inputs.fio_reads_per_s), "1")
        return found

    return Step(call, before=inputs.drop, metrics=metrics, close=inputs.opened(table.close))


def _pages_per_row(inputs: Inputs) -> float:
    """Pages that a random row touches on average: it starts at any multiple of `unit`."""
    files = read_header(inputs.path)
    unit = math.gcd(files.row_nbytes, files.offset, PAGE_NBYTES)
    return 1 + (files.row_nbytes - unit) / PAGE_NBYTES


def _fio(inputs: Inputs) -> Step:
    """Random pages of the same file, timed by fio itself: its start does not count."""
    program = shutil.which("fio")
    if program is None:
        raise Unavailable("fio is not on the PATH")
    command = [
        program,
        "--name=pages",
        f"--filename={inputs.path}",
        "--rw=randread",
        f"--bs={PAGE_NBYTES}",
        f"--iodepth={DEPTH}",
        f"--io_size={NUM_IDS * PAGE_NBYTES}",
        "--direct=1",
        "--norandommap",
        "--randrepeat=0",
        "--readonly",
        "--invalidate=0",  # it would drop the page cache on its own clock
        f"--ioengine={'libaio' if uring_refusal() else 'io_uring'}",
        "--output-format=json",
    ]

    def call() -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        job = json.loads(done.stdout)["jobs"][0]["read"]
        inputs.fio_reads_per_s.append(job["bw_bytes"] / PAGE_NBYTES)

    def metrics() -> dict[str, tuple[float, str]]:
        return {"fio_reads_per_s": (statistics.median(inputs.fio_reads_per_s), "1/s")}

    def seconds() -> float:
        return NUM_IDS / inputs.fio_reads_per_s[-1]

    return Step(
        call,
        before=inputs.drop,
        metrics=metrics,
        seconds=seconds,
        close=inputs.opened(),
        nbytes=NUM_IDS * PAGE_NBYTES,
    )
