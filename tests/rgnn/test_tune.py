import errno
import io
import json
import sys
from dataclasses import replace

import pytest
import torch
from rgnn_layers import rgat, rgcn_mean

from dataeff import rgnn
from dataeff.nn import RGCNConv, rgcn_conv
from dataeff.rgnn.layer import choice_key
from dataeff.rgnn.plan import watched_plans
from dataeff.rgnn.profile import statistics_of
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.triton.tiles import GemmSchedule

tuning = sys.modules["dataeff.rgnn.tune"]  # the function hides the module of its name


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DATAEFF_CACHE_DIR", str(tmp_path))
    for layer in (rgat, rgcn_mean):
        monkeypatch.setattr(layer, "choices", {})


@pytest.fixture
def args():
    W, a = torch.randn(4, 8, 6), torch.randn(2, 4, 6)
    return torch.randn(20, 8), W, a[0], a[1]


def slow_unless(wanted):
    """A clock by which one choice is fast: what is measured decides, not what it takes here."""

    def time(choice, step):
        return 0.001 if wanted(choice) else 1.0

    return time


def test_the_chosen_schedule_is_used_and_found_again(small, args):
    before = rgat(small, *args)
    wanted = Choice(("reorder",), parts_per_thread=64)
    timer = slow_unless(lambda c: "reorder" in c.disabled and c.parts_per_thread == 64)

    def timed(choice, step):  # passes without a gain of their own are as fast as any
        return timer(choice, step) - 0.1 * ("reorder" in choice.disabled)

    found = rgnn.tune(rgat, small, *args, candidates=8, timer=timed)
    assert not found.cached and found.choice.parts_per_thread == 64
    assert "reorder" in found.choice.disabled and found.candidates[0].measured_s < 0.001
    with watched_plans() as plans:
        after = rgat(small, *args)
    (plan,) = plans
    assert plan.request.choice == Choice(parts_per_thread=wanted.parts_per_thread)
    assert "reorder" in plan.request.disabled
    assert not any(op.kind == "einsum" for op in plan.compiled.forward.ops)
    assert plan.compiled.forward_runner._compiled  # it ran there
    torch.testing.assert_close(after, before)

    def never(choice, step):
        raise AssertionError("a kept result was measured again")

    rgat.choices.clear()
    again = rgnn.tune(rgat, small, *args, timer=never)
    assert again.cached and again.choice == found.choice and again.candidates == found.candidates
    assert rgat.choices
    with pytest.raises(AssertionError, match="measured again"):
        rgnn.tune(rgat, small, *args, refresh=True, timer=never)


def test_measuring_runs_forward_and_backward(small, args):
    found = rgnn.tune(rgat, small, *args, candidates=2)
    times = [c.measured_s for c in found.candidates if c.measured_s is not None]
    assert len(times) == 2 + len(tuning.PARTS_PER_THREAD) - 1 and times == sorted(times)
    assert found.choice == found.candidates[0].choice
    x = args[0].clone().requires_grad_()
    rgat(small, x, *args[1:]).sum().backward()
    assert x.grad.any()


def test_the_cost_model_alone_then_measured(small, args):
    found = rgnn.tune(rgat, small, *args, measure=False)
    assert all(c.measured_s is None for c in found.candidates)
    modelled = [c.modelled_s for c in found.candidates]
    assert modelled == sorted(modelled) and modelled[0] < modelled[-1]
    assert rgnn.tune(rgat, small, *args, measure=False).cached
    assert not rgnn.tune(rgat, small, *args, candidates=1).cached
    assert rgnn.tune(rgat, small, *args, measure=False).cached


def test_other_sizes_and_dtypes_are_not_affected(small, args):
    timer = slow_unless(lambda c: c.parts_per_thread == 4)
    rgnn.tune(rgat, small, *args, candidates=1, timer=timer)
    larger = rgnn.Graph(torch.randint(0, 90, (2, 400)), torch.arange(400) % 4, num_nodes=90)
    with watched_plans() as plans:
        rgat(small, *args)
        rgat(larger, torch.randn(90, 8), *args[1:])
        rgat(small, *(a.double() for a in args))
    assert [p.request.choice.parts_per_thread for p in plans] == [4, 16, 16]


def test_other_widths_are_not_affected(small, args):
    timer = slow_unless(lambda c: c.parts_per_thread == 4)
    rgnn.tune(rgat, small, *args, candidates=1, timer=timer)
    x, _, *a = args
    with watched_plans() as plans:
        rgat(small, *args)
        rgat(small, x, torch.randn(4, 8, 3), *(each[:, :3] for each in a))
    assert [p.request.choice.parts_per_thread for p in plans] == [4, 16]


class Two(torch.nn.Module):
    """Two layers of one width, and a last one of another."""

    def __init__(self):
        super().__init__()
        self.convs = torch.nn.ModuleList(RGCNConv(8, width, 4) for width in (8, 8, 3))

    def forward(self, x, edge_index, edge_type):
        for conv in self.convs:
            x = conv(x, edge_index, edge_type).relu()
        return x


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_has_each_of_its_layers_tuned(small, compiled, monkeypatch):
    monkeypatch.setattr(rgcn_conv.rgcn, "choices", {})
    model, x = Two(), torch.randn(20, 8)
    called = torch.compile(model) if compiled else model
    timer = slow_unless(lambda c: c.parts_per_thread == 4)
    found = rgnn.tune(called, x, small.edge_index, small.edge_type, candidates=1, timer=timer)
    assert [each.choice.parts_per_thread for each in found] == [4, 4]
    assert not any(each.cached for each in found)
    with watched_plans() as plans:
        model(x, small.edge_index, edge_type=small.edge_type)
    assert [p.request.choice.parts_per_thread for p in plans] == [4, 4, 4]
    again = rgnn.tune(model, x, small.edge_index, edge_type=small.edge_type)
    assert [each.cached for each in again] == [True, True]


def test_a_model_without_compiled_layers_is_refused():
    with pytest.raises(ValueError, match=r"Linear called no compiled layer: dataeff\.nn\.convert"):
        rgnn.tune(torch.nn.Linear(8, 8), torch.randn(20, 8))


def test_a_graph_of_more_relations_is_tuned_anew(small, args):
    timer = slow_unless(lambda c: c.parts_per_thread == 4)
    rgnn.tune(rgat, small, *args, candidates=1, timer=timer)
    same_rows = {"num_nodes": 20, "num_relations": 300}
    many = rgnn.Graph(small.edge_index, small.edge_type, **same_rows)
    args = [args[0], *(torch.randn(300, *a.shape[1:]) for a in args[1:])]
    with watched_plans() as plans:
        rgat(many, *args)
    assert [p.request.choice.parts_per_thread for p in plans] == [16]
    assert not rgnn.tune(rgat, many, *args, candidates=1).cached


def test_a_terminal_sees_how_far_it_is(small, args, monkeypatch):
    rich_console = pytest.importorskip("rich.console")
    plain = rich_console.Console
    screen = io.StringIO()
    monkeypatch.setattr(
        rich_console, "Console", lambda **_: plain(file=screen, force_terminal=True, width=80)
    )
    rgnn.tune(rgat, small, *args, candidates=2)
    assert "tuning rgat" in screen.getvalue() and "100%" in screen.getvalue()
    screen.truncate(0)
    rgnn.tune(rgat, small, *args, candidates=2, refresh=True, progress=False)
    assert not screen.getvalue().strip("\0")


def test_interrupting_leaves_nothing_behind(small, args, tmp_path):
    def interrupt(choice, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rgnn.tune(rgat, small, *args, timer=interrupt)
    assert not rgat.choices and not list(tmp_path.glob("tune/*"))
    rgat(small, *args)


@pytest.mark.parametrize("text", ["", "{", json.dumps({"measured": True, "candidates": [{}]})])
def test_a_damaged_file_is_made_again(small, args, text):
    found = rgnn.tune(rgat, small, *args, measure=False)
    found.path.write_text(text)
    again = rgnn.tune(rgat, small, *args, measure=False)
    assert not again.cached and again.choice == found.choice


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"parts_per_thread": 16', '"parts_per_thread": 0'),
        ('"measured":', '"measures":'),
        ('{\n  "measured"', '[{\n  "measured"'),
    ],
)
def test_a_file_with_another_byte_is_made_again(small, args, old, new):
    found = rgnn.tune(rgat, small, *args, measure=False)
    text = found.path.read_text()
    assert old in text
    found.path.write_text(text.replace(old, new) + "]" * new.startswith("["))
    assert not rgnn.tune(rgat, small, *args, measure=False).cached
    assert rgnn.tune(rgat, small, *args, measure=False).cached


def test_a_full_disk_leaves_the_choice(small, args, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as patched:
        patched.setattr(tuning.os, "replace", full)
        with pytest.warns(RuntimeWarning, match=r"\.json was not written .*No space left"):
            found = rgnn.tune(rgat, small, *args, measure=False)
    assert rgat.choices and not found.cached
    assert not list((tmp_path / "tune").iterdir())
    assert not rgnn.tune(rgat, small, *args, measure=False).cached


def test_a_folder_that_cannot_be_made_leaves_the_choice(small, args, tmp_path):
    (tmp_path / "tune").write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="holds for this process only"):
        rgnn.tune(rgat, small, *args, measure=False)
    assert rgat.choices


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory")


def out_of_shared_memory():
    errors = pytest.importorskip("triton.runtime.errors")
    return errors.OutOfResources(300_000, 232_448, "shared memory")


@pytest.mark.parametrize("too_large", [out_of_memory, out_of_shared_memory])
def test_a_choice_that_does_not_fit_the_device_is_passed_over(small, args, too_large):
    def timer(choice, step):
        if choice.parts_per_thread == 4 or "compact" in choice.disabled:
            raise too_large()
        return 1.0 - 0.1 * (choice.parts_per_thread == 64)

    found = rgnn.tune(rgat, small, *args, candidates=32, timer=timer)
    assert found.choice.parts_per_thread == 64 and "compact" not in found.choice.disabled
    unmeasured = [c.choice for c in found.candidates if c.measured_s is None]
    assert any(c.parts_per_thread == 4 for c in unmeasured)
    assert any("compact" in c.disabled for c in unmeasured)
    rgat.choices.clear()
    assert rgnn.tune(rgat, small, *args, timer=timer).choice == found.choice


def test_when_nothing_fits_the_reason_is_raised(small, args, tmp_path):
    def timer(choice, step):
        raise out_of_memory()

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        rgnn.tune(rgat, small, *args, timer=timer)
    assert not rgat.choices and not list(tmp_path.glob("tune/*"))


def test_bad_arguments(small, args):
    with pytest.raises(ValueError, match="candidates is 0"):
        rgnn.tune(rgat, small, *args, candidates=0)
    with pytest.raises(TypeError, match="misses argument"):
        rgnn.tune(rgat, small, args[0])
    with pytest.raises(TypeError, match=r"rgnn\.layer or a torch\.nn\.Module, got function"):
        rgnn.tune(rgat.function, small, *args)


@pytest.fixture
def interpreted(monkeypatch):
    """Layers run on the GPU's kernels in Triton's interpreter."""
    pytest.importorskip("triton")
    from dataeff.kernels import interpreter, typed_gemm

    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", "triton")
    with interpreter.interpreted(typed_gemm):
        yield


def test_sizes_of_generated_triton(small, args, interpreted):
    W, width = torch.randn(4, 8, 64), 64
    wide = (args[0], W, torch.randn(4, width), torch.randn(4, width))
    timer = slow_unless(lambda c: c.block_elements == 1024 and c.num_warps == 2)
    found = rgnn.tune(rgat, small, *wide, candidates=3, timer=timer)
    assert found.choice.block_elements == 1024
    text = rgat.plan(small, *wide).compiled.forward_runner.sources()
    assert "[4, 4, 64]" in text  # 1024 elements, 64 a row: four inner rows of four center rows
    rgat.choices.clear()
    usual = rgat.plan(small, *wide).compiled.forward_runner.sources()
    assert "range(first, last, 16)" not in usual


def test_tiles_are_searched_kept_and_shown(interpreted, monkeypatch):
    """Kind after kind, each with what was fastest before it; every choice gives the same values."""
    monkeypatch.setattr(tuning, "LONG_ROWS", (0, 1))
    monkeypatch.setattr(tuning, "HUBS", (1, 2))
    small = rgnn.Graph(
        torch.tensor([[0, 1, 2, 0, 1], [1, 2, 0, 0, 1]]), torch.arange(5) % 2, num_nodes=3
    )
    leaves = torch.randn(3, 20), torch.randn(2, 20, 40), torch.randn(2, 40), torch.randn(2, 40)
    order, values = [], []

    def timer(choice, step):
        rgat.choices[choice_key(small, statistics_of(small.sizes), leaves)] = choice
        inputs = [t.clone().requires_grad_() for t in leaves]
        y = rgat(small, *inputs)
        values.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
        order.append(choice)
        return 1.0 / len(order)  # each is faster than those before

    found = rgnn.tune(rgat, small, *leaves, candidates=2, timer=timer)
    assert found.choice == order[-1] == found.candidates[0].choice
    kinds = ("block_elements", "num_warps", "long_row", "hub", "long_stages", "product", "gradient")
    assert all(getattr(found.choice, kind) != getattr(Choice(), kind) for kind in kinds[2:])
    products = {c.product for c in order} - {None}
    gradients = {c.gradient for c in order} - {None}
    assert len(order) == 14 and len(products) == len(gradients) == 2
    for other in values[1:]:
        for a, b in zip(values[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    shown = rgat.explain(small, *leaves)
    assert f"tile {found.choice.product}; modelled" in shown
    assert f"tile {found.choice.gradient}; modelled" in shown
    assert f"rows of more than {found.choice.long_row}" in shown
    assert "_hub0, k" in shown
    rgat.choices.clear()
    assert str(found.choice.product) not in rgat.explain(small, *leaves)
    again = rgnn.tune(rgat, small, *leaves)
    assert again.cached and again.candidates == found.candidates
    with watched_plans() as plans:
        rgat(small, *leaves)
    assert plans[0].request.choice == replace(found.choice, disabled=())


def test_degrees_of_hubs_are_searched_where_there_are_some(interpreted, small, monkeypatch):
    args = torch.randn(20, 8), torch.randn(4, 8, 8), torch.randn(4, 8), torch.randn(4, 8)
    tried = []

    def timer(choice, step):
        tried.append(choice.hub)
        return 1.0

    rgnn.tune(rgat, small, *args, candidates=2, timer=timer)
    assert set(tried) == {Choice().hub}
    monkeypatch.setattr(tuning, "HUBS", (2, 4))
    rgnn.tune(rgat, small, *args, candidates=2, timer=timer, refresh=True)
    assert set(tried) == {Choice().hub, 2, 4}


def test_sizes_round_trip_and_those_of_other_fields_are_refused(small, args):
    """A file of an older choice is tuned anew: it does not have them all."""
    choice = Choice(("compact",), hub=512, long_stages=2, product=GemmSchedule(16, 16, 16, 4, 3))
    assert Choice.of(choice.disabled, json.loads(json.dumps(choice.sizes))) == choice
    with pytest.raises(ValueError, match="a choice has 8 sizes, got 7"):
        Choice.of((), choice.sizes[:-1])
    found = rgnn.tune(rgat, small, *args, timer=lambda choice, step: 1.0)
    kept = json.loads(found.path.read_text())
    for candidate in kept["candidates"]:
        del candidate["choice"]["hub"]
    del kept["digest"]
    kept["digest"] = tuning._digest(kept)
    found.path.write_text(json.dumps(kept))
    assert not rgnn.tune(rgat, small, *args, timer=lambda choice, step: 1.0).cached
    assert rgnn.tune(rgat, small, *args).cached
