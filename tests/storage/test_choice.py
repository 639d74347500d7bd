"""The engine is chosen by measurement, and only for a reason."""

import subprocess
import sys
import textwrap

import pytest

from dataeff.storage import Probe, choice, choose_engine, open_engine, uring_refusal
from dataeff.storage.choice import decide


@pytest.mark.parametrize(
    ("times", "kind", "reason"),
    [
        ({"threads": 1.0}, "threads", "no other engine"),
        ({"threads": 1.0, "io_uring": 1.2}, "threads", "no other engine is faster"),
        ({"threads": 1.0, "io_uring": 0.95}, "threads", "noise"),
        ({"threads": 1.0, "io_uring": 0.5}, "io_uring", "2.00 times"),
    ],
)
def test_another_engine_must_win_clearly(times, kind, reason):
    chosen, why = decide(times)
    assert chosen == kind and reason in why


def test_what_is_chosen_was_measured_and_opens(tmp_path):
    made = choose_engine(tmp_path, nbytes=8 << 20, max_seconds=0.02)
    assert made.kind in made.probes and made.reason
    assert set(made.probes) | set(made.refusals) == {"threads", "io_uring"}
    assert all(p.read_gbs > 0 and p.write_gbs > 0 for p in made.probes.values())
    open_engine(made.kind).close()
    assert not list(tmp_path.iterdir())


def test_what_is_refused_is_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "uring_refusal", lambda: "not today")
    made = choose_engine(tmp_path, nbytes=4 << 20, max_seconds=0.02)
    assert made.kind == "threads" and made.refusals == {"io_uring": "not today"}
    assert list(made.probes) == ["threads"]


def test_the_best_round_of_each_engine_counts(monkeypatch):
    rates = {"threads": iter([1.0, 2.0]), "io_uring": iter([3.0, 1.0])}

    def measured(directory, nbytes, *, kind, **more):
        gbs = next(rates[kind])
        return Probe(gbs, gbs, True, "ext4", kind, nbytes, ())

    monkeypatch.setattr(choice, "uring_refusal", lambda: None)
    monkeypatch.setattr(choice, "probe", measured)
    made = choose_engine("/nowhere")
    assert {kind: probe.read_gbs for kind, probe in made.probes.items()} == {
        "threads": 2.0,
        "io_uring": 3.0,
    }
    assert made.kind == "io_uring" and "1.50 times" in made.reason


def test_a_directory_that_takes_no_file_raises():
    with pytest.raises(OSError, match="/proc"):
        choose_engine("/proc")


@pytest.mark.skipif(uring_refusal() is not None, reason="io_uring is refused here")
def test_an_offload_runs_on_the_engine_it_is_told(tmp_path):
    from torch import nn

    from dataeff.offload import ActivationOffload

    for engine in ("io_uring", "auto"):
        offload = ActivationOffload(nn.Linear(4, 4), tmp_path, engine=engine)
        (lane,) = offload._cache._tiers._spills._striped.lanes
        name = lane.engine.name
        assert name == "io_uring" or engine == "auto"
        offload.close()
    with pytest.raises(ValueError, match="engine='pigeon'"):
        ActivationOffload(nn.Linear(4, 4), tmp_path, engine="pigeon")


@pytest.mark.skipif(uring_refusal() is not None, reason="io_uring is refused here")
def test_auto_opens_wherever_the_threads_do_however_few_descriptors_are_left(tmp_path):
    """A ring and its bell take two more: without them another engine serves."""
    script = """
    import os, resource, sys
    from torch import nn
    from dataeff.offload import ActivationOffload

    def opens(engine, num_free):
        used = [int(fd) for fd in os.listdir("/proc/self/fd")][:-1]
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(used) + 1 + num_free, hard))
        try:
            offload = ActivationOffload(nn.Linear(4, 4), sys.argv[1], engine=engine)
        except OSError as error:
            assert error.errno == 24 and "ulimit -n" in str(error), error
            return None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        offload.close()
        return True

    opens("auto", 64)
    for num_free in range(4):
        print(num_free, opens("threads", num_free), opens("auto", num_free))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = [line.split() for line in done.stdout.splitlines()]
    assert len(outcomes) == 4 and all(threads == auto for _, threads, auto in outcomes), outcomes
    assert {threads for _, threads, _ in outcomes} == {"None", "True"}
