"""`policy="auto"`: measured, planned, carried out, and the same bits."""

import contextlib
import errno
import types
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dataeff.ledger import Tier
from dataeff.offload import ActivationOffload
from dataeff.offload.auto import AutoPolicy
from dataeff.offload.exclude import Exclusions
from dataeff.offload.passes import Budgets
from dataeff.offload.planner import Action, ModuleProfile, Plan, TierRate
from dataeff.offload.profile import find_blocks
from dataeff.offload.tiers import Tiers
from dataeff.offload.windows import Setting, windowed
from dataeff.storage import FaultPlan

DISK, KEEP = Action.DISK, Action.KEEP


def train(offload, loss, model, gradients, num_steps):
    def step():
        with offload:
            loss().backward()

    return [gradients(model, step) for _ in range(num_steps)]


def test_blocks_are_the_list_with_most_parameters(gpt_and_loss):
    model, _ = gpt_and_loss
    assert list(find_blocks(model)) == ["blocks.0", "blocks.1", "blocks.2"]
    plain = nn.Module()
    plain.a, plain.b = nn.Linear(2, 2), nn.Linear(2, 2)
    assert list(find_blocks(plain)) == ["a", "b"]
    assert find_blocks(plain.a) == {"": plain.a}


def test_an_encoder_and_a_decoder_are_both_planned():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=2, num_heads=4
    )
    found = find_blocks(transformers.T5Model(config))
    encoder, decoder = ([f"{side}.block.{i}" for i in range(4)] for side in ("encoder", "decoder"))
    assert list(found) == encoder[:3] + decoder[:2]
    small = nn.Module()
    small.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
    small.head = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert list(find_blocks(small)) == [f"layers.{i}" for i in range(4)]


@pytest.mark.parametrize("share", [None, 2.0, 0.6, 0.1])
def test_bits_do_not_change_whatever_is_planned(
    gpt_and_loss, gradients, assert_same, tmp_path, share
):
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    keep = ActivationOffload(model, tmp_path, policy=lambda info: False)
    train(keep, loss, model, gradients, 1)
    budget = None if share is None else share * keep.report().peak_saved_bytes
    offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=budget, min_bytes=0)
    assert "No plan yet" in offload.explain()
    for got in train(offload, loss, model, gradients, 18):
        assert_same(got, expected)
    plan = offload.plan
    assert len(plan.actions) == 3 and all(p.saved_bytes > 0 for p in plan.profiles)
    assert all(p.forward_s > 0 and p.backward_s > 0 for p in plan.profiles)
    if share == 2.0:
        assert plan.declines
    if share == 0.6:
        assert not plan.declines and plan.fits
        assert plan.peak_bytes + offload._auto.other_bytes <= budget
    assert "measured since: peak" in offload.explain()
    offload.close()
    assert all("forward" not in vars(block) for block in model.blocks)


@pytest.mark.parametrize(
    ("budget", "given", "expected"),
    [
        (None, Budgets(), (600, 800)),  # what forward has just made comes on top
        (None, Budgets(0, 3000), (0, 3000)),
        (5000, Budgets(100, 3000), (100, 800)),  # the plan has no room for 3000
        (5000, Budgets(3000, 0), (600, 0)),
    ],
)
def test_what_the_user_bounds_is_bounded_and_foreseen(budget, given, expected):
    """Nothing given is not the same as nothing allowed; in and out are two bounds."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    parts = (100, 100, 200, 200, 200)
    profiles = tuple(ModuleProfile(f"{i}", 1.0, 2.0, 800, parts=parts) for i in range(4))
    made = Plan(profiles, (Action.DISK,) * 4, 1600.0, 3200.0, 12.0, 12.0, True)
    rates = {Tier.DISK: TierRate(1e9, 1e9)}
    policy = AutoPolicy(model, None, Exclusions(model), budget, given)
    found = []
    windows = windowed(policy._setting(rates, 0.0), made)
    policy._follow(windows, types.SimpleNamespace(set_budgets=found.append))
    assert found == [Budgets(*expected)]
    assert policy.forecast.prompt_bytes == max(expected[1], 200)
    assert policy.forecast.peak_bytes == max(expected[1], expected[0] + 200, 400)


@pytest.mark.parametrize(("action", "budgets"), [(DISK, Budgets(800, 1600)), (KEEP, Budgets())])
def test_of_two_blocks_of_one_storage_each_one_comes_while_the_other_is_used(action, budgets):
    profiles = tuple(ModuleProfile(f"{i}", 1.0, 2.0, 800, parts=(800,)) for i in range(2))
    made = Plan(profiles, (action,) * 2, 1600.0, 1600.0, 6.0, 6.0, True)
    assert windowed(Setting({DISK: TierRate(1e9, 1e9)}), made).budgets == budgets


def test_evaluation_and_batches_of_other_sizes_are_not_measured(gradients, assert_same, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)])
    batch, last, held_out = torch.randn(512, 64), torch.randn(64, 64), torch.randn(4096, 64)
    offload = ActivationOffload(model, tmp_path, policy="auto", min_bytes=0)

    def step(x):
        with offload:
            model(x).square().mean().backward()

    def evaluate():
        with offload, torch.no_grad():
            model(held_out)

    num_steps = 0
    while offload.plan is None:
        evaluate()  # before each: were it counted, half of what is measured would be nothing
        assert offload.plan is None
        step(batch)
        num_steps += 1
    assert num_steps == 12
    assert all(p.saved_bytes >= 512 * 64 * 4 and p.backward_s > 0 for p in offload.plan.profiles)
    step(last)
    evaluate()
    assert offload.measured is None
    expected = gradients(model, lambda: model(batch).square().mean().backward())
    assert_same(gradients(model, lambda: step(batch)), expected)
    peak = offload.measured.peak_bytes
    assert 0 < peak < 4096 * 64 * 4
    step(torch.randn(1024, 64))
    assert offload.measured.peak_bytes == peak
    assert "median of 1)" in offload.explain()
    assert "not counted: 2 steps with inputs of other sizes" in offload.explain()
    offload.close()


def test_a_plan_is_for_inputs_of_the_usual_size_and_moves_all_of_larger_ones(
    gradients, assert_same, tmp_path
):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)])
    budget = 6 * 512 * 64 * 4  # half of what they save
    offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=budget, min_bytes=0)

    def step(num_rows):
        x = torch.linspace(-1, 1, num_rows * 64).view(num_rows, 64)
        expected = gradients(model, lambda: model(x).square().mean().backward())

        def run():
            with offload:
                model(x).square().mean().backward()

        before = offload.report().bytes_kept
        assert_same(gradients(model, run), expected)
        return offload.report().bytes_kept - before

    sizes = iter((64, 64))  # the steps from which bytes could be told if all were alike
    held = offload._cache.held
    while offload.plan is None:
        held.recent_peak = 0
        step(next(sizes, 512))
        assert held.recent_peak <= budget
    assert sum(p.saved_bytes for p in offload.plan.profiles) >= 1.8 * budget
    assert not offload.plan.declines and offload.plan.fits
    step(512)
    assert offload.measured.peak_bytes <= budget
    with pytest.warns(RuntimeWarning, match="inputs 4 times as large as those") as caught:
        kept = step(2048)
    assert caught[0].filename == __file__
    assert kept == 2048 * 64 * 4  # of the loss, which is no block's
    assert offload._cache.held.recent_peak < 4 * budget
    for _ in range(14):
        step(2048)  # nothing is said a second time
    assert offload.plan is not None
    step(2048)  # if all of them are as large, the plan is to be for these
    assert offload.plan is None
    offload.close()


def test_steps_that_are_large_again_and_again_are_planned_for_a_few_times(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)])
    budget = 6 * 512 * 64 * 4
    offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=budget, min_bytes=0)

    def steps(num_rows, num_steps):
        for _ in range(num_steps):
            with offload:
                model(torch.ones(num_rows, 64)).square().mean().backward()

    steps(512, 18)
    given_up = 0
    with pytest.warns(RuntimeWarning, match="inputs 4 times as large as those"):
        for _ in range(6):
            assert offload.plan is not None
            steps(2048, 16)
            given_up += offload.plan is None
            steps(512, 17)  # of which it is measured and planned anew
    assert given_up == 3
    offload.close()


def test_plan_with_a_hopeless_disk_recomputes(gpt_and_loss, gradients, assert_same, late_streams):
    # A host tier of one page: nothing can go there, so within the budget only recomputing is left.
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    options = {"min_bytes": 0, "streams_of": lambda device: late_streams}
    keep = ActivationOffload(model, host_bytes=4096, policy=lambda info: False, **options)
    train(keep, loss, model, gradients, 1)
    budget = 0.75 * keep.report().peak_saved_bytes
    offload = ActivationOffload(
        model, host_bytes=4096, policy="auto", memory_budget=budget, **options
    )
    with pytest.warns(RuntimeWarning, match="full"):  # while it measures, it tries
        steps = train(offload, loss, model, gradients, 18)
    assert Action.RECOMPUTE in offload.plan.actions
    assert Action.HOST not in offload.plan.actions
    for got in steps:
        assert_same(got, expected)
    assert offload._cache.held.recent_peak < keep.report().peak_saved_bytes
    keep.close()
    offload.close()


def test_what_a_reentrant_checkpoint_saves_again_is_not_planned_as_if_forward_held_it(
    gpt_and_loss, gradients, assert_same, tmp_path
):
    model, loss = gpt_and_loss
    num_runs = 0

    def count(block, args):
        nonlocal num_runs
        num_runs += 1

    def run(tokens):
        x = model.tok(tokens) + model.pos
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return F.cross_entropy(model.head(x).flatten(0, 1), tokens.roll(-1, 1).flatten())

    model.forward = run
    for block in model.blocks:
        block.register_forward_pre_hook(count)
    expected = gradients(model, lambda: loss().backward())
    keep = ActivationOffload(model, tmp_path, policy=lambda info: False, min_bytes=0)
    train(keep, loss, model, gradients, 1)
    held = keep.report().peak_saved_bytes
    offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=2 * held, min_bytes=0)
    num_runs = 0
    for got in train(offload, loss, model, gradients, 20):
        assert_same(got, expected)
    assert num_runs == 20 * 2 * 3  # never a third time
    assert offload.plan.declines and offload.plan.fits, offload.explain()
    # What the head saves, a tenth of it all, is gone before the first block runs again.
    assert 0.85 < offload.measured.peak_bytes / offload.forecast.seen_bytes < 1.05
    assert sum(module.bytes_again for module in offload.report().modules.values()) > 0
    offload.close()


def rounds_of(model, order):
    """A step that calls the model and runs backward in `order`: "fbfb" accumulates gradients."""
    tokens = torch.arange(4 * 64).view(4, 64) * 7 % 64

    def step(offload):
        with offload:
            pending = []
            for what in order:
                if what == "f":
                    pending.append(model(tokens))
                else:
                    pending.pop(0).backward()

    return step


@pytest.mark.parametrize(("order", "num_rounds"), [("fbfb", 2), ("ffbfbb", 1)])
def test_accumulated_gradients_are_planned_for_round_by_round(
    gpt_and_loss, gradients, assert_same, tmp_path, order, num_rounds
):
    """One microbatch is gone before the next: what all of them save need not fit."""
    model, _ = gpt_and_loss
    step = rounds_of(model, order)
    expected = gradients(model, lambda: step(contextlib.nullcontext()))
    keep = ActivationOffload(model, tmp_path, policy=lambda info: False)
    step(keep)
    held = keep.report().peak_saved_bytes
    offload = ActivationOffload(
        model, tmp_path, policy="auto", memory_budget=1.2 * held, min_bytes=0
    )
    for _ in range(19):
        assert_same(gradients(model, lambda: step(offload)), expected)
    if num_rounds == 2:  # the other holds two thirds at once, and is planned as if it held all
        assert offload.plan.declines and offload.plan.fits, offload.explain()
        assert 0.9 < offload.measured.peak_bytes / offload.forecast.seen_bytes < 1.1
    assert ("rounds of a step" in offload.explain()) == (num_rounds > 1)
    whole = num_rounds * sum(profile.saved_bytes for profile in offload.plan.profiles)
    by_module = keep.report().modules.items()
    assert whole == sum(b.bytes_saved for name, b in by_module if name.startswith("blocks"))
    # Neither the profiles nor the rest of the step are of all rounds at once.
    ratio = offload.forecast.step_s / (offload.plan.keep_s * num_rounds)
    assert ratio >= 1, offload.explain()
    offload.close()


def test_the_last_step_that_is_measured_does_not_stand_for_the_others(tmp_path):
    """It may be the last of an epoch, with one microbatch, and one without a penalty."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)])
    x = torch.randn(256, 64, requires_grad=True)
    offload = ActivationOffload(model, tmp_path, policy="auto", min_bytes=0)
    for i in range(12):
        assert offload.plan is None
        with offload:
            for _ in range(1 if i == 11 else 2):
                model(x).square().mean().backward()
            if i % 2 == 0:
                out = model(x)
                (slope,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
                slope.square().mean().backward()
                del out, slope
    assert "so much in each of 3 rounds" in offload.explain()
    assert "saved by backward itself" in offload.explain()
    offload.close()


def test_a_model_of_which_more_is_trained_later_is_planned_anew(gradients, assert_same, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8)])
    x, budget = torch.randn(512, 64), 8 * 512 * 64 * 4  # half of what all blocks save
    offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=budget, min_bytes=0)

    def steps(num_steps):
        expected = gradients(model, lambda: model(x).square().mean().backward())
        for got in train(offload, lambda: model(x).square().mean(), model, gradients, num_steps):
            assert_same(got, expected)

    model[:7].requires_grad_(False)
    steps(19)
    assert offload.plan.declines
    assert sum(p.forward_s + p.backward_s for p in offload.plan.profiles) < 60  # all is a number
    model.requires_grad_(True)
    with pytest.warns(RuntimeWarning, match="measured and planned anew") as caught:
        steps(1)
    assert caught[0].filename == __file__
    assert offload.plan is None
    steps(17)
    assert not offload.plan.declines and offload.plan.fits
    assert offload.measured.peak_bytes <= budget
    offload.close()


def test_a_plan_that_fits_when_played_is_not_said_to_exceed(tmp_path):
    """The planner counts all of a block's working set beside what lies outside of the blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)])

    def loss():
        return model(torch.ones(512, 64)).square().mean()

    def planned(budget):
        offload = ActivationOffload(
            model, tmp_path, policy="auto", memory_budget=budget, min_bytes=0
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(18):
                with offload:
                    loss().backward()
        offload.close()
        return offload, [w for w in said if "no plan keeps" in str(w.message)]

    offload, said = planned(1)
    assert said and not offload.plan.fits
    enough = offload.forecast.peak_bytes
    assert enough == offload.plan.peak_bytes + offload._auto.other_bytes
    offload, said = planned(1.01 * enough)
    assert not said and offload.plan.fits


def test_budget_and_explain_belong_to_auto(tmp_path):
    with pytest.raises(ValueError, match="policy='auto' only"):
        ActivationOffload(nn.Linear(2, 2), tmp_path, memory_budget=1e9)
    with pytest.raises(RuntimeError, match="policy='auto'"):
        ActivationOffload(nn.Linear(2, 2), tmp_path).explain()


def test_measured_rates_are_of_the_tiers_there_are(tmp_path, late_streams):
    offload = ActivationOffload(nn.Linear(2, 2), tmp_path, host_bytes=1 << 20)
    rates = offload._cache._tiers.measure(torch.device("cpu"))
    assert [tier.value for tier in rates] == ["disk"]  # host memory is no tier for host tensors
    assert all(rate.write > 0 and rate.read > 0 for rate in rates.values())
    assert offload._cache._tiers._spills.files[0].used_nbytes == 0


def test_a_bus_is_rated_by_the_device_s_clock(tmp_path):
    """Not by the host's, nor by the first copy or one that something else disturbed."""
    ms, num = 1_000_000, {"out": 0, "in": 0}

    class Stamped:
        def copy(self, way, usual_ms):
            num[way] += 1
            took = 100 * ms if num[way] in (1, 3) else usual_ms * ms
            return types.SimpleNamespace(
                query=lambda: True, synchronize=lambda: None, span=lambda: (5 * ms, 5 * ms + took)
            )

        def copy_out(self, source, target):
            return self.copy("out", 2)

        def copy_in(self, source, target):
            return self.copy("in", 4)

        def pin(self, buffer):
            pass

        unpin = reuse_after = pin

    tiers = Tiers(None, 1 << 20, 1 << 20, False, lambda device: Stamped())
    rate = tiers.measure(torch.device("cpu"))[Tier.HOST]
    assert rate.write == pytest.approx((1 << 20) / 2e-3)
    assert rate.read == pytest.approx((1 << 20) / 4e-3)
    tiers.close()


def test_a_device_without_memory_to_measure_with_is_no_error(tmp_path, late_streams, monkeypatch):
    def scarce(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    offload = ActivationOffload(
        nn.Linear(2, 2), tmp_path, host_bytes=1 << 20, streams_of=lambda device: late_streams
    )
    assert len(offload._tiers.measure(torch.device("cpu"))) == 2
    monkeypatch.setattr(torch, "ones", scarce)
    assert list(offload._tiers.measure(torch.device("cpu"))) == [Tier.DISK]
    offload.close()


@pytest.mark.filterwarnings("ignore:activation offload")
@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({"spill_bytes": 1 << 20}, True),
        ({"spill_bytes": 1 << 19}, False),
        ({"faults": FaultPlan().add("write", error=errno.EIO)}, False),
        ({"faults": FaultPlan().add("reserve", error=errno.ENOSPC)}, False),
        ({"endurance_tbw": 1e-6}, False),
    ],
    ids=["small", "too small to measure", "failing", "full", "worn"],
)
def test_a_disk_that_takes_little_or_nothing_is_planned_with_as_it_is(
    gradients, assert_same, tmp_path, options, moves
):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(6)])
    x = torch.randn(512, 128)
    expected = gradients(model, lambda: model(x).square().mean().backward())
    offload = ActivationOffload(
        model, tmp_path, policy="auto", memory_budget=1 << 20, min_bytes=0, **options
    )
    for got in train(offload, lambda: model(x).square().mean(), model, gradients, 18):
        assert_same(got, expected)
    profiles, actions = offload.plan.profiles, offload.plan.actions
    moved = [p.moved_bytes for p, a in zip(profiles, actions, strict=True) if a is Action.DISK]
    assert sum(moved) <= (1 << 20 if moves else 0)  # a slow disk takes none: blocks run again
    offload._cache.drain()
    assert (Tier.DISK in offload._tiers.measure(x.device)) == moves
    offload.close()


class Cache:
    def __init__(self):
        self.values = []


class Adding(nn.Module):
    """A block that adds to what it is called with, as attention does to a cache."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x, cache):
        values = cache.values if isinstance(cache, Cache) else cache
        values.append(self.linear(x).tanh())
        return x + torch.stack(list(values)).sum(0)


class Caching(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.blocks = kind, nn.ModuleList(Adding() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x, cache := self.kind())
            x = x + (cache.values if isinstance(cache, Cache) else cache)[-1]
        return x.square().mean()


@pytest.mark.parametrize("kind", [list, Cache])
def test_blocks_that_change_their_arguments_are_not_recomputed(
    gradients, assert_same, tmp_path, kind
):
    torch.manual_seed(0)
    model, x = Caching(kind), torch.randn(128, 64)
    expected = gradients(model, lambda: model(x).backward())
    with pytest.warns(RuntimeWarning, match=f"4 of 4 blocks.*: a {kind.__name__} that"):
        offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=1, min_bytes=0)
        for got in train(offload, lambda: model(x), model, gradients, 18):
            assert_same(got, expected)
    assert offload.plan is not None and Action.RECOMPUTE not in offload.plan.actions
    offload.close()


@pytest.mark.parametrize(
    "kind",
    [
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        lambda x: torch.nested.nested_tensor(list(x.split(100))),
        lambda x: x.unflatten(0, (1, -1)).mT.conj(),
        lambda x: x[:0],
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:activation offload. no plan keeps:RuntimeWarning")
def test_blocks_may_be_called_with_tensors_of_all_kinds(gradients, assert_same, tmp_path, kind):
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x, other):
            return x + self.linear(x).tanh()

    torch.manual_seed(0)
    model, x = nn.ModuleList(Beside() for _ in range(4)), torch.randn(256, 64)
    other = kind(x)

    def loss():
        y = x
        for block in model:
            y = block(y, other)
        return y.square().mean()

    expected = gradients(model, lambda: loss().backward())
    offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=1, min_bytes=0)
    for got in train(offload, loss, model, gradients, 18):
        assert_same(got, expected)
    offload.close()


@pytest.mark.filterwarnings("ignore:activation offload. no backward was measured:RuntimeWarning")
def test_blocks_inside_a_transform_are_not_recomputed(gradients, assert_same, tmp_path):
    torch.manual_seed(0)
    model, x = chain()

    def loss():
        y = x
        for block in model:
            y = torch.func.vmap(block)(y).tanh()
        return y.square().mean()

    expected = gradients(model, lambda: loss().backward())
    with pytest.warns(RuntimeWarning, match=r"4 of 4 blocks.* inside a transform of torch\.func"):
        offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=1, min_bytes=0)
        for got in train(offload, loss, model, gradients, 18):
            assert_same(got, expected)
    assert Action.RECOMPUTE not in offload.plan.actions
    offload.close()


def chain():
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]), torch.randn(256, 64)


def test_a_model_that_learns_its_sizes_from_the_first_step(tmp_path):
    model = nn.Sequential(*[nn.LazyLinear(64) for _ in range(4)])
    offload = ActivationOffload(model, tmp_path, policy="auto", min_bytes=0)
    for _ in range(13):
        with offload:
            model(torch.ones(256, 32)).tanh().sum().backward()
    assert len(offload.plan.profiles) == 4
    offload.close()


def test_steps_in_which_no_block_runs_are_not_measured(tmp_path):
    """Lightning tells of each batch, also of one that a `training_step` passes over."""
    model, x = chain()
    offload = ActivationOffload(model, tmp_path, policy="auto", min_bytes=0)
    for i in range(16):
        with offload:
            offload.expect_forward(x)
            if i % 2:
                model(x).sum().backward()
    assert "8 are done" in offload.explain()
    offload.close()


@pytest.mark.parametrize(
    ("budget", "inside", "said"),
    [(1, True, "no plan keeps within memory_budget=1 "), (None, False, "no backward was measured")],
)
def test_a_plan_that_cannot_be_right_is_said(tmp_path, budget, inside, said):
    model, x = chain()
    offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=budget, min_bytes=0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(18):
            with offload:
                loss = model(x).sum()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
    offload.close()
    assert [w.filename for w in warned if said in str(w.message)] == [__file__] and len(warned) == 1


class Reading(nn.Module):
    """Four blocks; what the third adds to a list the second has read by then, and has not."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        for place, forward in ((1, self.read), (2, self.add)):
            self.blocks[place].forward = types.MethodType(forward, self.blocks[place])

    @staticmethod
    def read(block, x, seen):
        return F.linear(x + len(seen), block.weight, block.bias).tanh()

    @staticmethod
    def add(block, x, seen):
        seen.append(x.detach())
        return F.linear(x, block.weight, block.bias).tanh()

    def forward(self, x):
        first, second, third, fourth = self.blocks
        seen = []
        x = third(second(first(x), seen), seen)
        return fourth(x).square().mean()


def test_one_block_that_changes_its_arguments_leaves_the_others_to_be_recomputed(
    gradients, assert_same, tmp_path
):
    torch.manual_seed(0)
    model, x = Reading(), torch.randn(4096, 64)
    expected = gradients(model, lambda: model(x).backward())
    with pytest.warns(RuntimeWarning, match="2 of 4 blocks are not recomputed, blocks.1 for one"):
        offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=1, min_bytes=0)
        for got in train(offload, lambda: model(x), model, gradients, 18):
            assert_same(got, expected)
    profiles = offload.plan.profiles
    assert [p.input_bytes is not None for p in profiles] == [True, False, False, True]
    assert all(p.forward_s > 0 and p.backward_s > 0 for p in profiles)
    # Recomputed in the steps that measured it; so were the two.
    tried = [trial for trial in offload._auto._trials if Action.RECOMPUTE in trial.values()]
    assert tried
    assert all(trial["blocks.1"] is not Action.RECOMPUTE for trial in tried)
    assert all(trial["blocks.2"] is not Action.RECOMPUTE for trial in tried)
    offload.close()


def test_an_encoder_and_a_decoder_under_a_budget(gradients, assert_same, tmp_path):
    """Its decoder blocks add to a cache of keys and values; its encoder blocks can run again."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=2, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    tokens = torch.arange(4 * 64).view(4, 64) * 7 % 64
    loss = lambda: model(input_ids=tokens, labels=tokens, use_cache=True).loss  # noqa: E731
    expected = gradients(model, lambda: loss().backward())
    with pytest.warns(RuntimeWarning, match="2 of 5 blocks are not recomputed, decoder"):
        offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=1, min_bytes=0)
        for got in train(offload, loss, model, gradients, 18):
            assert_same(got, expected)
    assert [p.input_bytes is not None for p in offload.plan.profiles] == 3 * [True] + 2 * [False]
    offload.close()


class Normed(nn.Module):
    """Statistics that every forward moves on, and an input that the next block changes."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(inplace=True), nn.Linear(64, 64)]
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def test_statistics_move_on_once_a_step_and_inputs_may_be_changed(gradients, assert_same, tmp_path):
    def states(around):
        torch.manual_seed(0)
        model, x = Normed(), torch.randn(256, 64)
        found = []
        with around(model) as step:
            for _ in range(18):
                found += gradients(model, lambda: step(model, x))
                found += [buffer.clone() for buffer in model.buffers()]
        return found

    @contextlib.contextmanager
    def plain(model):
        yield lambda model, x: model(x).backward()

    @contextlib.contextmanager
    def offloaded(model):
        offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=1, min_bytes=0)

        def step(model, x):
            with offload:
                model(x).backward()

        yield step
        again = [a is Action.RECOMPUTE for a in offload.plan.actions]
        # Statistics would move on twice, and the input of ReLU is not there any more.
        assert not again[1] and not again[2]
        offload.close()

    expected = states(plain)
    with pytest.warns(RuntimeWarning, match="2 of 4 blocks are not recomputed, blocks.1 for one"):
        assert_same(states(offloaded), expected)


def test_a_model_of_one_module_is_planned_as_a_whole(gradients, assert_same, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Linear(256, 256), torch.randn(256, 256)
    loss = lambda: model(x).exp().mean()  # noqa: E731
    expected = gradients(model, lambda: loss().backward())
    offload = ActivationOffload(model, tmp_path, policy="auto", min_bytes=0)
    for got in train(offload, loss, model, gradients, 18):
        assert_same(got, expected)
    assert [profile.name for profile in offload.plan.profiles] == [""]
    offload.close()


def test_a_device_s_steps_are_timed_by_its_clock_and_its_peak_is_of_its_own_memory(
    gpt_and_loss, gradients, late_streams
):
    class Reached:  # the device is ten seconds further at each look; the host takes milliseconds
        def __init__(self, ns):
            self.ns = lambda: ns

    moments = iter(range(10**9))
    late_streams.moment = lambda: Reached(next(moments) * 10**10)
    model, loss = gpt_and_loss
    options = {"min_bytes": 0, "streams_of": lambda device: late_streams}
    offload = ActivationOffload(model, host_bytes=1 << 26, policy="auto", **options)
    train(offload, loss, model, gradients, 12)
    offload._auto.plan = replace(offload.plan, actions=[Action.HOST] * 3)
    train(offload, loss, model, gradients, 1)
    assert offload.measured.step_s >= 10
    report = offload.report()
    assert report.peak_host_bytes > 0
    assert offload.measured.peak_bytes <= report.peak_held_bytes
    offload.close()


@pytest.mark.parametrize(("num_blocks", "share"), [(6, 0.5), (6, 0.75), (16, 0.3)])
def test_what_keeping_takes_is_measured_wherever_a_block_has_room(tmp_path, num_blocks, share):
    """Beside the inputs of the others, and one that backward has run again."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x):
            return x + self.down(F.gelu(self.up(x)))

    model, x = nn.Sequential(*[Block() for _ in range(num_blocks)]), torch.ones(256, 64)
    nbytes, width = (1 + 4 + 4), 256 * 64 * 4  # of a block: what the three operations save
    budget = share * num_blocks * nbytes * width
    offload = ActivationOffload(model, tmp_path, policy="auto", memory_budget=budget, min_bytes=0)
    kept = []
    while offload.plan is None:
        with offload:
            model(x).square().mean().backward()
            trial = offload._auto._trial or {}
        kept.append(sum(action is Action.KEEP for action in trial.values()))
    offload.close()
    # An input is a tenth of a block: one that is kept takes nine.
    assert max(kept) >= 1
    assert (max(kept) * nbytes + num_blocks + nbytes) * width <= budget
