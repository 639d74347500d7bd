"""DDP, FSDP2, pipelines and Accelerate on two gloo processes: activations on disk, same bits."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

RANKS = Path(__file__).parent / "ranks" / "train.py"


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_under_torchrun(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
        str(RANKS), f"{tmp_path}/spill{{local_rank}}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("same bits:")]
    assert len(said) == 6 + (importlib.util.find_spec("accelerate") is not None), done.stdout
    # A folder per rank was made, and no file is left in it.
    assert sorted(os.listdir(tmp_path)) == ["spill0", "spill1"]
    assert not any(files for _, _, files in os.walk(tmp_path))
