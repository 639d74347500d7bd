"""The disks' life, with a clock that the tests move."""

import io
import json

import pytest
import torch
from torch import nn

from dataeff.cli import main
from dataeff.offload import ActivationOffload
from dataeff.offload.report import OffloadReport
from dataeff.offload.wear import SECONDS_PER_DAY, TB, Endurance, StepClock, Wear


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    out, err = capsys.readouterr()
    return exited.value.code or 0, out, err


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


def test_rate_and_days_left():
    clock = Clock()
    wear = Wear(Endurance(tbw=600.0), clock)
    assert wear.written_tb_per_day(0) == 0 and wear.days_left(0) == float("inf")
    clock.now_s += SECONDS_PER_DAY / 2
    assert wear.written_tb_per_day(5 * TB) == pytest.approx(10.0)
    assert wear.days_left(5 * TB) == pytest.approx(59.5)
    assert Wear(Endurance(), clock).days_left(5 * TB) == float("inf")


def test_warns_once_before_the_endurance_is_spent_and_then_refuses():
    wear = Wear(Endurance(tbw=1.0), Clock())
    assert wear.allows(0.8 * TB, 0.05 * TB)
    with pytest.warns(RuntimeWarning, match="0.89 of the 1 TB"):
        assert wear.allows(0.89 * TB, 0.05 * TB)
    assert wear.allows(0.95 * TB, 0.05 * TB)
    assert not wear.allows(0.95 * TB, 0.06 * TB)


def test_warns_when_the_rate_spends_it_within_a_month():
    clock = Clock()
    wear = Wear(Endurance(tbw=100.0), clock)
    clock.now_s += 30.0
    wear.foresee(50 * TB)  # half a minute says nothing
    clock.now_s += SECONDS_PER_DAY - 30.0
    wear.foresee(3 * TB)  # 32 days
    with pytest.warns(RuntimeWarning, match=r"at 4 TB per day .* 100 TB is spent in 24.0 days"):
        wear.foresee(4 * TB)
    wear.foresee(5 * TB)
    small = Wear(Endurance(tbw=1.0), clock)
    clock.now_s += SECONDS_PER_DAY
    with pytest.warns(RuntimeWarning, match="at 0.04 TB per day .* 1 TB is spent in 24.0 days"):
        small.foresee(0.04 * TB)


def test_the_cap_holds_for_a_day():
    clock = Clock()
    wear = Wear(Endurance(write_cap_tb=2.0), clock)
    assert wear.allows(1 * TB, 1 * TB)
    with pytest.warns(RuntimeWarning, match="2 TB, the most it may write in a day"):
        assert not wear.allows(2 * TB, 1)
    clock.now_s += 2.5 * SECONDS_PER_DAY
    assert wear.allows(2 * TB, 2 * TB) and not wear.allows(4 * TB, 1)
    clock.now_s += 0.5 * SECONDS_PER_DAY  # days are counted from the start, not from the last write
    assert wear.allows(4 * TB, 2 * TB)


@pytest.mark.parametrize("name", ["endurance_tbw", "write_cap_tb"])
def test_a_bound_that_is_not_positive_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        ActivationOffload(nn.Linear(2, 2), tmp_path, **{name: 0})


def test_steps_are_timed_from_the_first_beginning_to_the_last_end():
    clock = Clock()
    steps = StepClock(clock)
    assert steps.step_s == 0.0
    for _ in range(3):
        steps.begin()
        clock.now_s += 2.0
        steps.end()
        clock.now_s += 1.0  # between steps
    assert steps.num_steps == 3 and steps.step_s == pytest.approx(8.0 / 3)


def test_beyond_its_endurance_tensors_stay_in_memory(
    gpt_and_loss, gradients, assert_same, tmp_path
):
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    offload = ActivationOffload(model, tmp_path, min_bytes=0, endurance_tbw=1e-6)  # 1 MB

    def step():
        with offload:
            loss().backward()

    with pytest.warns(RuntimeWarning, match="beyond that, tensors stay in memory"):
        assert_same(gradients(model, step), expected)
    offload._cache.drain()  # a write that backward overtook counts when it ends
    report = offload.report()
    assert 0.5e6 < report.bytes_written + report.bytes_cancelled <= 1e6
    assert report.bytes_capped > 0 and report.bytes_failed == 0
    assert report.bytes_packed == (
        report.bytes_deduplicated + report.bytes_kept + report.bytes_written
        + report.bytes_cancelled + report.bytes_capped
    )  # fmt: skip
    assert report.endurance_days is not None and report.written_tb_per_day > 0
    assert f"written_tb_per_day   {report.written_tb_per_day:.3g}\n" in str(report)
    assert_same(gradients(model, step), expected)
    offload.close()


@pytest.fixture
def saved_report(gpt_and_loss, tmp_path):
    model, loss = gpt_and_loss
    offload = ActivationOffload(model, tmp_path, min_bytes=0)
    for _ in range(2):
        with offload:
            loss().backward()
    offload.close()
    path = tmp_path / "report.json"
    offload.report().save(path)
    return path, offload.report()


def test_a_report_comes_back_as_it_was_saved(saved_report):
    path, report = saved_report
    loaded = OffloadReport.load(path)
    assert loaded.num_steps == 2 and loaded.step_s == report.step_s > 0
    assert loaded.modules == report.modules and loaded.bytes_written == report.bytes_written
    assert loaded.bandwidth_gbs > 0


@pytest.mark.parametrize("text", ["[]", "{", '{"modules": {}}', '{"a": 1}'])
def test_another_file_is_no_report(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not a saved OffloadReport"):
        OffloadReport.load(tmp_path / "x.json")


@pytest.mark.parametrize("text", ['["a"]', "[]", "3", '"a"', "null"])
def test_json_of_another_kind_is_told_what_it_should_be(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not .* where `save` writes an object"):
        OffloadReport.load(tmp_path / "x.json")


def test_plan_from_a_report_uses_what_was_measured(saved_report, capsys):
    path, report = saved_report
    code, out, _ = run(capsys, "plan", "--from-report", str(path), "--json", "--disks", "1")
    assert code == 0
    found = json.loads(out)
    assert found["step_s"] == report.step_s
    assert found["excess"] == report.bytes_offloaded / 2 > 0
    assert found["written_per_day"] == pytest.approx(found["excess"] / report.step_s * 86400)
    code, out, _ = run(capsys, "plan", "--from-report", str(path), "--disks", "1")
    assert code == 0 and "offloaded per step" in out and "memory of the GPU" not in out


def test_plan_wants_a_model_or_a_report(capsys, tmp_path):
    for typed in (["plan"], ["plan", "--model", "llama-8b", "--from-report", "x"]):
        code, _, err = run(capsys, *typed)
        assert code == 2 and "either --model NAME or --from-report" in err
    code, _, err = run(capsys, "plan", "--from-report", str(tmp_path / "none.json"))
    assert code == 2 and "none.json" in err
    offload = ActivationOffload(nn.Linear(2, 2), tmp_path)
    offload.report().save(tmp_path / "empty.json")
    code, _, err = run(capsys, "plan", "--from-report", str(tmp_path / "empty.json"))
    assert code == 2 and "no finished step" in err


def test_the_live_view_shows_the_last_state(tmp_path):
    console = pytest.importorskip("rich.console")
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    offload = ActivationOffload(model, tmp_path, min_bytes=0)
    out = console.Console(record=True, force_terminal=True, width=80, file=io.StringIO())
    view = offload.live()
    view._console = out
    with view, offload:
        model(torch.ones(512, 256)).sum().backward()
    shown = out.export_text()
    assert "held for backward" in shown and "steps" in shown and "written per day" in shown


def test_live_from_the_first_step_until_closed(tmp_path, capsys):
    pytest.importorskip("rich")
    model = nn.Linear(64, 64)
    offload = ActivationOffload(model, tmp_path, min_bytes=0, live=True)
    with offload:
        model(torch.ones(64, 64)).sum().backward()
    offload.close()
    assert "never had to move" in capsys.readouterr().out
