"""Memory moved into huge pages stays what it was."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dataeff import _core

MIB = 1 << 20


def move(x: Tensor, num_threads: int = 2) -> int:
    return _core.move_into_huge_pages(x.data_ptr(), x.nbytes, num_threads)


def huge_nbytes(x: Tensor) -> int:
    """Bytes in huge pages in the mappings that hold `x`, as the kernel says."""
    begin, end, total, inside = x.data_ptr(), x.data_ptr() + x.nbytes, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first < end and last > begin
        elif inside and head == "AnonHugePages:":
            total += int(line.split()[1]) << 10
    return total


@pytest.mark.parametrize("num_threads", [1, 3])
def test_contents_and_address_stay(num_threads: int) -> None:
    x = torch.arange(12 * MIB // 8)
    address = x.data_ptr()
    moved = move(x, num_threads)
    assert x.data_ptr() == address
    assert torch.equal(x, torch.arange(12 * MIB // 8))
    if moved:  # the kernel may have none to give
        assert moved <= huge_nbytes(x)


def test_writes_of_other_threads_are_kept() -> None:
    x = torch.zeros(16 * MIB, dtype=torch.uint8) + 1
    stop = threading.Event()
    rounds = [0]

    def write() -> None:
        while not stop.is_set():
            rounds[0] += 1
            x.fill_(rounds[0] % 251)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(5):
        move(x)
    stop.set()
    writer.join()
    assert x.eq(rounds[0] % 251).all()


def test_mapped_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, np.arange(8 * MIB // 8))
    x = torch.from_numpy(np.load(path, mmap_mode="c"))
    assert move(x) == 0


@pytest.mark.parametrize("nbytes", [0, 1, 2 * MIB - 1])
def test_less_than_a_page_is_nothing(nbytes: int) -> None:
    assert move(torch.zeros(nbytes, dtype=torch.uint8)) == 0


def test_a_large_table_is_moved_unless_told_otherwise() -> None:
    import dataeff

    x = torch.zeros(64 * MIB, dtype=torch.uint8).view(-1, 64) + 1
    with dataeff.FeatureTable(x, huge_pages=False):
        before = huge_nbytes(x)
    with dataeff.FeatureTable(x, huge_pages=True) as table:
        assert huge_nbytes(x) >= before
        assert table[torch.tensor([5])].eq(1).all()
