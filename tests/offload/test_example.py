"""Each example trains, offloads, and ends with the weights of a run that keeps everything."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("train_gpt_offload", ()),
        ("train_transformers_offload", ("transformers", "accelerate")),
        ("train_lightning_offload", ("lightning.pytorch",)),
    ],
)
@pytest.mark.filterwarnings("default")  # the libraries' own warnings are theirs
def test_example_gives_the_weights_of_keeping(tmp_path, capsys, name, needs):
    for library in needs:
        pytest.importorskip(library)
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    flags = ["--tiny", "--steps", "3", "--spill", str(tmp_path)]
    spilled, kept = example.main(flags).state_dict(), example.main([*flags, "--keep"]).state_dict()
    assert all(torch.equal(spilled[name], kept[name]) for name in kept)
    assert "bytes_written" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) < 80
