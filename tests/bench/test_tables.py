import io
from dataclasses import replace

import pytest

from dataeff.bench.record import Record
from dataeff.bench.summary import summary_table
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


def test_vector_instructions_of_the_cpu_are_named_where_records_know_them():
    old, wide = records(size="rows=9"), {"torch": "2.13.0", "vectors": "AVX512"}
    known = [replace(r, versions=wide | {"vectors": v}) for v in ("AVX512", "AVX2") for r in old]
    both = "CPU: some CPU with AVX2 and AVX512"
    assert f"{both}, 2 threads" in markdown_table(known)
    older = f"{both} (older rows do not say with which), 2 threads"
    assert older in markdown_table([*old, *known])
    gpu = [replace(r, versions=wide) for r in records(device="cuda: some GPU")]
    assert "GPU: some GPU, 2 threads" in markdown_table(gpu)


def test_the_first_and_the_last_commit_that_were_measured_are_named_and_the_days():
    later = [replace(r, commit="def", time="2026-02-03T04:05:06+00:00") for r in records()]
    between = [replace(r, commit="bcd", time="2026-02-01T04:05:06+00:00") for r in records()]
    text = markdown_table([*later, *between, *records(size="rows=9")])
    assert ", commits abc to def, 2026-01-02 to 2026-02-03." in text


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


def summarised(*more):
    rows = [line for line in summary_table(more).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_a_summary_is_over_the_sizes_of_a_group():
    wide = [replace(r, size="rows=99") for r in records()]
    wide = [
        replace(r, value=0.02) if r.provider == "dataeff" and r.unit == "s" else r for r in wide
    ]
    wide = [replace(r, value=0.8) if r.metric == "share_of_memcpy" else r for r in wide]
    one, other = "random rows", "from disk"
    grouped = [replace(r, group=one) for r in records()] + [replace(r, group=other) for r in wide]
    heading, _, first, second = summarised(*grouped)
    assert heading[:5] == [
        "what", "provider", "sizes", "CPU vs fastest peer", "CPU share of ceiling"
    ]  # fmt: skip
    assert first == [one, "dataeff", "1", "4.00x index_select", "50 % of memcpy", "", ""]
    assert second == [other, "dataeff", "1", "1.00x index_select", "80 % of memcpy", "", ""]
    _, _, both = summarised(*records(), *wide)
    assert both[:4] == ["gather", "dataeff", "2", "2.00x (1.00 to 4.00) index_select"]
    assert both[4] == "50 to 80 % of memcpy"


def test_a_summary_names_no_peer_where_there_were_many():
    peers = [
        replace(r, provider=f"peer {n}", size=f"n={n}")
        if r.role == "peer"
        else replace(r, size=f"n={n}")
        for n in range(3)
        for r in records()
        if r.provider != "x[index]"
    ]
    assert summarised(*peers)[2][3] == "4.00x (4.00 to 4.00)"


def test_a_summary_shows_what_a_reader_asks_beside_speed_and_both_devices():
    ours = replace(records()[8], workload="offload", metric="peak_saved_bytes", unit="bytes")
    assert ours.provider == "dataeff"
    figures = [replace(ours, value=2.0**20), replace(ours, value=2.0**22, size="rows=99")]
    timed = [*records(), *records(size="rows=99"), *records("cuda: H100")]
    timed = [replace(r, workload="offload") for r in timed]
    roofline = replace(ours, metric="share_of_roofline", value=0.7)
    heading, _, row = summarised(*timed, *figures, roofline)
    assert row[heading.index("CPU share of ceiling")] == "70 % of roofline"
    assert row[heading.index("CPU more")] == "peak saved bytes 1 MiB to 4 MiB"
    assert row[heading.index("GPU vs fastest peer")] == "4.00x index_select"


def test_a_summary_also_compares_with_what_a_library_has():
    own = [r for r in records() if r.provider == "index_select"]
    own = [replace(r, provider="hand-written mm", value=0.01) for r in own if r.unit == "s"]
    row = summarised(*records(), *own)[2]
    assert row[3] == "2.00x hand-written mm; 4.00x index_select"
