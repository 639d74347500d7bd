"""Writes and reads of a file past the page cache: the engines, a thread pool, fio."""

WORKLOAD = "storage"


def test_storage(benchmark, step):
    benchmark(step)
