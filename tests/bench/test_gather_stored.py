"""The request counts that the benchmark prints, and its cases."""

import pytest
import torch

from dataeff import _core
from dataeff._ops import row_table
from dataeff.bench import Options, gather_stored, run_case
from dataeff.bench.record import Run


def requests(row_nbytes, stride, offset, ids):
    """(of the gather, of one without its shift), for rows of a table `offset` B behind a line."""
    room = torch.zeros(offset + 256 + (int(ids.max()) + 1) * stride, dtype=torch.uint8)
    start = -room.data_ptr() % 128 + offset
    table = room[start:].as_strided((int(ids.max()) + 1, row_nbytes), (stride, 1))
    return _core.count_requests(
        *row_table(table), ids.data_ptr(), ids.numel(), ids.element_size()
    ), table


def lines(table, ids):
    begin = table.data_ptr() + ids.long() * table.stride(0)
    return int(((begin + table.shape[1] - 1) // 128 - begin // 128 + 1).sum())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("row_nbytes", [161, 353, 512, 1000, 1024, 1412, 4096])
@pytest.mark.parametrize("offset", [0, 4, 16, 57])
def test_long_rows_cost_their_lines_and_without_the_shift_more(row_nbytes, offset, dtype):
    ids = torch.randperm(40).to(dtype)
    (shifted, plain), table = requests(row_nbytes, row_nbytes + 256, offset, ids)
    assert shifted == lines(table, ids)
    assert plain >= shifted
    if row_nbytes == 4096 and offset:  # 8 loads of 512 B, each over the edge of a line
        assert plain == 40 * 8 * 5 if offset % 16 == 0 else plain > shifted


def test_an_aligned_row_of_a_line_is_one_request_either_way():
    assert requests(128, 128, 0, torch.arange(64))[0] == (64, 64)


def test_wrong_ids_and_empty_rows():
    x = torch.zeros(4, 0)
    ids = torch.tensor([0, 9])
    with pytest.raises(IndexError, match="9"):
        _core.count_requests(*row_table(x), ids.data_ptr(), 2, 8)
    assert _core.count_requests(*row_table(x), ids.data_ptr(), 1, 8) == (0, 0)


def test_cases_run_and_agree(monkeypatch):
    options = Options(quick=True, device=torch.device("cpu"))
    monkeypatch.setattr(Options, "budget_s", 0.0)
    monkeypatch.setattr(Options, "min_sample_s", 0.0)
    small = {"full": (2000, 500), "quick": (2000, 500)}
    pick = Options.pick
    monkeypatch.setattr(
        Options,
        "pick",
        lambda self, full, quick: (
            small["quick"] if quick == (500_000, 100_000) else pick(self, full, quick)
        ),
    )
    metrics = {}
    for make in ("small_row_cases", "power_law_cases", "request_cases"):
        for case in getattr(gather_stored, make)(options):
            for record in run_case("gather", case, options, Run.here(options.device)):
                metrics[case.size, record.provider, record.metric] = record.value
    asked = {
        provider: value
        for (size, provider, name), value in metrics.items()
        if name == "bytes_read_per_row" and "small" in size
    }
    assert asked["dataeff int8"] == 132 and asked["dataeff f32"] == 512
    assert metrics["requests of rows of 128 B", "dataeff", "requests_per_row"] == 1
