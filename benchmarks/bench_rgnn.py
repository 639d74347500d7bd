"""Training steps of RGCN and RGAT beside PyTorch Geometric's."""

WORKLOAD = "rgnn"


def test_rgnn(benchmark, step):
    benchmark(step)
