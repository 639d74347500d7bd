"""Compile every published layer for every target, width, number of heads and dtype.

    python benchmarks/build_grid.py [--target sm_90 ...] [--layer rgat ...] [--width 64 ...]
                                    [--precision bf16 ...] [--elements 1024 ...] [--warps 2 ...]

The layer `products` stands for the typed products and weight gradients that layers share, on every
tile that `rgnn.tune` tries. `--elements` and `--warps` are sizes of a traversal's blocks, the usual
ones by default; `rgnn.tune` tries others.
Prints the kernels that spill or do not fit, and the most registers; exits with 1 if there are any.
Takes minutes, and no GPU.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator

import torch

from dataeff.nn.published import PUBLISHED
from dataeff.rgnn.aot import KernelReport, capability_of
from dataeff.rgnn.build import TARGETS, dw_report, gemm_report, layer_reports
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.triton.tiles import Product, ranked_tiles

SIZES = (100_000, 100_000, 1_000_000, 400_000, 400_000, 64, 4)
WIDTHS, HEADS = (32, 64, 128, 256), (1, 4)
PRECISIONS = {
    "ieee": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "fp64": (torch.float64, "ieee"),
}


def kernels(
    name: str,
    width: int,
    heads: int,
    dtype: torch.dtype,
    precision: str,
    target: str,
    choice: Choice,
) -> Iterator[tuple[str, KernelReport]]:
    """What each kernel of one point of the grid does, and what it uses."""
    if name == "products":
        how = dtype, width, width // heads, target, precision
        for gradient in (False, True):
            product = Product(gradient, 1, width, width // heads, 1 << 20, 64)
            for tile in ranked_tiles(product, dtype, precision, capability_of(target)):
                if gradient:
                    yield f"weight gradient on {tile}", dw_report(*how, tile=tile)
                    continue
                for transposed in (False, True):
                    work = f"product on {tile}{', transposed' if transposed else ''}"
                    yield work, gemm_report(*how, transposed=transposed, tile=tile)
        return
    found = PUBLISHED[name]
    shapes = found.shapes(SIZES[0], SIZES[6], SIZES[5], width, heads, width // heads)
    how = {"dtype": dtype, "target": target, "precision": precision, "typed": found.typed}
    statics = found.statics(heads)
    for report in layer_reports(found.layer, shapes, SIZES, statics, choice=choice, **how):
        yield f"{report.direction} {report.work}", report.kernel


def _choice(elements: int, warps: int) -> Choice:
    return Choice(block_elements=elements, num_warps=warps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = (*PUBLISHED, "products")
    parser.add_argument("--target", nargs="*", default=TARGETS)
    parser.add_argument("--layer", nargs="*", default=names, choices=names)
    parser.add_argument("--width", nargs="*", default=WIDTHS, type=int)
    parser.add_argument("--precision", nargs="*", default=tuple(PRECISIONS)[:4], choices=PRECISIONS)
    parser.add_argument("--elements", nargs="*", default=(Choice.block_elements,), type=int)
    parser.add_argument("--warps", nargs="*", default=(Choice.num_warps,), type=int)
    chosen = parser.parse_args()
    count, bad = 0, 0
    points = itertools.product(
        *(chosen.target, chosen.layer, chosen.width, HEADS),
        map(PRECISIONS.get, chosen.precision),
        itertools.starmap(_choice, itertools.product(chosen.elements, chosen.warps)),
    )
    for target, name, width, heads, (dtype, precision), choice in points:
        where = f"{name} {width} wide, {heads} heads, {dtype}, {precision}, {target}"
        if choice != Choice():
            where += f", blocks of {choice.block_elements} on {choice.num_warps} warps"
        most = 0
        for work, kernel in kernels(name, width, heads, dtype, precision, target, choice):
            count, most = count + 1, max(most, kernel.registers)
            if not kernel.fits:
                bad += 1
                print(f"{where}: {work}: {kernel}")
        print(f"{where}: at most {most} registers", flush=True)
    print(f"{count} kernels, {bad} spill or do not fit")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
