"""Growth of the gather: what is varied, and that both providers agree at every size."""

import pytest
import torch

from dataeff.bench import gather_growth as growth
from dataeff.bench import run_case
from dataeff.bench.case import Options
from dataeff.bench.record import Run

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cores", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_threads_double_up_to_the_cores(cores, counts):
    assert growth.thread_counts(cores) == counts


def test_tables_that_memory_does_not_hold_are_recorded_as_skipped(monkeypatch):
    monkeypatch.setattr(growth, "available_bytes", lambda: 10**9)
    options = Options(device=CPU)
    by_size = {case.size: case for case in growth.cases(options)}
    [large] = [case for size, case in by_size.items() if "rows=10000000 " in size]
    records = run_case("gather", large, options, Run.here(CPU))
    assert {record.metric for record in records} == {"skipped"}
    assert {record.provider for record in records} == {"torch.index_select", "dataeff"}
    assert all("needs 1280000000 bytes" in record.note for record in records)
    [small] = [case for size, case in by_size.items() if "table: rows=1000000 " in size]
    assert small.inputs() is not None
    assert list(growth.cases(Options(quick=True, device=CPU))) == []


def test_providers_agree_and_leave_the_threads_as_they_were(monkeypatch):
    for name, values in {"TABLE_ROWS": (100, 1000), "CALL_IDS": (1, 7)}.items():
        monkeypatch.setattr(growth, name, values)
    monkeypatch.setattr(growth, "NUM_ROWS", 50)
    monkeypatch.setattr(growth, "NUM_IDS", 20)
    before = torch.get_num_threads()
    for case in growth.cases(Options(device=CPU)):
        inputs = case.inputs()
        expected, actual = (provider.prepare(inputs).call() for provider in case.providers)
        case.assert_same(expected, actual)
        assert torch.equal(actual, inputs.x[inputs.indices[0]])
    assert torch.get_num_threads() == before
