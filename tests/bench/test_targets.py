"""What is wanted beside what was measured, from records made here."""

import re

import pytest

from dataeff.bench import NAMES, Record
from dataeff.bench.target import Cases, Target, figure, share, speedup, targets_table
from dataeff.bench.targets import TARGETS


def record(provider, value, metric="time_s", size="rows=1 ", group="rows", device="cpu: some"):
    return Record(
        *("gather", provider, "ours" if provider.startswith("dataeff") else "peer"),
        *(metric, value, "s", size, device, {}, "", "2026-01-02T03:04:05+00:00", 2),
        group=group,
    )


TIMES = [
    *(record("slow", 8.0), record("fast", 3.0), record("dataeff", 2.0)),
    *(record("fast", 12.0, size="rows=9 "), record("dataeff", 2.0, size="rows=9 ")),
]
ROWS = Cases("gather", "rows")


def test_a_speedup_is_over_the_fastest_peer_that_is_meant():
    assert ROWS.read(speedup("fast|slow"), TIMES) == [1.5, 6.0]
    assert ROWS.read(speedup("slow"), TIMES) == [4.0]  # the second size has no such peer
    assert Cases("gather", "rows", "rows=9").read(speedup("fast"), TIMES) == [6.0]
    assert Cases("gather", "growth").read(speedup("fast"), TIMES) == []
    assert Cases("rgnn", "rows").read(speedup("fast"), TIMES) == []


def test_a_share_is_of_another_provider_or_of_another_figure():
    held = [record("keep", 8.0, "bytes"), record("dataeff", 2.0, "bytes")]
    assert ROWS.read(share("bytes", "keep"), held) == [0.25]
    built = [record("dataeff", 1.0, "build_s"), record("dataeff", 4.0)]
    assert ROWS.read(share("build_s", "dataeff", "time_s"), built) == [0.25]
    assert ROWS.read(share("bytes", "absent"), held) == []


@pytest.mark.parametrize(
    ("bounds", "reached"),
    [
        ({"mean": 2.9}, True),
        ({"mean": 3.1}, False),
        ({"mean": 2.9, "each": 1.5}, True),
        ({"mean": 2.9, "each": 1.6}, False),
        ({"each": 6.0, "upper": True}, True),
        ({"each": 5.9, "upper": True}, False),
        ({"mean": 2.9, "upper": True}, False),
    ],
)
def test_both_bounds_are_to_hold(bounds, reached):
    assert Target(ROWS, "", "", speedup("fast"), **bounds).reached([1.5, 6.0]) is reached


def cells(target, records):
    return [cell.strip() for cell in targets_table([target], records).splitlines()[2].split("|")]


def test_the_table_shows_misses_and_what_has_no_record():
    target = Target(ROWS, "gather", "peer", speedup("fast"), mean=4.0, each=1.0)
    shown = cells(target, TIMES)
    assert shown[1:6] == [
        "CPU",
        "gather",
        "peer",
        "at least 4x, each 1x",
        "3x (1.5x to 6x, 2 figures)",
    ]
    assert shown[6] == "**missed**"
    gpu = [record("fast", 1.0, device="cuda: some")]
    assert cells(target, gpu)[5:7] == ["", "no record"]
    assert "Measured on cpu: some (gather)." in targets_table([target], TIMES)


def test_an_error_of_zero_has_no_geometric_mean():
    wrong = [record("dataeff", 0.02, "error"), record("dataeff", 0.0, "error", size="rows=9 ")]
    target = Target(ROWS, "", "", figure("error"), each=0.1, upper=True, percent=True)
    assert cells(target, wrong)[4:7] == ["at most 10 %", "2 % to 0 %, 2 figures", "reached"]


def test_every_target_speaks_of_a_workload_there_is():
    for target in TARGETS:
        assert target.cases.workload in NAMES
        assert target.mean is not None or target.each is not None
        re.compile(target.cases.groups + target.cases.sizes + target.cases.ours)
