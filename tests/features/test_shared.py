"""One copy of a table for many processes, by fork and by spawn."""

import multiprocessing
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

import dataeff
from dataeff.features.registration import RegisteredMemory
from dataeff.memory.shared import shared_buffer

sys.path.insert(0, str(Path(__file__).parent))
import table_processes as processes

METHODS = ["fork", "spawn"]


def test_a_table_moves_with_its_tensor():
    x = torch.arange(12.0).view(4, 3)
    table = dataeff.FeatureTable(x)
    assert table.share_() is table
    x[2] = 7
    assert table[2].tolist() == [7, 7, 7]
    assert shared_buffer(table.x) is shared_buffer(x) is not None


def test_shared_takes_a_tensor_or_what_makes_it():
    for x in (torch.ones(3, 2), lambda: torch.ones(3, 2)):
        with dataeff.FeatureTable.shared(x) as table:
            assert torch.equal(table[:], torch.ones(3, 2))
            assert shared_buffer(table.x) is not None


def test_pickle_alone_copies():
    table = dataeff.FeatureTable.shared(torch.zeros(3, 2))
    copy = pickle.loads(pickle.dumps(table))
    table.x.fill_(5)
    assert copy[1].tolist() == [0, 0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrap", [dataeff.FeatureTable], ids=lambda f: f.__name__)
def test_a_data_loaders_workers_read_and_write_the_same_memory(method, wrap):
    x = torch.arange(24.0).view(12, 2)
    source = wrap(x)
    if method == "fork" and wrap is dataeff.FeatureTable:
        source.share_()  # a forked worker would have copies of the pages it writes
    loader = torch.utils.data.DataLoader(
        processes.Rows(source), batch_size=4, num_workers=1, multiprocessing_context=method
    )
    batches = list(loader)
    assert torch.cat(batches)[:, 0].tolist() == list(range(0, 24, 2))
    assert x[:, 1].tolist() == list(range(100, 112))


def test_a_forked_child_prefetches_with_a_thread_of_its_own():
    context = multiprocessing.get_context("fork")
    with dataeff.FeatureTable(torch.arange(6.0).view(3, 2)) as table:
        table.prefetch(torch.tensor([0])).wait()  # the parent's thread, which no child has
        answers = context.Queue()
        child = context.Process(
            target=processes.prefetch_in_child, args=(table, answers), daemon=True
        )
        child.start()
        assert answers.get(timeout=60) == [[2, 3]]
        child.join()
        assert child.exitcode == 0
        assert table.stats().num_gathers == 1


def test_memory_forked_after_cuda_is_the_cpus_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RuntimeError, match=r"forked after CUDA .* CPU tensor, or .*'spawn'"):
        RegisteredMemory(torch.ones(3)).register(torch.device("cuda"))


def test_a_child_leaves_its_parents_registration_alone():
    memory = RegisteredMemory(torch.ones(3))
    closed = []
    memory._registration = type("Registration", (), {"close": lambda self: closed.append(1)})()
    memory._devices.add(torch.device("cuda"))  # would be synchronised, which a child cannot
    memory._pid = os.getppid()
    memory.release()
    assert closed == [] and not memory._devices
