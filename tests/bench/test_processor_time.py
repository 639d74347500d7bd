"""The share of the processors that other programs took."""

import os
import subprocess
import sys
import time

import pytest

from dataeff.bench import processor_time
from dataeff.bench.processor_time import ProcessorTime

BUSY = "import time; end = time.time() + 1.5\nwhile time.time() < end: pass"


def test_the_share_is_what_others_took(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    before = ProcessorTime(clock_s=10.0, busy_s=100.0, own_s=5.0)
    later = ProcessorTime(clock_s=14.0, busy_s=107.0, own_s=10.0)
    assert later.elsewhere_since(before) == (7 - 5) / 8
    assert before.elsewhere_since(before) == 0
    # Ticks of the system are coarser than the program's own time.
    assert ProcessorTime(11.0, 100.5, 5.75).elsewhere_since(before) == 0


@pytest.mark.skipif(not processor_time.STAT.exists(), reason="this system does not tell")
def test_another_program_shows():
    with subprocess.Popen([sys.executable, "-c", BUSY]) as other:
        time.sleep(0.3)
        before = ProcessorTime.now()
        time.sleep(0.7)
        now = ProcessorTime.now()
        other.wait()
    assert now.elsewhere_since(before) > 0.1 / (os.cpu_count() or 1)


def test_a_system_that_does_not_tell_counts_as_calm(monkeypatch, tmp_path):
    monkeypatch.setattr(processor_time, "STAT", tmp_path / "stat")
    before = ProcessorTime.now()
    assert ProcessorTime.now().elsewhere_since(before) == 0
