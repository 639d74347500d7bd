"""Training steps of a GPT with activations on disk, kept, and under `save_on_cpu`."""

WORKLOAD = "offload"


def test_offload(benchmark, step):
    benchmark(step)
