"""Neighbour sampling on a power-law graph beside torch-sparse, pyg-lib and plain torch."""

WORKLOAD = "sample"


def test_sample(benchmark, step):
    benchmark(step)
