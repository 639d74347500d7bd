import ctypes

import pytest
import torch

from dataeff.doctor import gpu


def make_link(sysfs, speed, width, widest, address="0000:3b:00.0"):
    folder = sysfs / address
    folder.mkdir(parents=True)
    (folder / "max_link_speed").write_text(f"{speed}\n")
    (folder / "current_link_width").write_text(f"{width}\n")
    (folder / "max_link_width").write_text(f"{widest}\n")
    return address


def test_full_width_link_is_fine(monkeypatch, tmp_path):
    address = make_link(tmp_path, "32.0 GT/s PCIe", 16, 16)
    monkeypatch.setattr(gpu, "pci_address", lambda ordinal: address)
    found = gpu.pcie_link(tmp_path)
    assert found.ok and found.figures == {"generation": 5, "width": 16, "max_width": 16}


def test_half_width_link_costs_half_the_rate(monkeypatch, tmp_path):
    address = make_link(tmp_path, "16.0 GT/s PCIe", 8, 16)
    monkeypatch.setattr(gpu, "pci_address", lambda ordinal: address)
    found = gpu.pcie_link(tmp_path)
    assert not found.ok and "generation 4, x8 of x16" in found.value and "8 of 16" in found.cost


def test_hidden_link_falls_back_to_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "pci_address", lambda ordinal: "0000:00:01.0")
    monkeypatch.setattr(gpu, "output_of", lambda command: "5, 16, 16\n")
    assert gpu.pcie_link(tmp_path).figures["generation"] == 5
    monkeypatch.setattr(gpu, "output_of", lambda command: "[N/A], [N/A], [N/A]\n")
    found = gpu.pcie_link(tmp_path)
    assert found.ok and "not told" in found.value


def test_unknown_speed_is_not_guessed(tmp_path):
    address = make_link(tmp_path, "Unknown", 0, 16)
    assert gpu.link_from_sysfs(tmp_path, address) is None


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert gpu.driver_version() is None
    found = gpu.driver()
    assert not found.ok and found.value == "not found"


@pytest.mark.parametrize(
    ("runtime", "driver", "ok"),
    [("13.0", 13020, True), ("13.0", 12080, False), ("12.8", 13000, True), ("13.0", None, False)],
)
def test_cuda_newer_than_the_driver(monkeypatch, runtime, driver, ok):
    monkeypatch.setattr(torch.version, "cuda", runtime)
    monkeypatch.setattr(gpu, "driver_version", lambda: driver)
    assert gpu.cuda_runtime().ok is ok


def test_cpu_build_of_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    found = gpu.cuda_runtime()
    assert not found.ok and "CPU build" in found.value


def test_findings_of_this_machine():
    found = {finding.name: finding for finding in gpu.findings()}
    assert found["GPU"].ok or not torch.cuda.is_available()
    assert ("host to device" in found) == torch.cuda.is_available()
    if torch.cuda.is_available():
        assert found["host to device"].figures["bandwidth_gbs"] > 0
