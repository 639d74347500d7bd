"""Compile every published layer for every target, width, number of heads and dtype.

    python benchmarks/build_grid.py [--target sm_90 ...] [--layer rgat ...] [--width 64 ...]
                                    [--precision bf16 ...] [--elements 1024 ...]

The layer `products` stands for the typed products that layers share, on tiles of every size.
`--elements` are sizes of a traversal's blocks, the usual one by default; `rgnn.tune` tries others.
Prints the kernels that spill or do not fit, and the most registers; exits with 1 if there are any.
Takes minutes, and no GPU.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator

import torch

from dataeff.rgnn.aot import KernelReport
from dataeff.rgnn.build import TARGETS, gemm_report, layer_reports
from dataeff.rgnn.published import PUBLISHED
from dataeff.rgnn.triton_source import BLOCK_ELEMENTS

SIZES = (100_000, 100_000, 1_000_000, 400_000, 400_000, 64, 4)
WIDTHS, HEADS = (32, 64, 128, 256), (1, 4)
PRECISIONS = {
    "ieee": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "fp64": (torch.float64, "ieee"),
}


TILES = (16, 32, 64)


def kernels(
    name: str,
    width: int,
    heads: int,
    dtype: torch.dtype,
    precision: str,
    target: str,
    elements: int,
) -> Iterator[tuple[str, KernelReport]]:
    """What each kernel of one point of the grid does, and what it uses."""
    if name == "products":
        for block_m, transposed in itertools.product(TILES, (False, True)):
            yield (
                f"product on tiles of {block_m}{', transposed' if transposed else ''}",
                gemm_report(
                    *(dtype, width, width // heads, target, precision),
                    transposed=transposed,
                    block_m=block_m,
                ),
            )
        return
    found = PUBLISHED[name]
    shapes = found.shapes(SIZES[0], SIZES[6], SIZES[5], width, heads, width // heads)
    how = {"dtype": dtype, "target": target, "precision": precision, "typed": found.typed}
    how["elements"] = elements
    for report in layer_reports(found.layer, shapes, SIZES, found.statics, **how):
        yield f"{report.direction} {report.work}", report.kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = (*PUBLISHED, "products")
    parser.add_argument("--target", nargs="*", default=TARGETS)
    parser.add_argument("--layer", nargs="*", default=names, choices=names)
    parser.add_argument("--width", nargs="*", default=WIDTHS, type=int)
    parser.add_argument("--precision", nargs="*", default=tuple(PRECISIONS)[:4], choices=PRECISIONS)
    parser.add_argument("--elements", nargs="*", default=(BLOCK_ELEMENTS,), type=int)
    chosen = parser.parse_args()
    count, bad = 0, 0
    points = itertools.product(
        *(chosen.target, chosen.layer, chosen.width, HEADS),
        map(PRECISIONS.get, chosen.precision),
        chosen.elements,
    )
    for target, name, width, heads, (dtype, precision), elements in points:
        where = f"{name} {width} wide, {heads} heads, {dtype}, {precision}, {target}"
        where += "" if elements == BLOCK_ELEMENTS else f", blocks of {elements}"
        most = 0
        for work, kernel in kernels(name, width, heads, dtype, precision, target, elements):
            count, most = count + 1, max(most, kernel.registers)
            if not kernel.fits:
                bad += 1
                print(f"{where}: {work}: {kernel}")
        print(f"{where}: at most {most} registers", flush=True)
    print(f"{count} kernels, {bad} spill or do not fit")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
