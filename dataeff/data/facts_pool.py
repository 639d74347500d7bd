"""Reads many Python files at once, in processes that never import torch."""

from __future__ import annotations

import contextlib
import marshal
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from dataeff.data import python_facts
from dataeff.data.python_facts import Facts

_FILES_PER_REQUEST = 16


def read_files(
    paths: Sequence[str],
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Facts | None]:
    """The facts of each file, in order; None for one that is not Python of this version.

    Args:
        paths: the files.
        num_workers: processes to start; 0 reads in this one. By default one per usable core.
        progress: called with (files read, files) now and then.

    Raises:
        RuntimeError: a reading process died.
    """
    if num_workers is None:
        num_workers = min(len(os.sched_getaffinity(0)), 8) if len(paths) >= 64 else 0
    requests = [
        list(paths[i : i + _FILES_PER_REQUEST]) for i in range(0, len(paths), _FILES_PER_REQUEST)
    ]
    facts: list[Facts | None] = []
    for answer in _answers(requests, num_workers):
        facts += answer
        if progress is not None:
            progress(len(facts), len(paths))
    return facts


def _answers(requests: list[list[str]], num_workers: int) -> Iterator[list[Facts | None]]:
    if num_workers == 0 or not sys.executable:
        for request in requests:
            yield [python_facts.read_file(path) for path in request]
        return
    readers = [_Reader() for _ in range(min(num_workers, len(requests)))]
    idle: queue.SimpleQueue[_Reader] = queue.SimpleQueue()
    for reader in readers:
        idle.put(reader)

    def answer(request: list[str]) -> list[Facts | None]:
        reader = idle.get()
        try:
            return reader.ask(request)
        finally:
            idle.put(reader)

    pool = ThreadPoolExecutor(len(readers), thread_name_prefix="dataeff-facts")
    try:
        yield from pool.map(answer, requests)
    finally:  # also when the caller stops early, or on Ctrl-C
        for reader in readers:
            reader.close()
        pool.shutdown(cancel_futures=True)


class _Reader:
    """One process that runs `python_facts.py`."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", python_facts.__file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def ask(self, paths: list[str]) -> list[Facts | None]:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None
        try:
            marshal.dump(paths, requests)
            requests.flush()
            facts: list[Facts | None] = marshal.load(answers)
        except (EOFError, OSError, ValueError) as error:
            status = self._process.poll()
            raise RuntimeError(
                f"the process reading {paths[0]} and {len(paths) - 1} files after it ended with "
                f"status {status}; num_workers=0 reads them in this process"
            ) from error
        return facts

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # bytes of a request that nobody reads any more
                    pipe.close()
