"""The offload's benchmarks at sizes of no interest but correctness."""

import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch

from dataeff.bench import Case, Options, Provider, Unavailable, run_case
from dataeff.bench.offload import cases, planned, rok, ssdtrain, training
from dataeff.bench.offload.model import Shape, Transformer
from dataeff.bench.record import Run

CPU = torch.device("cpu")
TINY = Shape(2, 64, 2, 64)


@pytest.fixture(autouse=True)
def one_thread():
    """Operations of this size wait for their threads, most of all on a loaded machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def options(tmp_path):
    return Options(quick=True, device=CPU, directory=tmp_path)


def measured(case, options):
    records = run_case("offload", case, options, Run.here(CPU))
    return {(record.provider, record.metric): record for record in records}


def case_of(options, *providers, shape=TINY):
    inputs = partial(training.make_inputs, shape, options)
    return Case(size=f"rok: {shape}", inputs=inputs, providers=providers)


def test_disk_holds_less_and_its_weights_are_the_same_after_twenty_steps(options, tmp_path):
    small = partial(training.disk, min_bytes=0, directories=2)
    found = measured(
        case_of(
            options,
            Provider("keep", training.keep),
            Provider("save_on_cpu", training.on_cpu),
            Provider("recompute", training.recompute),
            Provider("nothing", training.nothing, role="ours"),
            Provider("asking", training.asking, role="ours"),
            Provider("disk", partial(small, compared=True), role="ours"),
        ),
        options,
    )
    assert found["disk", "identical_after_20_steps"].value == 1.0
    peak = {name: found[name, "peak_saved_bytes"].value for name in ("keep", "nothing", "disk")}
    assert peak["disk"] < peak["keep"] == peak["nothing"]
    assert 0 < found["recompute", "peak_saved_bytes"].value < peak["keep"]
    assert found["disk", "bytes_written_per_step"].value > 0
    assert found["disk", "cpu_s"].value > 0 and found["disk", "time_ratio"].value > 0
    assert ("keep", "time_ratio") not in found
    assert list(tmp_path.iterdir()) == []


def test_weights_that_differ_are_told(options):
    def broken(inputs):
        step = training.offloaded(inputs, compared=True)
        kept = inputs.kept[0]
        real = kept.step

        def drifted(around):
            result = real(around)
            if kept.num_steps == 15:
                kept.model.position.data += 1e-3
            return result

        kept.step = drifted
        return step

    providers = (Provider("keep", training.keep), Provider("disk", broken, role="ours"))
    found = measured(case_of(options, *providers), options)
    assert found["disk", "identical_after_20_steps"].value == 0.0


def test_the_planner_is_set_beside_measurement(options):
    pytest.importorskip("scipy")
    providers = (Provider("keep", training.keep), planned.provider(0.5))
    found = measured(case_of(options, *providers, shape=replace(TINY, width=128)), options)
    ours = {metric: record.value for (name, metric), record in found.items() if "auto" in name}
    assert ours["predicted_step_s"] > 0 and ours["measured_step_s"] > 0
    predicted, peak = ours["predicted_peak_bytes"], ours["peak_saved_bytes"]
    seen = ours["seen_peak_bytes"]
    assert ours["peak_error"] == pytest.approx(abs(predicted - peak) / seen)
    assert seen <= peak < found["keep", "peak_saved_bytes"].value


@pytest.mark.parametrize("kind", ["bert", "gpt", "t5"])
def test_every_provider_of_the_paper_s_cases_does_the_same(options, kind):
    shape = replace(TINY, layers=3, kind=kind)
    inputs = ssdtrain.shared_inputs(shape, options)
    steps = {
        "keep": ssdtrain._step(inputs, ssdtrain._nothing),
        "recompute": ssdtrain._step(inputs, ssdtrain._nothing, recompute=True),
        "disk": ssdtrain._ours(inputs, on_disk=True),
    }
    assert steps["keep"].metrics()["peak_saved_bytes"][0] > 0 and not steps["recompute"].metrics()
    found = {name: step.call() for name, step in steps.items()}
    for loss, gradients in found.values():
        assert torch.equal(loss, found["keep"][0]) and torch.equal(gradients, found["keep"][1])
    steps["disk"].close()


def test_a_batch_twice_over_has_the_same_loss_and_gradients(options):
    inputs = ssdtrain.shared_inputs(TINY, options)
    keep, doubled = ssdtrain._step(inputs, ssdtrain._nothing), ssdtrain._ours(inputs, times=2)
    torch.testing.assert_close(doubled.call(), keep.call(), rtol=1e-4, atol=0)
    doubled.close()


def test_a_plan_is_made_before_the_clock_starts(options):
    pytest.importorskip("scipy")
    inputs = ssdtrain.shared_inputs(TINY, options)
    keep, planned_step = ssdtrain._step(inputs, ssdtrain._nothing), ssdtrain._planned(inputs)
    torch.testing.assert_close(planned_step.call(), keep.call(), rtol=0, atol=0)
    planned_step.close()


def test_peers_are_made_once_and_told_of_the_model(options, monkeypatch):
    made = []

    def offload(model=None):
        made.append(model)
        return nullcontext()

    monkeypatch.setitem(sys.modules, "torchtune", ModuleType("torchtune"))
    for name, attribute in (
        ("torchtune.training", "OffloadActivations"),
        ("trl.models.activation_offloading", "get_act_offloading_ctx_manager"),
    ):
        module = ModuleType(name)
        setattr(module, attribute, offload)
        monkeypatch.setitem(sys.modules, name, module)
    inputs = ssdtrain.shared_inputs(TINY, options)
    for around in (ssdtrain._torchtune, ssdtrain._trl):
        step = ssdtrain._step(inputs, around)
        for _ in range(3):
            step.call()
    assert len(made) == 2 and made[0] is None and isinstance(made[1], Transformer)


def test_a_t5_s_decoder_is_half_rounded_down():
    model = Transformer(replace(TINY, layers=5, kind="t5"))
    assert [block.cross is not None for block in model.blocks] == [False] * 3 + [True] * 2
    assert [block.attention.causal for block in model.blocks] == [False] * 3 + [True] * 2
    bert = Transformer(replace(TINY, kind="bert"))
    assert not any(block.attention.causal for block in bert.blocks)


def test_the_paper_s_cases_are_skipped_with_a_reason_on_a_cpu(options):
    listed = [case for case in cases(options) if case.size.startswith("ssdtrain")]
    assert listed and "batch=16" in listed[0].size and "width=8192" in listed[0].size
    records = run_case("offload", listed[0], options, Run.here(CPU))
    assert {record.metric for record in records} == {"skipped"}
    assert {"dataeff host", "torch save_on_cpu", "trl OffloadActivations"} <= {
        record.provider for record in records
    }
    assert any("CUDA" in record.note for record in records)
    full = [case.size for case in ssdtrain.cases(replace(options, quick=False))]
    assert sum("doubled" in size for size in full) == len(full) - 9 == 9


def test_the_curve_has_a_point_per_batch(options, tmp_path):
    pytest.importorskip("matplotlib")
    records = []
    for batch in (2, 1):
        shape = replace(TINY, batch=batch)
        providers = (
            Provider("keep", training.keep),
            Provider("disk", partial(training.disk, min_bytes=0), role="ours"),
        )
        records += run_case(
            "offload", case_of(options, *providers, shape=shape), options, Run.here(CPU)
        )
    lines = rok.curve(records)
    assert {name: [batch for _, _, batch in points] for name, points in lines.items()} == {
        "keep": [1, 2],
        "disk": [1, 2],
    }
    assert lines["disk"][1][0] < lines["keep"][1][0]
    rok.plot(records, tmp_path / "rok.svg")
    assert (tmp_path / "rok.svg").read_bytes().startswith(b"<?xml")


def test_a_curve_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no provider has a time and a peak"):
        rok.curve([])


def test_the_curve_s_cases_differ_by_batch(options):
    listed = list(rok.cases(options))
    assert len({case.size for case in listed}) == len(listed) >= 2
    assert {"keep", "torch checkpoint", "dataeff disk"} <= {p.name for p in listed[0].providers}


def test_a_slow_disk_is_not_written_a_step_to(tmp_path):
    with pytest.raises(Unavailable, match=r"would take \d+ s to write the 1125899906842624 bytes"):
        ssdtrain._require_fast_disk(tmp_path, 1 << 50)
    ssdtrain._require_fast_disk(tmp_path, 1 << 10)


def test_an_interrupt_that_cuts_off_the_removal_of_a_folder_leaves_none(options, monkeypatch):
    step = training.disk(training.make_inputs(TINY, options))
    assert os.listdir(options.directory)
    remove, calls = os.rmdir, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(*args, **kwargs)

    monkeypatch.setattr(os, "rmdir", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step.close()
    assert os.listdir(options.directory) == []
