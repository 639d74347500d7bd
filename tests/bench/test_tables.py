import io
from dataclasses import replace

import pytest

from dataeff.bench.record import Record
from dataeff.bench.tables import duration, markdown_table, terminal_table

TIMES = {"index_select": ("peer", 0.02), "x[index]": ("peer", 0.04), "dataeff": ("ours", 0.005)}


def records(device="cpu: some CPU", size="rows=10"):
    shared = {
        "workload": "gather",
        "size": size,
        "device": device,
        "versions": {"torch": "2.13.0", "triton": "3.9.0"},
        "commit": "abc",
        "time": "2026-01-02T03:04:05+00:00",
        "threads": 2,
    }
    made = []
    for name, (role, seconds) in TIMES.items():
        figures = [("time_s", seconds, "s"), ("time_spread_s", 0.001, "s")]
        figures += [("bandwidth_gbs", 0.1 / seconds, "GB/s"), ("share_of_memcpy", 0.5, "1")]
        for metric, value, unit in figures:
            made.append(
                Record(provider=name, role=role, metric=metric, value=value, unit=unit, **shared)
            )
    made.append(
        Record(
            provider="cupy",
            role="peer",
            metric="skipped",
            value=None,
            unit="1",
            note="the package cupy is not installed",
            **shared,
        )
    )
    return made


def shown(table):
    from rich.console import Console

    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_terminal_table_compares_with_the_best_peer_and_says_why_one_was_skipped():
    text = shown(terminal_table("gather", records()))
    ours = next(line for line in text.splitlines() if "dataeff" in line)
    assert "4.00x" in ours and "5 ms" in ours and "20 GB/s" in ours and "50 % of memcpy" in ours
    assert "the package cupy is not installed" in text
    assert "x[index]" in text  # not taken for a style


def test_markdown_has_empty_gpu_columns_and_says_so():
    text = markdown_table(records())
    ours = next(line for line in text.splitlines() if "| dataeff |" in line)
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells == ["rows=10", "dataeff", "5 ms ± 500 us", "4.00x", "50 % of memcpy", "", "", ""]
    assert "cupy" not in text  # timed nowhere
    assert "GPU: no record yet, so its columns are empty." in text
    assert "CPU: some CPU, 2 threads, torch 2.13.0, triton 3.9.0, commit abc, 2026-01-02." in text


def test_markdown_puts_both_devices_side_by_side():
    text = markdown_table([*records(), *records("cuda: H100"), *records("cuda: H100", "rows=99")])
    rows = [line for line in text.splitlines() if "| dataeff |" in line]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0][2] == cells[0][5] == "5 ms ± 500 us"
    assert cells[1][:3] == ["rows=99", "dataeff", ""] and cells[1][5] == "5 ms ± 500 us"
    assert "no record yet" not in text


def test_markdown_shows_other_figures_and_leaves_out_empty_columns():
    kept = [record for record in records() if not record.metric.startswith("share_of_")]
    extra = replace(kept[0], metric="peak_saved_bytes", value=3 * 2**20, unit="bytes")
    text = markdown_table([*kept, extra])
    assert "peak_saved_bytes=3 MiB" in text
    assert "CPU more" in text and "share of ceiling" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.0, "2 s"), (0.0123, "12.3 ms"), (4.5e-6, "4.5 us"), (7e-9, "7 ns"), (5000.0, "5000 s")],
)
def test_durations_pick_their_unit(seconds, text):
    assert duration(seconds) == text


def test_markdown_says_when_the_machine_was_busy():
    busy = [replace(record, load=3.0) for record in records()]
    assert "load 3.0 per processor" in markdown_table(busy)
    assert "load" not in markdown_table(records())
