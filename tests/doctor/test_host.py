import platform
import resource

import pytest

from dataeff.doctor import host


@pytest.fixture
def proc(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "sys/vm").mkdir(parents=True)
    (tmp_path / "self/status").write_text("Name:\tpython\nCapEff:\t0000000000000000\n")
    (tmp_path / "sys/vm/max_map_count").write_text("65530\n")
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 1048576 kB\n")
    return tmp_path


def test_memory(proc):
    found = host.memory(proc)
    assert not found.ok and found.value == "1.0 of 16.0 GiB available"
    (proc / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    assert host.memory(proc).ok


@pytest.mark.parametrize(
    ("limit", "capabilities", "ok", "value"),
    [
        (8 << 20, "0000000000000000", False, "8 MiB"),
        (8 << 20, "0000000000004000", True, "8 MiB (lifted: CAP_IPC_LOCK)"),
        (resource.RLIM_INFINITY, "0000000000000000", True, "unlimited"),
    ],
)
def test_locked_memory(monkeypatch, proc, limit, capabilities, ok, value):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    (proc / "self/status").write_text(f"CapEff:\t{capabilities}\n")
    found = host.locked_memory(proc)
    assert (found.ok, found.value) == (ok, value)


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("[always] madvise never", True),
        ("always [madvise] never", True),
        ("always madvise [never]", False),
        (None, False),
    ],
)
def test_huge_pages(tmp_path, text, ok):
    if text is not None:
        folder = tmp_path / "kernel/mm/transparent_hugepage"
        folder.mkdir(parents=True)
        (folder / "enabled").write_text(text + "\n")
    assert host.huge_pages(tmp_path).ok is ok


def test_map_count(proc):
    assert host.map_count(proc).ok
    (proc / "sys/vm/max_map_count").write_text("1000\n")
    found = host.map_count(proc)
    assert not found.ok and found.figures == {"count": 1000} and "sysctl" in found.remedy


def test_a_kernel_that_hides_its_files_is_no_failure(tmp_path):
    for found in (host.memory(tmp_path), host.map_count(tmp_path)):
        assert found.ok and "cannot be read" in found.value
    assert not host.may_lock_anything(tmp_path)


def test_wsl_cannot_pin_in_place(monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: "5.15.0-microsoft-standard-WSL2")
    assert not host.kernel().ok


def test_this_machine():
    found = {finding.name: finding for finding in host.findings()}
    assert found["memory"].figures["total_gib"] > 0
    assert found["vm.max_map_count"].figures["count"] > 0
