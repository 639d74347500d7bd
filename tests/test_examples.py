"""The examples are what users copy: short, and they run as written, in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# tests/offload/test_example.py runs these, and compares what they train.
OFFLOADS = {
    "train_gpt_offload.py",
    "train_lightning_offload.py",
    "train_transformers_offload.py",
}
ARGUMENTS = {
    "train_rgat.py": ["--tiny", "--epochs", "1"],
    "train_graphsage.py": ["--tiny", "--epochs", "1", "--table", "disk"],
    "train_sage_unified.py": ["--tiny", "--epochs", "1"],
    "explain_rgcn.py": [],
    "explain_rgat.py": [],
    "explain_hgt.py": [],
}
SAYS = {
    "train_rgat.py": "test accuracy",
    "train_graphsage.py": "test accuracy",
    "train_sage_unified.py": "test accuracy",
    "explain_rgcn.py": "== forward kernels ==",
    "explain_rgat.py": "== forward kernels ==",
    "explain_hgt.py": "== forward kernels ==",
}


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS) | OFFLOADS


@pytest.mark.parametrize("name", [*ARGUMENTS, *sorted(OFFLOADS)])
def test_an_example_is_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 80


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_runs_as_written(name, tmp_path):
    warnings = ["-W", "error"]
    if "torch_geometric" in (EXAMPLES / name).read_text():  # deprecated calls of its own
        warnings += ["-W", "ignore::DeprecationWarning"]
    command = [sys.executable, *warnings, str(EXAMPLES / name), *ARGUMENTS[name]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves no file behind"
