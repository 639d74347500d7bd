"""The order of streams when threads bring batches to a GPU."""

import warnings

import pytest
import torch

from dataeff.features.delivery import Delivery
from dataeff.sampling import SampledSubgraph


def test_results_are_made_beside_the_reader_and_in_order_with_it(cuda_double):
    delivery = Delivery(torch.device("cuda"))
    delivered = delivery.run(lambda task: (task, cuda_double.current.name), 7)
    assert cuda_double.log == [("side", "waits for", "reader"), ("record", "side")]
    cuda_double.log.clear()
    cuda_double.current = cuda_double.stream("another")
    assert delivery.take(delivered) == (7, "side")
    delivery.run(lambda task: task, 8)
    assert cuda_double.log == [
        ("another", "waits for event of", "side"),
        ("side", "waits for", "another"),
        ("record", "side"),
    ]


def test_tasks_are_done_behind_the_stream_that_was_current_where_they_were_drawn(cuda_double):
    delivery = Delivery(torch.device("cuda"))
    tasks = delivery.drawn([7, 8])
    assert next(tasks) == 7
    cuda_double.current = cuda_double.stream("another")
    assert next(tasks) == 8
    assert cuda_double.log == [("side", "waits for", "reader"), ("side", "waits for", "another")]


class Held(torch.Tensor):
    """A tensor on a GPU that says for which streams it stays."""

    is_cuda = True
    stays_for = None

    def record_stream(self, stream):
        self.stays_for = stream.name


@pytest.mark.parametrize("kind", ["tensors", "dataclass", "Data", "HeteroData"])
def test_what_the_reader_lets_go_is_not_taken_while_its_kernels_run(cuda_double, kind):
    """Also by work that began before the reader queued them."""
    made = [torch.ones(3).as_subclass(Held), torch.ones(2).as_subclass(Held)]
    result = {"x": made[0], "rest": [made[1], torch.ones(1), "name"]}
    if kind == "dataclass":
        result = SampledSubgraph(*made, None, None, None, [1], [2])
    elif kind != "tensors":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data_module = pytest.importorskip("torch_geometric.data")
        result = data_module.Data(x=made[0], edge_index=made[1], note="name")
        if kind == "HeteroData":
            result = data_module.HeteroData(a={"x": made[0]}, b={"y": made[1]})
    delivery = Delivery(torch.device("cuda"))
    assert delivery.take(delivery.run(lambda task: result, 7)) is result
    assert [tensor.stays_for for tensor in made] == ["reader", "reader"]


def test_a_task_that_the_reader_lets_go_is_not_taken_while_it_is_read(cuda_double):
    seeds = torch.ones(3).as_subclass(Held)
    Delivery(torch.device("cuda")).run(lambda task: None, (seeds, 7))
    assert seeds.stays_for == "side"
