import json
from pathlib import Path

import pytest

from dataeff.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "explain_rgat.py"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exited:
        main(("rgnn", *arguments))
    code = exited.value.code
    out, err = capsys.readouterr()
    return (0 if code is None else code), out, err


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_explain_shows_every_stage(capsys, backend):
    code, out, err = run(capsys, "explain", str(EXAMPLE), "--backend", backend)
    assert (code, err) == (0, "")
    stages = ("traced", "compact", "reorder", "differentiate", "forward bytes and flops")
    kernels = ("forward kernels", "backward memory plan", f"backward source ({backend})")
    assert all(f"== {name} ==" in out for name in (*stages, *kernels))
    chosen = ("== forward schedules ==", ": tile 64 x 64 x 32, 4 warps, 3 stages; modelled ")
    assert all((text in out) == (backend == "triton") for text in chosen)
    assert ("@triton.jit" if backend == "triton" else "parallel_for") in out


@pytest.mark.parametrize("layer", ["rgcn", "hgt"])
def test_explain_shows_the_other_layers(capsys, layer):
    code, out, err = run(capsys, "explain", str(EXAMPLE.with_stem(f"explain_{layer}")))
    assert (code, err) == (0, "")
    stages = ("traced", "compact", "differentiate", "forward kernels", "backward memory plan")
    assert all(f"== {name} ==" in out for name in (*stages, "backward source (cpp)"))


def test_build_reports_every_kernel(capsys, tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "rgat.json"
    size = ("--in", "64", "--out", "64", "--heads", "2")
    code, out, _ = run(
        capsys, "build", "--layer", "rgat", *size, "--target", "sm_90", "--json", str(path)
    )
    assert code == 0 and "0 spill" in out
    report = json.loads(path.read_text())
    assert report["layer"] == "rgat" and report["shapes"]["weight"] == [64, 64, 64]
    kernels = report["kernels"]
    assert {k["direction"] for k in kernels} == {"forward", "backward"}
    assert {k["work"].split()[0].rstrip(",") for k in kernels} == {"traversal", "product", "weight"}
    assert all(k["registers"] > 0 and k["spill_bytes"] == 0 and k["fits"] for k in kernels)
    of = {k["work"].split()[0].rstrip(","): k["schedule"] for k in kernels}
    assert of["traversal"].keys() >= {"block_rows", "num_warps"}
    tile = {"block_m", "block_n", "block_k", "num_warps", "num_stages"}
    assert of["product"].keys() >= tile and of["weight"].keys() >= tile


TUNED = """
import torch
from dataeff import rgnn

@rgnn.layer
def tuned(g, x, W):
    return g.sum(rgnn.linear(g.src(x), W[g.etype]))

def example():
    graph = rgnn.Graph(torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 1]), num_nodes=2)
    args = torch.randn(2, 32), torch.randn(2, 32, 32)
    rgnn.tune(tuned, graph, *args, timer=lambda choice, step: choice.product is None)
    return tuned, graph, args
"""


def test_build_compiles_the_tiles_that_were_tuned(capsys, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("DATAEFF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", "triton")
    (tmp_path / "layer.py").write_text(TUNED)
    size = ("build", "--layer", str(tmp_path / "layer.py"), "--target", "sm_90", "--json")
    code, _, err = run(capsys, *size, str(tmp_path / "out.json"))
    assert (code, err) == (0, "")
    (kept,) = (tmp_path / "cache" / "tune").glob("*.json")
    tile = json.loads(kept.read_text())["candidates"][0]["choice"]["product"]
    kernels = json.loads((tmp_path / "out.json").read_text())["kernels"]
    products = [k["schedule"] for k in kernels if k["work"].startswith("product")]
    assert products and all([*p.values()] == [n for n in tile if n is not None] for p in products)


@pytest.mark.parametrize(
    ("layer", "typed"),
    [("rgat", False), ("hgt", True), (str(EXAMPLE.with_name("explain_hgt.py")), True)],
)
def test_build_compiles_what_graphs_of_typed_edges_run(capsys, monkeypatch, layer, typed):
    from dataeff.rgnn import build

    given = []
    monkeypatch.setattr(build, "layer_reports", lambda *a, **options: given.append(options) or [])
    run(capsys, "build", "--layer", layer, "--target", "sm_90")
    assert [options["typed"] for options in given] == [typed]


def test_build_fails_when_a_kernel_spills(capsys, monkeypatch):
    pytest.importorskip("triton")
    from dataeff.rgnn import build

    monkeypatch.setattr(build, "MAX_REGISTERS", 24)
    code, out, _ = run(capsys, "build", "--layer", "rgat", "--out", "256", "--target", "sm_80")
    assert code == 1 and ", 0 spill" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "--layer", "gcn"), "none of rgcn, rgat, hgt, simple_hgn, comp_gcn"),
        (("build", "--layer", "rgat", "--heads", "3"), "--heads 3"),
        (("build", "--layer", "rgat", "--dtype", "int8"), "'int8' is none of float32"),
        (("build", "--layer", "rgat", "--json", "/tmp"), "/tmp is a folder, not a file"),
        (("build", "--layer", "rgat", "--target", "hopper"), "sm_121, got 'hopper'"),
        (
            ("build", "--layer", "rgat", "--target", "sm_90", "--target", "sm_200"),
            "--target: target must be one of sm_80, ",  # before anything is compiled
        ),
        (("explain", "nowhere.py"), "nowhere.py is not a file"),
        (("explain", __file__), "needs a function example()"),
    ],
)
def test_mistakes_are_named(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err


ILL_TYPED = """
import torch
from dataeff import rgnn


@rgnn.layer
def wrong(g, x):
    return g.sum(g.src(x) + g.at_dst(x))


def example():
    return wrong, rgnn.Graph(torch.tensor([[0, 1], [1, 0]]), num_nodes=2), (torch.randn(2, 3),)
"""


@pytest.mark.parametrize("typed", [("explain",), ("build", "--layer")])
def test_a_layer_that_is_refused_is_told_without_the_compilers_own_lines(capsys, tmp_path, typed):
    path = tmp_path / "wrong.py"
    path.write_text(ILL_TYPED)
    code, out, err = run(capsys, *typed, str(path))
    assert (code, out) == (2, "") and "wrong.py:8: return g.sum(" in err and "Traceback" not in err


def test_a_backend_that_does_not_exist_in_the_environment_is_named(capsys, monkeypatch):
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", "numpy")
    code, out, err = run(capsys, "explain", str(EXAMPLE))
    assert (code, out) == (2, "")
    assert err.startswith("dataeff: DATAEFF_RGNN_BACKEND is 'numpy'; it must be one of ")
    assert err.count("\n") == 1
