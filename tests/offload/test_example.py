"""The example trains, offloads, and ends with the weights of a run that keeps everything."""

import importlib.util
from pathlib import Path

import torch

PATH = Path(__file__).parents[2] / "examples" / "train_gpt_offload.py"


def test_example_gives_the_weights_of_keeping(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("train_gpt_offload", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    flags = ["--tiny", "--steps", "3", "--spill", str(tmp_path)]
    spilled, kept = example.main(flags).state_dict(), example.main([*flags, "--keep"]).state_dict()
    assert all(torch.equal(spilled[name], kept[name]) for name in kept)
    assert "bytes_written" in capsys.readouterr().out
    assert len(PATH.read_text().splitlines()) < 80
