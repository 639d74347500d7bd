"""`FeatureTable` on CUDA: rows of host memory read in place, bad indices, streams and graphs."""

import numpy as np
import pytest
import torch

import dataeff
from dataeff import _core
from dataeff.features import gather

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _core.cuda_built), reason="needs a CUDA GPU and CUDA build"
)
SENTINEL = 0xA5


@pytest.mark.parametrize("row_nbytes", [1, 3, 4, 16, 33, 100, 128, 129, 353, 512, 1000, 1412, 4096])
@pytest.mark.parametrize("offset", [0, 1, 4, 16, 77])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_every_alignment_is_plain_indexing(row_nbytes, offset, index_dtype):
    num_rows, num_ids = 5000, 3001
    x = torch.randint(256, (offset + num_rows * row_nbytes,), dtype=torch.uint8)[offset:]
    x = x.view(num_rows, row_nbytes)
    index = torch.randint(-num_rows, num_rows, (num_ids,), dtype=index_dtype)
    room = torch.full((num_ids * row_nbytes + 64,), SENTINEL, dtype=torch.uint8, device="cuda")
    out = room[32 + offset % 16 :][: num_ids * row_nbytes].view(num_ids, row_nbytes)
    with dataeff.FeatureTable(x) as table:
        table.gather(index.cuda(), out=out)
        assert torch.equal(out.cpu(), x[index.long()])
        assert (room.cpu()[: 32 + offset % 16] == SENTINEL).all()
        assert (room.cpu()[32 + offset % 16 + num_ids * row_nbytes :] == SENTINEL).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.complex128])
def test_dtypes_shapes_and_selections(dtype):
    x = (torch.rand(100, 3, 7) > 0.5).to(dtype)
    with dataeff.FeatureTable(x) as table:
        for index in (torch.randint(100, (4, 5)), torch.tensor(3), torch.rand(100) > 0.5):
            assert torch.equal(table[index.cuda()].cpu(), x[index])
        assert table.stats().nbytes.keys() == {"host->device"}


def test_reads_in_place_what_the_host_has_written():
    x = torch.zeros(10, 300)
    with dataeff.FeatureTable(x) as table:
        index = torch.arange(10, device="cuda")
        table[index]
        torch.cuda.synchronize()
        x.fill_(7)
        assert (table[index] == 7).all()


def test_a_wrong_index_is_reported_and_the_context_lives():
    x = torch.rand(10, 65)
    with dataeff.FeatureTable(x) as table:
        rows = table[torch.tensor([1, 10, -11, 2], device="cuda")]
        assert torch.equal(rows.cpu(), torch.stack([x[1], x[0] * 0, x[0] * 0, x[2]]))
        with pytest.raises(IndexError, match=r"2 wrong indices .* (10|-11) .* 10 rows"):
            table[torch.tensor([0], device="cuda")]
        table.check()
        assert torch.equal(table[torch.tensor([3], device="cuda")].cpu(), x[3:4])
        table[torch.tensor([99], device="cuda")]
        with pytest.raises(IndexError, match="99"):
            table.check()


def test_prefetch_runs_on_its_own_stream():
    x = torch.rand(1000, 256)
    with dataeff.FeatureTable(x) as table:
        for _ in range(20):
            index = torch.randint(1000, (5000,), device="cuda")
            pending = table.prefetch(index)
            torch.rand(512, 512, device="cuda") @ torch.rand(512, 512, device="cuda")
            assert torch.equal(pending.wait().cpu(), x[index.cpu()])


def test_captured_in_a_graph():
    """Registering is all that has to come before it."""
    x = torch.rand(100, 64)
    with dataeff.FeatureTable(x).register() as table:
        index = torch.arange(10, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rows = table[index]
        index.add_(50)
        graph.replay()
        assert torch.equal(rows.cpu(), x[50:60])


def test_compiles_as_one_graph():
    x = torch.rand(100, 64)
    with dataeff.FeatureTable(x).register() as table:
        step = torch.compile(lambda index: table[index] * 2, fullgraph=True)
        index = torch.randint(100, (30,), device="cuda")
        torch.testing.assert_close(step(index).cpu(), x[index.cpu()] * 2)


def test_pinned_shared_and_read_only_memory():
    index = torch.arange(5, device="cuda")
    pinned = torch.rand(50, 9).pin_memory()
    with dataeff.FeatureTable(pinned) as table:
        assert torch.equal(table[index].cpu(), pinned[:5])
    x = torch.rand(50, 900)
    with dataeff.FeatureTable(x) as one, dataeff.FeatureTable(x[10:]) as other:
        assert torch.equal(one[index].cpu(), x[:5])
        one.close()
        assert torch.equal(other[index].cpu(), x[10:15])


def test_a_table_whose_ends_are_registered_for_others_is_read_to_its_middle():
    x = torch.rand(3000, 900)
    first, last = (dataeff.FeatureTable(part).register() for part in (x[:500], x[2500:]))
    with first, last, dataeff.FeatureTable(x) as table:
        index = torch.randint(3000, (5000,), device="cuda")
        assert torch.equal(table[index].cpu(), x[index.cpu()])


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
def test_a_read_only_mapping_works_or_says_why(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(4096.0))
    x = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="r"))
    with dataeff.FeatureTable(x) as table:
        try:
            rows = table[torch.arange(5, device="cuda")]
        except RuntimeError as error:
            assert "read-only" in str(error)  # either outcome is right
        else:
            assert torch.equal(rows.cpu(), x[:5])
    assert torch.equal(torch.ones(3, device="cuda").cpu(), torch.ones(3))  # no error left behind


def test_unregistered_memory_is_refused():
    with pytest.raises(RuntimeError, match="FeatureTable"):
        gather(torch.rand(1 << 20), torch.tensor([0], device="cuda"))


def test_empty_tables_and_indices():
    with dataeff.FeatureTable(torch.rand(0, 4)) as table:
        assert table[torch.empty(0, dtype=torch.long, device="cuda")].shape == (0, 4)
        table[torch.tensor([0], device="cuda")]
        with pytest.raises(IndexError, match="0 rows"):
            table.check()


def test_scatter_from_the_device():
    x = torch.zeros(10, 4)
    with dataeff.FeatureTable(x) as table:
        rows = torch.rand(2, 4, device="cuda")
        table.scatter_(torch.tensor([3, -1], device="cuda"), rows)
        assert torch.equal(x[[3, 9]], rows.cpu())


def test_operators_pass_opcheck():
    # On the device: opcheck works on copies, and a copy of registered memory is not registered.
    x, index = torch.rand(10, 4, device="cuda"), torch.randint(10, (3, 2), device="cuda")
    torch.library.opcheck(torch.ops.dataeff.gather, (x, index))
