"""Rows of a host table: FeatureTable beside torch.index_select and plain indexing."""

WORKLOAD = "gather"


def test_gather(benchmark, step):
    benchmark(step)
