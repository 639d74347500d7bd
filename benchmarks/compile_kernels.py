"""Compile the kernels of relational cases, all at the same time, so that a benchmark finds them.

    python benchmarks/compile_kernels.py "RGCNConv training biokg " "HGTConv training am " ...

Triton compiles a kernel where it is first launched, one after another: for a layer that takes
longer than to measure it. Runs what is ours in each case once, in a process per case; the kernels
stay in Triton's cache.
"""

import subprocess
import sys

from dataeff.bench.case import Options, Unavailable
from dataeff.bench.rgnn import cases


def run_once(start: str) -> None:
    case = next(case for case in cases(Options()) if case.size.startswith(start))
    inputs = case.inputs()
    for provider in case.providers:
        if provider.role == "ours":
            try:
                provider.prepare(inputs).call()
            except Unavailable as reason:
                print(f"{case.size}, {provider.name}: {reason}")


def main(starts: list[str]) -> None:
    if len(starts) == 1:
        run_once(starts[0])
        return
    running = [subprocess.Popen([sys.executable, __file__, start]) for start in starts]
    sys.exit(max(process.wait() for process in running))


if __name__ == "__main__":
    main(sys.argv[1:])
