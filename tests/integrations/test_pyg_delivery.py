"""The order of streams when threads bring batches to a GPU."""

import torch

from dataeff.integrations.pyg.delivery import Delivery


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
