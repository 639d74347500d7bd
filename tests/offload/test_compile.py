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


def compile_blocks(model, in_place):
    for i, block in enumerate(model.blocks):
        if in_place:
            block.compile(backend="aot_eager", fullgraph=True)
        else:
            model.blocks[i] = torch.compile(block, backend="aot_eager", fullgraph=True)


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
    compile_blocks(model, in_place)
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
    offload = ActivationOffload(whole, tmp_path, min_bytes=0)
    with pytest.warns(RuntimeWarning, match="blocks of the model one by one"):
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


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_block_is_named_and_chosen_by_its_name(gpt_and_loss, tmp_path, in_place):
    model, loss = gpt_and_loss
    compile_blocks(model, in_place)
    with pytest.raises(ValueError, match=r"'blocks\.1\.up' lies in a module that is compiled"):
        ActivationOffload(model, tmp_path, policy=["blocks.1.up"])
    offload = ActivationOffload(model, tmp_path, policy=["blocks.1"], min_bytes=0)
    for _ in range(2):  # warnings are errors: all that moves is one region's, as it should be
        with offload:
            loss().backward()
    modules = offload.report().modules
    assert {name for name, account in modules.items() if account.bytes_stored} == {"blocks.1"}
    assert modules["blocks.0"].bytes_saved == modules["blocks.1"].bytes_saved > 1 << 19
    offload.close()


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_blocks_are_planned_for(gpt_and_loss, tmp_path, gradients, assert_same, in_place):
    model, loss = gpt_and_loss
    compile_blocks(model, in_place)
    expected = gradients(model, lambda: loss().backward())
    offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=1 << 20, min_bytes=0)

    def step():
        with offload, torch.compiler.set_stance("fail_on_recompile"):
            loss().backward()

    for _ in range(18):
        got = gradients(model, step)
    assert_same(got, expected)
    assert [profile.saved_bytes > 1 << 19 for profile in offload.plan.profiles] == [True] * 3
    assert Action.KEEP not in offload.plan.actions[:2]  # three of them do not fit
    assert offload.measured.peak_bytes < 3 * offload.plan.profiles[0].saved_bytes
    offload.close()


def test_a_model_that_something_compiles_around_it_is_moved_as_it_is(
    gpt_and_loss, tmp_path, gradients, assert_same
):
    """A trainer does: nothing of an offload may be compiled with it, and cut its graph."""
    model, _ = gpt_and_loss
    tokens = torch.arange(4 * 64).view(4, 64) * 7 % 64
    graphs = []

    def backend(graph, inputs):
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph

    call = torch.compile(model, backend=backend)
    expected = gradients(model, lambda: call(tokens).backward())
    offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=1 << 20, min_bytes=0)

    def step():
        with offload:
            call(tokens).backward()

    got = [gradients(model, step) for _ in range(2)]
    with pytest.warns(RuntimeWarning, match=r"by its 3 blocks, blocks\.0 for one.*one by one"):
        got.append(gradients(model, step))
    for these in got:
        assert_same(these, expected)
    assert set(graphs) == {graphs[0]}  # compiled anew, perhaps, but whole
    assert "All is moved" in offload.explain() and offload.plan is None
    offload.close()


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@pytest.mark.parametrize("whole", ["module", "function", "in place"])
@pytest.mark.parametrize("policy", [["blocks.1"], lambda info: info.scope.startswith("blocks.1")])
def test_a_policy_by_names_that_finds_none_in_a_compiled_whole_is_told(
    gpt_and_loss, tmp_path, gradients, assert_same, policy, whole, backend
):
    model, _ = gpt_and_loss
    tokens = torch.arange(4 * 64).view(4, 64) * 7 % 64
    offload = ActivationOffload(model, tmp_path, policy=policy, min_bytes=0)
    if whole == "in place":
        model.compile(backend=backend)
    compiled = {
        "module": lambda: torch.compile(model, backend=backend),
        "function": lambda: torch.compile(lambda tokens: model(tokens), backend=backend),
        "in place": lambda: model,
    }[whole]()
    expected = gradients(model, lambda: compiled(tokens).backward())
    for _ in range(4):  # of which the last are not looked at
        with offload:
            got = gradients(model, lambda: compiled(tokens).backward())
        assert_same(got, expected)
        reason = offload.report().reason
        assert "compiled as a whole" in reason and "block.compile()" in reason, reason
    assert offload.report().bytes_offloaded == 0
    offload.close()


def test_a_policy_that_keeps_what_lies_beside_compiled_blocks_is_not_told_so(
    gpt_and_loss, tmp_path
):
    model, loss = gpt_and_loss
    compile_blocks(model, in_place=True)
    offload = ActivationOffload(model, tmp_path, policy=lambda info: False, min_bytes=0)
    with offload:
        loss().backward()
    assert "the policy keeps them" in offload.report().reason
    offload.close()
