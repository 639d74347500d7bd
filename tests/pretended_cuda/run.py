"""Runs pytest on a pretended device: `python tests/pretended_cuda/run.py [--seed N] [arguments]`.

With a seed of 0 every stream works at once; any other says which streams are late, and how late.
"""

import argparse
import importlib.metadata
import os
import sys

from build import DRIVER, HERE, ROOT, RUNTIME, build

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    options, arguments = parser.parse_known_args()
    version = importlib.metadata.version("torch")
    folder = ROOT / "build" / f"pretended-{sys.implementation.cache_tag}-{version}"
    build(folder)
    os.environ["LD_PRELOAD"] = f"{folder / RUNTIME}:{folder / DRIVER}"
    os.environ["PRETENDED_CUDA"] = str(folder)
    os.environ["PRETENDED_CUDA_SEED"] = str(options.seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = f"{HERE}:{ROOT}"
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "pytest", "-p", "plugin", *arguments])
