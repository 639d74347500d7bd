"""The whole demo at tiny size, once, and what it does when something is wrong."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from dataeff.demo import SpillError, lm, run_demo
from dataeff.demo.console import Console, readable_bytes


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "report"


@pytest.fixture(scope="module")
def report(directory):
    return run_demo(report_dir=directory, tiny=True, quiet=True)


def test_the_promised_figures_are_there(report, directory):
    written = json.loads((directory / "report.json").read_text())
    assert written == json.loads(json.dumps(report))
    gnn, lm_figures = written["gnn"], written["lm"]
    for key in ("test_accuracy", "majority_accuracy", "mlp_accuracy"):
        assert 0 <= gnn[key] <= 1
    assert gnn["num_nodes"] > 1000 and gnn["num_edges"] > gnn["num_nodes"]
    assert gnn["num_relations"] >= 12
    assert gnn["rows_gathered"] * 32 * 4 == sum(gnn["bytes_gathered"].values())
    assert lm_figures["weights_identical"] is True and lm_figures["losses_identical"] is True
    assert 0 < lm_figures["peak_saved_bytes_offload"] < lm_figures["peak_saved_bytes_keep"]
    assert lm_figures["bytes_written"] > 0 and lm_figures["bytes_read"] > 0
    assert lm_figures["step_time_ratio"] > 0
    assert {"machine", "versions"} <= set(written)


def test_training_changes_the_loss_and_every_figure_is_finite(report):
    for curve in (report["gnn"]["curve"], report["gnn"]["mlp_curve"]):
        assert all(map(math.isfinite, curve["loss"])) and curve["loss"][-1] < curve["loss"][0]
        assert len(curve["loss"]) == report["gnn"]["num_steps"] == curve["val_step"][-1]
    losses = report["lm"]["losses_keep"]
    assert losses[0] == pytest.approx(math.log(256), abs=0.5) and losses[-1] < losses[0]


def test_the_page_is_whole(report, directory):
    page = (directory / "report.html").read_text()
    assert page.count("<svg") == 5
    assert not re.search(r"<script|<link|<img|@import|url\(\s*['\"]?http", page)
    assert not re.search(r"""(?:href|src)=["'](?!#)""", page), "only references inside the page"
    assert f"{report['gnn']['test_accuracy']:.1%}" in page
    assert "same bits" in page


def test_only_the_report_is_left(report, directory):
    assert sorted(os.listdir(directory)) == ["report.html", "report.json"]


def test_the_same_seed_gives_the_same_figures(report, tmp_path):
    again = run_demo(report_dir=tmp_path, tiny=True, quiet=True)
    for key in ("test_accuracy", "mlp_accuracy", "num_edges", "curve"):
        assert again["gnn"][key] == report["gnn"][key], key
    assert again["lm"]["losses_offload"] == report["lm"]["losses_offload"]


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        assert any(p.name.startswith(".spill-") for p in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("dataeff.demo.run.run_gnn", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(report_dir=tmp_path, tiny=True, quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_report_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpillError, match=r"cannot write the report to .*file"):
        run_demo(report_dir=tmp_path / "file" / "report", tiny=True, quiet=True)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_a_wrong_scale_is_an_error(tmp_path, scale):
    with pytest.raises(ValueError, match="scale"):
        run_demo(report_dir=tmp_path, scale=scale, quiet=True)


def test_no_time_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="max_seconds"):
        run_demo(report_dir=tmp_path, max_seconds=0)


def tiny_lm(spill):
    settings = lm.TextSettings(
        dim=16, num_layers=1, num_heads=1, context=32, num_steps=2, num_warmup=1, max_bytes=10_000
    )
    return lm.run_lm(settings, torch.device("cpu"), 0, spill, Console(quiet=True))


def test_a_spill_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SpillError, match=r"cannot spill activations to .*missing: No such file"):
        tiny_lm(tmp_path / "missing")


def test_a_full_disk_is_found_before_it_fills(tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 10)
    monkeypatch.setattr(lm.shutil, "disk_usage", lambda path: full)
    with pytest.raises(SpillError, match="has 0 MiB free"):
        tiny_lm(tmp_path)
    assert not list(tmp_path.iterdir())


def test_bytes_are_readable():
    texts = [readable_bytes(n) for n in (0, 1023, 1536, 5 << 20, 3 << 40)]
    assert texts == ["0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3072.0 GiB"]


def test_ctrl_c_ends_the_program_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "dataeff", "demo", "--tiny"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while process.poll() is None and not list(tmp_path.glob("demo-report/.spill-*")):
                time.sleep(0.05)
            time.sleep(0.2)  # inside parsing or training
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert not list((tmp_path / "demo-report").iterdir())
