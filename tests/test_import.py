"""What `import dataeff` costs and what it leaves alone."""

import importlib
import json
import subprocess
import sys

import pytest

import dataeff

PROBE = """
import json, sys, threading, time
sys.dont_write_bytecode = True
import torch
opened = []
sys.addaudithook(
    lambda event, args: opened.append(args[0])
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    else None
)
modules = set(sys.modules)
start = time.thread_time()
import dataeff
elapsed_s = time.thread_time() - start
print(json.dumps({
    "elapsed_s": elapsed_s,
    "cuda": torch.cuda.is_initialized(),
    "threads": [line for line in open("/proc/self/status") if line.startswith("Threads")],
    "python_threads": threading.active_count(),
    "opened": [str(path) for path in opened],
    "modules": sorted(set(sys.modules) - modules),
}))
"""


def probe(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_leaves_the_process_alone():
    found = probe(PROBE)
    assert found["opened"] == []
    assert found["cuda"] is False
    assert found["python_threads"] == 1
    without = probe(PROBE.replace("import dataeff\n", "pass\n"))
    assert found["threads"] == without["threads"]


def test_import_takes_little_over_torch():
    # Processor time of the importing thread, the least of three: the contract is 50 ms, and this
    # is a promise of the interface, not a benchmark.
    assert min(probe(PROBE)["elapsed_s"] for _ in range(3)) <= 0.050


def test_import_loads_no_heavy_package():
    loaded = probe(PROBE)["modules"]
    heavy = ("triton", "torch_geometric", "matplotlib", "typer", "rich", "scipy", "dataeff.rgnn")
    assert [name for name in loaded if name.startswith(heavy)] == []
    assert {"dataeff._core", "dataeff._ops"} <= set(loaded)


def test_public_names_resolve():
    for name in dataeff.__all__:
        assert getattr(dataeff, name) is not None


@pytest.mark.parametrize("name", ["features", "nn", "rgnn", "sampling"])
def test_a_system_is_imported_when_it_is_named(monkeypatch, name):
    monkeypatch.delattr(dataeff, name, raising=False)  # others may have imported it
    assert getattr(dataeff, name) is importlib.import_module(f"dataeff.{name}")


WITHOUT = """
import json, sys
sys.modules[{missing!r}] = None  # as it is where it is not installed
try:
    import dataeff.integrations.pyg
except ModuleNotFoundError as error:
    print(json.dumps([str(error), error.name]))
"""


def test_what_to_install_for_pyg_is_said():
    said, name = probe(WITHOUT.format(missing="torch_geometric"))
    assert said.endswith("pip install 'dataeff[pyg]'")
    assert name == "torch_geometric"
