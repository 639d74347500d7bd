"""The Python of the README and of the guides runs as written, and what they name exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dataeff import rgnn
from dataeff.cli import main
from dataeff.offload.report import OffloadReport
from dataeff.rgnn.graph_symbol import GraphSymbol, PerRelation

ROOT = Path(__file__).resolve().parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
GUIDES = [ROOT / "docs" / f"{name}.md" for name in ("features", "layers", "offload")]


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


BLOCKS = blocks_of(README)
ALL_BLOCKS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in (README, *GUIDES)
    for number, code in enumerate(blocks_of(page))
]


# Runs each argument as a program of its own, in a process of its own that has imported torch.
RUN_EACH = """
import os, sys, warnings
import torch

for number, code in enumerate(sys.argv[1:]):
    with warnings.catch_warnings():  # Python 3.12 warns of a fork beside the threads of numpy
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        exec(compile(code, f"block {number}", "exec"), {"__name__": "__main__"})
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"block {number} failed:\\n{code}")
"""


@pytest.mark.parametrize("page", [README, *GUIDES], ids=lambda page: page.stem)
def test_blocks_of_a_page_run(page, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN_EACH, *blocks_of(page)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*")) == []


@pytest.mark.parametrize("code", ALL_BLOCKS)
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


@pytest.mark.parametrize("page", [README, ROOT / "docs/offload.md"], ids=lambda page: page.stem)
def test_plans_that_a_page_asks_for_have_something_to_offload(page, capsys):
    commands = re.findall(r"`dataeff (plan --model [^`]+)`", page.read_text())
    assert commands
    for command in commands:
        with pytest.raises(SystemExit) as exited:
            main(command.split())
        assert not exited.value.code and "do not offload" not in capsys.readouterr().out


@pytest.mark.parametrize("page", [README, *GUIDES], ids=lambda page: page.stem)
def test_links_point_at_files_that_exist(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            assert heading in [text.lower().replace(" ", "-") for text in headings], link


def test_the_guide_to_layers_has_every_operation():
    text = (ROOT / "docs/layers.md").read_text()
    functions = [name for name in rgnn.__all__ if name.islower()]
    of_graph = [name for owner in (GraphSymbol, PerRelation) for name in vars(owner)]
    missing = [name for name in functions + of_graph if not re.search(rf"\b{name}\b", text)]
    assert [name for name in missing if not name.startswith("_")] == []


def test_the_guide_to_offloading_names_fields_of_the_report():
    first_columns = re.findall(
        r"^\| (`.*?) \|", (ROOT / "docs/offload.md").read_text(), re.MULTILINE
    )
    named = set(re.findall(r"`([a-z_]+)`", "\n".join(first_columns)))
    assert len(named) > 8
    assert named <= set(OffloadReport.__dataclass_fields__)


def test_files_that_contributing_names_exist():
    text = CONTRIBUTING.read_text()
    named = re.findall(r"`((?:csrc|dataeff|tests|benchmarks)/[\w/]+\.\w+)`", text)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []
