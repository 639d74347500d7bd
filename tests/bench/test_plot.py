import pytest

pytest.importorskip("matplotlib")

from dataeff.bench.plot import plot
from dataeff.bench.record import Record


def record(metric, value, size="rows=1"):
    return Record(
        *("gather", "dataeff", "ours", metric, value, "s", size, "cpu: x"),
        *({"torch": "2.13.0"}, "abc", "2026-01-02T03:04:05+00:00", 2),
    )


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot_writes_the_format_of_its_suffix(tmp_path, suffix, magic):
    path = tmp_path / f"out.{suffix}"
    plot([record("time_s", 0.1), record("time_s", 0.2, "rows=2")], path)
    assert path.read_bytes().startswith(magic)


def test_nothing_timed_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no provider was timed"):
        plot([record("skipped", None)], tmp_path / "out.png")
