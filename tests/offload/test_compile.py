"""Compiled blocks are offloaded one by one; a model compiled whole is pointed out."""

import pytest
import torch

from dataeff.offload import ActivationOffload
from dataeff.offload.exclude import Exclusions
from dataeff.offload.planner import Action
from dataeff.offload.profile import BlockProfiler
from dataeff.offload.scopes import is_compiled

# Dynamo looks at `.grad` of what a compiled block is given, and is warned by torch for it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def peak_and_gradients(model, loss, gradients, offload):
    def step():
        with offload:
            value = loss()
            offload._cache.drain()
            value.backward()

    for _ in range(2):
        got = gradients(model, step)
    return offload.report().peak_saved_bytes, got


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_blocks_give_the_same_bits_with_less_memory(
    gpt_and_loss, gradients, assert_same, tmp_path, in_place
):
    model, loss = gpt_and_loss
    for i, block in enumerate(model.blocks):
        if in_place:
            block.compile(backend="aot_eager", fullgraph=True)
        else:
            model.blocks[i] = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected = gradients(model, lambda: loss().backward())
    keep = ActivationOffload(model, tmp_path, policy=lambda info: False)
    kept, _ = peak_and_gradients(model, loss, gradients, keep)
    offload = ActivationOffload(
        model, tmp_path, min_bytes=0, in_flight_bytes=1 << 20, prefetch_bytes=0
    )
    peak, got = peak_and_gradients(model, loss, gradients, offload)
    assert_same(got, expected)
    assert offload.report().bytes_written > 0
    assert peak < 0.8 * kept


def test_model_compiled_whole_is_pointed_out(gpt_and_loss, tmp_path, gradients, assert_same):
    model, _ = gpt_and_loss
    assert not is_compiled(model)
    whole = torch.compile(model, backend="aot_eager")
    assert is_compiled(whole)
    tokens = torch.arange(4 * 64).view(4, 64) % 64
    expected = gradients(whole, lambda: whole(tokens).backward())
    with pytest.warns(RuntimeWarning, match="blocks one by one"):
        offload = ActivationOffload(whole, tmp_path, min_bytes=0)
    _, got = peak_and_gradients(whole, lambda: whole(tokens), gradients, offload)
    assert_same(got, expected)


class LinearTanh(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(96, 96)

    def forward(self, x):
        return self.linear(x).tanh()


def test_blocks_compiled_in_place_are_measured_from_outside(tmp_path, gradients, assert_same):
    model = torch.nn.Sequential(LinearTanh(), LinearTanh())
    for block in model:
        block.compile(backend="eager", fullgraph=True)
    compiled = [block._compiled_call_impl for block in model]
    x = torch.randn(64, 96)
    expected = gradients(model, lambda: model(x).sum().backward())
    profiler = BlockProfiler(dict(model.named_children()), x.device, Exclusions(model))
    profiler.install(lambda: 0.0)
    profiler.begin()
    got = gradients(model, lambda: model(x).sum().backward())
    profiler.end(dict.fromkeys("01", Action.KEEP))
    assert_same(got, expected)
    for seconds in profiler._times(Action.KEEP).values():
        assert min(seconds) > 0
    profiler.remove()
    assert [block._compiled_call_impl for block in model] == compiled


@pytest.mark.parametrize("share", ["all", "a block"])
def test_a_region_that_asks_for_most_of_a_pass_is_pointed_out(tmp_path, share):
    model = torch.nn.Sequential(*[LinearTanh() for _ in range(4)])
    call = torch.compile(lambda x: model(x).sum(), backend="aot_eager")  # not seen from the model
    if share == "a block":
        for block in model:
            block.compile(backend="aot_eager")
        call = lambda x: model(x).sum()  # noqa: E731
    offload = ActivationOffload(model, tmp_path, min_bytes=0)

    def step():
        with offload:
            call(torch.randn(64, 96)).backward()

    if share == "all":
        with pytest.warns(RuntimeWarning, match=r"one compiled region asked for \d+ of the \d+"):
            step()
    step()  # warnings are errors: it is said once, or not at all
    assert offload._cache.regions.largest_nbytes > 0
    offload.close()
