"""Growth of the gather: what is varied, and that both providers agree at every size."""

import pytest
import torch

from dataeff.bench import gather_growth as growth
from dataeff.bench.case import Options

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cores", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_threads_double_up_to_the_cores(cores, counts):
    assert growth.thread_counts(cores) == counts


def test_tables_that_memory_does_not_hold_are_left_out(monkeypatch):
    monkeypatch.setattr(growth, "available_bytes", lambda: 10**9)
    sizes = [case.size for case in growth.cases(Options(device=CPU))]
    assert any("rows=1000000 " in size for size in sizes)
    assert not any("rows=10000000 " in size for size in sizes)
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
