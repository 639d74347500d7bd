"""The README's Python runs as written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*")) == []


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_block_is_short(code):
    assert len([line for line in code.splitlines() if line.strip()]) <= 16


def test_there_is_a_block_for_each_system():
    text = "\n".join(BLOCKS)
    for name in ("FeatureTable", "NeighborSampler", "rgnn.layer", "ActivationOffload"):
        assert name in text


def test_messages_in_troubleshooting_are_those_that_are_shown():
    paths = [ROOT / "setup.py", *ROOT.glob("dataeff/**/*.py"), *ROOT.glob("csrc/**/*.*")]
    # A message that goes over several lines of source, or around a value, is several literals.
    shown = re.sub(r'"\s*f?"', "", "\n".join(path.read_text() for path in paths))
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [text for row in rows for text in re.findall("`(.*?)`", row) if "c++" not in text]
    parts = [part for text in quoted for part in re.split(r"\.\.\.|\bN\b|\btyper\b", text)]
    parts = [part.strip() for part in parts if len(part.strip()) > 3]
    assert len(parts) >= 10
    assert [part for part in parts if part not in shown] == []


def test_links_point_at_files_that_exist():
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target


def test_files_that_contributing_names_exist():
    text = CONTRIBUTING.read_text()
    named = re.findall(r"`((?:csrc|dataeff|tests|benchmarks)/[\w/]+\.\w+)`", text)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []
