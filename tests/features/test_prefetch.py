"""The order of streams around a gather on a stream of its own."""

import torch

from dataeff.features.prefetch import prefetch_on_stream

BEFORE = [("side", "waits for", "reader"), ("gather on", "side"), ("record", "side")]
AFTER = ("reader", "waits for event of", "side")


def begin(cuda):
    def gather():
        cuda.log.append(("gather on", cuda.current.name))
        return torch.ones(3)

    return prefetch_on_stream(cuda.stream("side"), torch.tensor([0]), gather)


def test_the_reader_waits_once_for_the_gather_and_the_gather_for_what_was_queued(cuda_double):
    cuda = cuda_double
    pending = begin(cuda)
    assert cuda.log == BEFORE
    assert pending.wait() is pending.wait()
    del pending
    assert cuda.log == [*BEFORE, AFTER]


def test_an_index_is_not_written_again_before_an_abandoned_gather_has_read_it(cuda_double):
    cuda = cuda_double
    pending = begin(cuda)
    cuda.current = cuda.stream("another")
    del pending
    assert cuda.log == [*BEFORE, AFTER]
