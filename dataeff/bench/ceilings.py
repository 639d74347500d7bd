"""What the machine can do at best, measured in the same rounds as the work compared with it.

Each function returns a provider with the role `ceiling`; a case names those that bound it, and the
runner divides every other provider's rate by theirs. Bytes count once (a copy of n bytes moves n),
as they do for the work.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dataeff.bench.case import Provider, Step, Unavailable

BLOCK_NBYTES = 1 << 20
NUM_IO_THREADS = 4


def memcpy(nbytes: int) -> Provider:
    """A host-to-host copy of `nbytes` on `torch.get_num_threads()` threads."""

    def make(inputs: Any) -> Step:
        source = torch.ones(nbytes, dtype=torch.uint8)
        target = torch.zeros_like(source)
        return Step(lambda: target.copy_(source), nbytes=nbytes)

    return Provider("memcpy", make, role="ceiling")


def host_to_device(nbytes: int) -> Provider:
    """A copy of `nbytes` from pinned host memory to the current CUDA device."""

    def make(inputs: Any) -> Step:
        if not torch.cuda.is_available():
            raise Unavailable("there is no CUDA device")
        source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
        target = torch.ones(nbytes, dtype=torch.uint8, device="cuda")
        return Step(lambda: target.copy_(source, non_blocking=True), nbytes=nbytes)

    return Provider("host_to_device", make, role="ceiling")


def device_copy(nbytes: int) -> Provider:
    """A copy of `nbytes` within the memory of the current CUDA device."""

    def make(inputs: Any) -> Step:
        if not torch.cuda.is_available():
            raise Unavailable("there is no CUDA device")
        source = torch.ones(nbytes, dtype=torch.uint8, device="cuda")
        target = torch.zeros_like(source)
        return Step(lambda: target.copy_(source), nbytes=nbytes)

    return Provider("device_copy", make, role="ceiling")


def matmul(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Provider:
    """A matrix product [m, k] x [k, n] on random data: 2 m n k operations.

    Random, because a GPU draws less power on zeros and then clocks higher than on real data.
    """

    def make(inputs: Any) -> Step:
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(k, n, device=device).to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        return Step(lambda: torch.mm(a, b, out=out), flops=2 * m * n * k)

    return Provider("matmul", make, role="ceiling")


class RawFile:
    """An unnamed file of whole blocks, read and written past the page cache.

    Plain system calls, deliberately not this package's own engines: it is what they are held
    against.
    """

    def __init__(self, directory: Path, nbytes: int) -> None:
        self.nbytes = -(-nbytes // BLOCK_NBYTES) * BLOCK_NBYTES
        try:
            fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
        except OSError as error:
            raise Unavailable(
                f"{directory} gives no unnamed O_DIRECT file ({os.strerror(error.errno or 0)}); "
                f"name another directory than {tempfile.gettempdir()} on a local disk"
            ) from error
        self._fd = fd
        try:
            # One stretch of the disk, as a spill file has it: blocks that the four threads' first
            # writes get in the order in which these happen to arrive are read back slower.
            os.posix_fallocate(fd, 0, self.nbytes)
        except OSError as error:
            os.close(fd)
            raise Unavailable(f"{directory}: {os.strerror(error.errno or 0)}") from error
        # An anonymous map is page-aligned, which is what O_DIRECT asks of a buffer.
        self._buffers = [mmap.mmap(-1, BLOCK_NBYTES) for _ in range(NUM_IO_THREADS)]
        for buffer in self._buffers:
            buffer.write(os.urandom(BLOCK_NBYTES))
        self._pool = ThreadPoolExecutor(NUM_IO_THREADS)
        self.write()  # a file's first write also allocates its blocks; later ones do not

    def read(self) -> None:
        """Reads every block once."""
        self._each_block(lambda buffer, offset: os.preadv(self._fd, [buffer], offset))

    def write(self) -> None:
        """Writes every block once."""
        self._each_block(lambda buffer, offset: os.pwritev(self._fd, [buffer], offset))

    def close(self) -> None:
        """Gives back the file, the threads and the buffers."""
        self._pool.shutdown()
        os.close(self._fd)
        for buffer in self._buffers:
            buffer.close()

    def _each_block(self, transfer: Any) -> None:
        stride = NUM_IO_THREADS * BLOCK_NBYTES

        def every_fourth(lane: int) -> None:
            for offset in range(lane * BLOCK_NBYTES, self.nbytes, stride):
                moved = transfer(self._buffers[lane], offset)
                if moved != BLOCK_NBYTES:
                    raise OSError(f"{moved} of {BLOCK_NBYTES} bytes moved at offset {offset}")

        list(self._pool.map(every_fourth, range(NUM_IO_THREADS)))
