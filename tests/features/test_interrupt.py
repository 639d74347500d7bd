"""Ctrl-C during gathers and prefetches: the process hears it, and the table goes on."""

import signal
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import sys
import numpy as np
import torch
import dataeff

kind, path = sys.argv[1:]
x = torch.arange(200_000.0)[:, None].expand(-1, 16).contiguous()
if kind == "disk":
    np.save(path, x.numpy())
    table = dataeff.FeatureTable.open(path, cache_bytes=0)
else:
    table = dataeff.FeatureTable(x)
index = torch.randint(len(x), (20_000,))
under_way = []
try:
    print("ready", flush=True)
    while True:
        under_way.append(table.prefetch(index))
        table[index]
        if len(under_way) > 3:
            under_way.pop(0).wait()
except KeyboardInterrupt:
    assert torch.equal(table[index], x[index])
    table.close()
    for prefetch in under_way:
        try:
            assert torch.equal(prefetch.wait(), x[index])
        except RuntimeError as error:
            assert "closed before" in str(error)
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_an_interrupt_is_heard_and_the_table_goes_on(kind, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), kind, str(tmp_path / "x.npy")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (0, "interrupted\n"), err
