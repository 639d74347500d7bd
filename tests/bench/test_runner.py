import gc

import pytest
import torch

from dataeff.bench import (
    Case,
    DisagreementError,
    Options,
    Provider,
    Step,
    Unavailable,
    lane,
    run_case,
    runner,
)
from dataeff.bench.record import Run

CPU = torch.device("cpu")


class Clock:
    """Stands in for `time`: only the work moves it."""

    def __init__(self):
        self.now_ns = 0

    def perf_counter_ns(self):
        return self.now_ns

    def perf_counter(self):
        return self.now_ns / 1e9

    def work(self, name, seconds, calls, result=0):
        def call():
            calls.append(name)
            self.now_ns += round(seconds * 1e9)
            return result

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (runner, lane):
        monkeypatch.setattr(module, "time", clock)
    return clock


def run(case, **options):
    options = Options(quick=True, device=CPU, **options)
    records = run_case("gather", case, options, Run.here(CPU))
    return {(record.provider, record.metric): record for record in records}


def provider(name, call, role="peer", **step):
    return Provider(name, lambda inputs: Step(call, **step), role=role)


def test_medians_rates_and_shares_come_from_the_same_rounds(clock):
    calls = []
    case = Case(
        size="n=1",
        inputs=lambda: None,
        providers=(
            provider("peer", clock.work("peer", 0.4, calls)),
            provider("ours", clock.work("ours", 0.2, calls), role="ours"),
        ),
        ceilings=(
            provider("memcpy", clock.work("memcpy", 0.1, calls), role="ceiling", nbytes=400),
        ),
        nbytes=400,
    )
    found = run(case)
    assert found["peer", "time_s"].value == pytest.approx(0.4)
    assert found["ours", "bandwidth_gbs"].value == pytest.approx(2000 / 1e9)
    assert found["memcpy", "bandwidth_gbs"].value == pytest.approx(4000 / 1e9)
    assert found["ours", "share_of_memcpy"].value == pytest.approx(0.5)
    assert found["ours", "time_spread_s"].value == pytest.approx(0, abs=1e-12)
    assert ("memcpy", "share_of_memcpy") not in found


def test_the_roofline_of_several_kernels_is_that_of_each_in_turn(clock):
    case = Case(
        size="",
        inputs=lambda: None,
        providers=(
            provider("ours", clock.work("ours", 2.0, []), role="ours", kernels=((4, 10), (1, 30))),
        ),
        ceilings=(
            provider("memcpy", clock.work("memcpy", 1.0, []), role="ceiling", nbytes=10),
            provider("matmul", clock.work("matmul", 1.0, []), role="ceiling", flops=100),
        ),
    )
    found = run(case)
    assert found["ours", "share_of_roofline"].value == pytest.approx((0.4 + 0.3) / 2)
    assert ("memcpy", "share_of_roofline") not in found


def test_long_calls_are_not_warmed_up_again_and_again(clock):
    calls = []
    work = clock.work("slow", 20.0, calls)
    run_case(
        "gather",
        Case(size="", inputs=lambda: None, providers=(provider("slow", work),)),
        Options(quick=False, device=CPU),
        Run.here(CPU),
    )
    assert len(calls) == 1 + 1 + 3  # compared, warmed up, and the rounds


def test_a_long_call_is_compared_and_made_in_the_first_round(clock):
    calls = []
    providers = (
        provider("slow", clock.work("slow", 3.0, calls)),
        provider("ours", clock.work("ours", 0.5, calls), role="ours"),
    )
    found = run(Case(size="", inputs=lambda: None, providers=providers, long_call_s=0.4))
    assert calls.count("slow") == 2 and found["slow", "num_rounds"].value == 1
    assert found["slow", "time_s"].value == pytest.approx(3.0)
    assert found["slow", "time_spread_s"].value == pytest.approx(0.0)
    assert found["ours", "num_rounds"].value == 3  # until the budget ends
    assert found["ours", "time_ratio"].value == pytest.approx(1 / 6)


def test_a_first_call_that_was_long_once_is_a_warm_up(clock):
    durations = iter([9.0])

    def disturbed():
        clock.now_ns += round(next(durations, 0.5) * 1e9)

    case = Case(
        size="", inputs=lambda: None, providers=(provider("p", disturbed),), long_call_s=2.0
    )
    found = run(case)
    assert found["p", "num_rounds"].value == 5
    assert found["p", "time_s"].value == pytest.approx(0.5)


def test_a_call_of_ours_may_take_longer_in_every_round(clock):
    durations = iter([9.0])

    def cold():
        clock.now_ns += round(next(durations, 4.0) * 1e9)
        return 0

    providers = (provider("ours", cold, role="ours"), provider("p", clock.work("p", 4.0, [])))
    found = run(Case(size="", inputs=lambda: None, providers=providers, long_call_s=0.5))
    assert found["ours", "num_rounds"].value == 3 and found["p", "num_rounds"].value == 1
    assert found["ours", "time_s"].value == pytest.approx(4.0)


def test_a_first_call_may_decline(clock):
    def declines():
        raise Unavailable("one step did not finish in 5 s")

    providers = tuple(
        provider(name, declines if name in "ac" else clock.work(name, 0.5, [])) for name in "abcd"
    )
    found = run(Case(size="", inputs=lambda: None, providers=providers))
    for name in "ac":
        assert found[name, "skipped"].note == "one step did not finish in 5 s"
        assert (name, "time_s") not in found
    assert ("b", "time_ratio") not in found and found["d", "time_ratio"].value == pytest.approx(1)


def test_a_peer_whose_memory_does_not_suffice_takes_no_other_along():
    def call():
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore of it")

    providers = (provider("keep", call), provider("other", lambda: 1))
    found = run(Case(size="", inputs=lambda: None, providers=providers))
    assert found["keep", "skipped"].note == "CUDA out of memory."
    assert ("other", "time_s") in found
    ours = Provider("ours", lambda inputs: Step(call), role="ours")
    with pytest.raises(torch.OutOfMemoryError):
        run(Case(size="", inputs=lambda: None, providers=(ours,)))


def test_a_ceiling_s_rate_is_its_best_round(clock):
    durations = iter([9.0, 9.0, 4.0, 1.0, 4.0])  # warmed up, then rounds until the budget ends

    def disturbed():
        clock.now_ns += round(next(durations, 4.0) * 1e9)
        return 0

    case = Case(
        size="",
        inputs=lambda: None,
        providers=(provider("ours", clock.work("ours", 2.0, []), role="ours"),),
        ceilings=(provider("memcpy", disturbed, role="ceiling", nbytes=10**9),),
        nbytes=10**9,
    )
    found = run(case)
    assert found["memcpy", "time_s"].value == pytest.approx(4.0)
    assert found["memcpy", "bandwidth_gbs"].value == pytest.approx(1.0)
    assert found["ours", "share_of_memcpy"].value == pytest.approx(0.5)


def test_rounds_are_interleaved_and_start_with_another_provider_each_time(clock):
    calls = []
    names = ("a", "b", "c")
    case = Case(
        size="",
        inputs=lambda: None,
        providers=tuple(provider(name, clock.work(name, 0.1, calls)) for name in names),
    )
    run(case)
    compared_and_warm = 3 + 3
    rounds = calls[compared_and_warm:]
    assert ["".join(rounds[i : i + 3]) for i in range(0, len(rounds), 3)] == [
        *("abc", "bca", "cab", "abc", "bca"),
    ]


def test_the_budget_ends_the_rounds_but_not_before_three(clock):
    case = Case(
        size="", inputs=lambda: None, providers=(provider("slow", clock.work("slow", 100.0, [])),)
    )
    assert run(case)["slow", "num_rounds"].value == 3


def test_a_case_may_ask_for_fewer_seconds_than_the_options(clock):
    def rounds(**budget):
        work = provider("one", clock.work("one", 1.0, []))
        case = Case(size="", inputs=lambda: None, providers=(work,), **budget)
        return run(case)["one", "num_rounds"].value

    assert rounds() == 5 and rounds(budget_s=2.5) == 3


def test_rounds_go_on_until_times_are_settled(clock):
    def rounds(durations, **options):
        left = iter(durations)

        def call():
            clock.now_ns += round(next(left) * 1e9)

        case = Case(size="", inputs=lambda: None, providers=(provider("one", call),), **options)
        return run(case)["one", "num_rounds"].value

    def disturbed(seconds):  # by another program, in its first two rounds
        return [seconds, seconds, *[3 * seconds] * 2, *[seconds] * 100]

    assert rounds(disturbed(0.1)) == 5  # the usual number
    assert rounds(disturbed(0.1), settle_s=4.0) == 9  # the quartiles meet
    assert rounds([0.1, 0.2] * 50, settle_s=4.0) == 27  # never: four seconds are the end
    assert rounds([0.1] * 50, settle_s=0.5) == 5
    assert rounds([0.1, 0.2] * 50, settle_s=4.0, budget_s=1.0) == 8


@pytest.mark.parametrize(("elsewhere", "said"), [(0.04, False), (0.3, True)])
def test_a_busy_machine_is_said(clock, monkeypatch, elsewhere, said):
    monkeypatch.setattr(runner.ProcessorTime, "elsewhere_since", lambda now, before: elsewhere)
    providers = (
        provider("theirs", clock.work("theirs", 1.0, [])),
        provider("mine", clock.work("mine", 1.0, []), role="ours"),
    )
    records = run(Case(size="", inputs=lambda: None, providers=providers))
    assert ("theirs", "busy_elsewhere") not in records
    assert (("mine", "busy_elsewhere") in records) == said
    if said:
        assert records["mine", "busy_elsewhere"].value == elsewhere


def test_short_calls_are_repeated_within_a_sample(clock):
    calls = []
    case = Case(
        size="", inputs=lambda: None, providers=(provider("fast", clock.work("f", 1e-4, calls)),)
    )
    found = run(case)
    assert found["fast", "time_s"].value == pytest.approx(1e-4)
    assert len(calls) == 1 + 1 + 5 * 10  # compared, warmed up, five rounds of 1 ms


def test_before_runs_ahead_of_every_call_and_is_not_timed(clock):
    order = []

    def before():
        order.append("before")
        clock.now_ns += 10**9

    call = clock.work("call", 1e-4, order)
    found = run(Case(size="", inputs=lambda: None, providers=(provider("p", call, before=before),)))
    assert found["p", "time_s"].value == pytest.approx(1e-4)
    assert order == ["before", "call"] * (len(order) // 2)


def test_different_results_stop_the_run_and_every_step_is_closed():
    closed = []
    case = Case(
        size="n=2",
        inputs=lambda: None,
        providers=(
            provider("torch", lambda: torch.tensor([1.0, 2.0]), close=lambda: closed.append(1)),
            provider("ours", lambda: torch.tensor([1.0, 2.5]), close=lambda: closed.append(2)),
        ),
    )
    with pytest.raises(DisagreementError, match=r"gather, n=2: ours returns .* torch"):
        run(case)
    assert sorted(closed) == [1, 2]


def test_a_case_that_fails_takes_no_other_along():
    def case(size, result):
        providers = (provider("a", lambda: torch.tensor([1.0])), provider("b", lambda: result))
        return Case(size=size, inputs=lambda: None, providers=providers)

    right, wrong = torch.tensor([1.0]), torch.tensor([2.0])
    said, kept = [], []
    cases = [case("n=1", right), case("n=2", wrong), case("n=3", right), case("n=4", wrong)]
    with pytest.raises(DisagreementError, match="n=2"):
        runner.run_workload(
            *("gather", cases, Options(quick=True, device=CPU), said.append),
            lambda found: kept.append(list(found)),
        )
    assert {record.size for record in kept[-1]} == {"n=1", "n=3"}
    assert sum("failed" in line for line in said) == 2


def test_a_peer_without_its_libraries_is_skipped():
    def make(inputs):
        raise ImportError("libwholegraph.so: cannot open shared object file")

    peer = Provider("peer", make, requires=("math",))
    case = Case(size="", inputs=lambda: None, providers=(provider("a", lambda: 1), peer))
    assert "math does not load: libwholegraph" in run(case)["peer", "skipped"].note
    with pytest.raises(ImportError, match="libwholegraph"):
        Provider("ours", make).prepare(None)


def test_tolerance_and_own_comparison_replace_equality():
    a, b = (lambda: {"y": torch.tensor([1.0])}), (lambda: {"y": torch.tensor([1.001])})
    providers = (provider("a", a), provider("b", b))
    case = Case(size="", inputs=lambda: None, providers=providers, tolerance=(1e-2, 0.0))
    assert ("b", "time_s") in run(case)
    seen = []
    case = Case(size="", inputs=lambda: None, providers=providers, same=lambda x, y: seen.append(x))
    assert ("b", "time_s") in run(case) and len(seen) == 1


def test_what_cannot_run_is_recorded_with_its_reason():
    def declines(inputs):
        raise Unavailable("there is no CUDA device")

    case = Case(
        size="",
        inputs=lambda: None,
        providers=(
            Provider("absent", lambda inputs: Step(int), requires=("no_such_package",)),
            Provider("declines", declines),
            provider("runs", int),
        ),
    )
    found = run(case)
    assert found["absent", "skipped"].note == "the package no_such_package is not installed"
    assert found["declines", "skipped"].note == "there is no CUDA device"
    assert found["declines", "skipped"].value is None
    assert ("runs", "time_s") in found


def test_an_error_that_is_not_unavailable_is_not_hidden():
    def broken(inputs):
        raise RuntimeError("broken")

    case = Case(size="", inputs=lambda: None, providers=(Provider("p", broken),))
    with pytest.raises(RuntimeError, match="broken"):
        run(case)


def test_inputs_and_every_set_up_are_seeded():
    def make(inputs):
        weight = torch.randn(3)
        return Step(lambda: (weight, inputs))

    case = Case(
        size="", inputs=lambda: torch.randn(3), providers=(Provider("a", make), Provider("b", make))
    )
    run(case, seed=7)  # equality of the results is what is checked
    torch.manual_seed(7)
    assert torch.equal(case.inputs(), torch.manual_seed(7) and torch.randn(3))


def test_garbage_is_not_collected_while_the_clock_runs(clock):
    states = []

    def call():
        states.append(gc.isenabled())
        clock.now_ns += 10**9

    run(Case(size="", inputs=lambda: None, providers=(provider("p", call),)))
    assert states[0] and not any(states[1:])
    assert gc.isenabled()


def test_a_step_reports_its_own_figures():
    step = {"metrics": lambda: {"peak_saved_nbytes": (5.0, "bytes")}}
    found = run(Case(size="", inputs=lambda: None, providers=(provider("p", int, **step),)))
    assert found["p", "peak_saved_nbytes"].value == 5.0
    assert found["p", "peak_saved_nbytes"].unit == "bytes"


def test_a_case_says_how_often_it_is_called():
    calls = []
    case = Case(
        size="layers=12",
        inputs=lambda: None,
        providers=(Provider("counted", lambda _: Step(lambda: calls.append(1))),),
        num_calls=8,
    )
    run_case("some", case, Options(quick=True, device=CPU), Run.here(CPU))
    assert len(calls) >= 8


def test_records_are_kept_case_by_case(clock):
    def fails():
        raise RuntimeError("out of memory")

    works = provider("works", clock.work("works", 0.1, []))
    cases = [
        Case(size=size, inputs=lambda: None, providers=providers)
        for size, providers in (("n=1", (works,)), ("n=2", (provider("fails", fails),)))
    ]
    kept = []
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.run_workload(
            "gather", cases, Options(quick=True, device=CPU), print, lambda r: kept.append(list(r))
        )
    assert len(kept) == 1 and {record.size for record in kept[0]} == {"n=1"}
