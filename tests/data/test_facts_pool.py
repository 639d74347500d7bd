import subprocess

import pytest

from dataeff.data import facts_pool
from dataeff.data.facts_pool import read_files


@pytest.fixture
def paths(tmp_path):
    for i in range(40):
        text = "def f(:\n" if i == 7 else f"def f{i}(): return g{i}()\n"
        (tmp_path / f"m{i}.py").write_text(text)
    return [str(tmp_path / f"m{i}.py") for i in range(40)]


def test_processes_read_what_this_process_reads(paths):
    seen = []
    expected = read_files(paths, num_workers=0)
    assert read_files(paths, 2, lambda done, total: seen.append((done, total))) == expected
    assert expected[7] is None and expected[8][0][1][2] == "f8"
    assert seen[-1] == (40, 40)


def test_no_process_outlives_an_interrupted_read(paths, monkeypatch):
    started = []
    popen = subprocess.Popen

    def remember(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(facts_pool.subprocess, "Popen", remember)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_files(paths, 2, interrupt)
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_a_reader_that_dies_is_reported(paths, monkeypatch, tmp_path):
    broken = tmp_path / "broken_reader.py"
    broken.write_text("raise SystemExit(3)\n")
    monkeypatch.setattr(facts_pool.python_facts, "__file__", str(broken))
    with pytest.raises(RuntimeError, match="num_workers=0"):
        read_files(paths, 2)
