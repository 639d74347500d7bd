from dataeff.demo.timeline import middle_stretch
from dataeff.ledger import Span

MS = 1_000_000


def test_the_middle_of_a_run_is_cut_out():
    spans = [Span("compute", f"c{i}", 10 * i * MS, (10 * i + 8) * MS) for i in range(9)]
    spans.append(Span("store", "s", 25 * MS, 45 * MS, nbytes=7))
    spans.append(Span("load", "far", 80 * MS, 90 * MS))
    stretch = middle_stretch(spans, "compute", 3)
    assert [s["name"] for s in stretch] == ["s", "c3", "c4", "c5"]
    assert stretch[0] == {
        "track": "store", "name": "s", "start_ms": 0.0, "end_ms": 15.0, "nbytes": 7,
    }  # fmt: skip
    assert stretch[-1]["end_ms"] == 28.0


def test_nothing_recorded_is_nothing_drawn():
    assert middle_stretch([], "compute", 3) == []
