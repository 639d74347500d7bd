from pathlib import Path

import pytest
import torch

from dataeff import _core
from dataeff.memory import HostBuffer, numa

DEVICE = torch.device("cuda", 1)


def policy_at(address):
    """What the kernel says of the memory that begins at `address`."""
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        begin, policy, *_ = line.split()
        if int(begin, 16) == address:
            return policy
    raise LookupError(hex(address))


def test_a_buffer_asks_for_memory_of_a_node():
    if not Path("/proc/self/numa_maps").exists():
        pytest.skip("this kernel knows of no NUMA nodes")
    with HostBuffer(4 << 20) as buffer:
        if not _core.prefer_node(buffer.data_ptr, buffer.capacity_nbytes, 0):
            pytest.skip("this container forbids mbind")
        buffer.tensor().fill_(1)
        assert policy_at(buffer.data_ptr) == "prefer:0"
        assert not _core.prefer_node(buffer.data_ptr + 1, buffer.capacity_nbytes, 0)  # no page


@pytest.mark.parametrize("node", [-1, 1023, 1024, 1 << 20])
def test_a_node_that_there_is_not_is_refused(node):
    with HostBuffer(4096) as buffer:
        assert not _core.prefer_node(buffer.data_ptr, buffer.capacity_nbytes, node)
        assert int(buffer.tensor().sum()) == 0


@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None)])
def test_the_node_of_a_gpu_is_the_one_that_sysfs_tells(monkeypatch, tmp_path, text, node):
    monkeypatch.setattr(numa, "pci_address", lambda ordinal: f"0000:0{ordinal}:00.0")
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "numa_node").write_text(text)
    assert numa.node_of(DEVICE, tmp_path) == node
    assert numa.node_of(torch.device("cuda", 2), tmp_path) is None  # sysfs hides this one


def test_without_a_driver_no_node_is_known(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(numa.ctypes, "CDLL", missing)
    assert numa.node_of(DEVICE) is None
