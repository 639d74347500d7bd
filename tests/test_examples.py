"""The examples are what users copy: short, and they run as written, in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "train_transformers_offload.py": ("transformers", "accelerate"),
    "train_lightning_offload.py": ("lightning.pytorch",),
}
ARGUMENTS = {
    "train_rgat.py": ["--tiny", "--epochs", "1"],
    "train_graphsage.py": ["--tiny", "--epochs", "1", "--table", "disk"],
    "train_gpt_offload.py": ["--tiny", "--steps", "2"],
    "train_transformers_offload.py": ["--tiny", "--steps", "2"],
    "train_lightning_offload.py": ["--tiny", "--steps", "2"],
    "train_sage_unified.py": ["--tiny", "--epochs", "1"],
    "explain_rgcn.py": [],
    "explain_rgat.py": [],
    "explain_hgt.py": [],
}
SAYS = {
    "train_rgat.py": "test accuracy",
    "train_graphsage.py": "test accuracy",
    "train_gpt_offload.py": "bytes_written",
    "train_transformers_offload.py": "bytes_written",
    "train_lightning_offload.py": "bytes_written",
    "train_sage_unified.py": "test accuracy",
    "explain_rgcn.py": "== forward kernels ==",
    "explain_rgat.py": "== forward kernels ==",
    "explain_hgt.py": "== forward kernels ==",
}


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_is_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 80


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_runs_as_written(name, tmp_path):
    for library in NEEDS.get(name, ()):
        pytest.importorskip(library)
    warnings = [] if name in NEEDS else ["-W", "error"]  # theirs are theirs
    if "torch_geometric" in (EXAMPLES / name).read_text():  # deprecated calls of its own
        warnings += ["-W", "ignore::DeprecationWarning"]
    command = [sys.executable, *warnings, str(EXAMPLES / name), *ARGUMENTS[name]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves no file behind"
