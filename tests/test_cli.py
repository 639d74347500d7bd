import builtins
import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch

import dataeff
from dataeff.bench import Record, read
from dataeff.cli import main
from dataeff.cli.app import COMMANDS
from dataeff.offload import OffloadReport


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    code = exited.value.code
    out, err = capsys.readouterr()
    return (0 if code is None else code), out, err


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"dataeff {dataeff.__version__}\n", "")


def test_help_lists_the_commands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(command in out for command in COMMANDS)


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch, capsys):
    real_import = builtins.__import__

    def no_typer(name, *rest, **more):
        if name == "typer":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
        return real_import(name, *rest, **more)

    for name in [name for name in sys.modules if name.startswith("dataeff.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", no_typer)
    code, _, _ = run(capsys, "--help")
    assert "typer" in code and "pip install 'dataeff[cli]'" in code and "\n" not in code


def test_help_imports_no_heavy_package():
    probe = (
        "import sys, dataeff.cli\n"
        "try: dataeff.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'matplotlib', 'torch_geometric', 'triton', 'scipy', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    with_torch = "import sys, torch; print(sorted({'triton', 'scipy'} & set(sys.modules)))"
    bare = subprocess.run([sys.executable, "-c", with_torch], capture_output=True, text=True)
    ours = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert ours.stderr == bare.stdout  # nothing beyond what torch itself brings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "nope"], "unknown benchmark 'nope': choose from"),
        (["bench", "all", "--json", "/no/such/folder/out.json"], "folder /no/such/folder"),
        (
            ["bench", "offload", "--rok", "--quick", "--only", "batch=0"],
            "--only: no case of offload holds",
        ),
        (["bench", "all", "--json", "/tmp"], "/tmp is a folder, not a file"),
        (["bench", "all", "--plot", "out.xyz"], "out.xyz ends in none of"),
        (["bench", "all", "--dir", "/no/such/dir"], "/no/such/dir is not a directory"),
        (["bench", "all", "--device", "tpu"], "'tpu' is neither cpu nor cuda"),
        (["doctor", "--dir", "/no/such/dir"], "/no/such/dir is not a directory"),
        (["demo", "--scale", "0"], "--scale: 0.0 is not above 0"),
        (["demo", "--max-seconds", "-1"], "--max-seconds: -1.0 is not positive"),
        (["demo", "--spill", "/no/such/dir"], "/no/such/dir is not a directory"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and message in err
    assert err.startswith("dataeff: ") and err.count("\n") == 1 and out == ""


def a_workload(options, say, keep):
    say("fake: n=1")
    shared = ("1", "n=1", "cpu: x", {"torch": "2.13.0"}, "", "2026-01-02T03:04:05+00:00", 2)
    times = [("torch", "peer", 0.2), ("dataeff", "ours", 0.1)]
    records = [
        Record("fake", name, role, metric, value, *shared)
        for name, role, seconds in times
        for metric, value in (("time_s", seconds), ("time_spread_s", 0.0))
    ]
    keep(records)
    if options.only == "fails":
        raise KeyboardInterrupt
    return records


@pytest.fixture
def fake_workload(monkeypatch):
    from dataeff.cli import bench

    monkeypatch.setattr(bench, "NAMES", ("fake", "all"))
    monkeypatch.setattr(bench, "workloads", lambda: {"fake": a_workload})


def test_bench_prints_a_table_writes_records_and_draws(fake_workload, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    out_json, out_png = tmp_path / "out.json", tmp_path / "out.png"
    with pytest.raises(SystemExit):
        main(["bench", "fake", "--quick", "--json", str(out_json), "--plot", str(out_png)])
    out, err = capsys.readouterr()
    assert "2.00x" in out and "fake: n=1" in err
    assert [record.provider for record in read(out_json)] == ["torch"] * 2 + ["dataeff"] * 2
    assert out_png.read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_bench_keeps_the_cases_that_ended(fake_workload, capsys, tmp_path):
    kept = tmp_path / "out.json"
    code, *_ = run(capsys, "bench", "fake", "--only", "fails", "--json", str(kept))
    assert code == 130
    assert [record.provider for record in read(kept)] == ["torch"] * 2 + ["dataeff"] * 2


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_ended_bench_leaves_no_folder(tmp_path, sent):
    command = [sys.executable, "-m", "dataeff", "bench", "offload", "--quick", "--only", "step"]
    bench = subprocess.Popen([*command, "--dir", str(tmp_path)], stderr=subprocess.PIPE, text=True)
    with bench:
        for _ in range(600):
            if list(tmp_path.iterdir()) or bench.poll() is not None:
                break
            time.sleep(0.1)
        assert list(tmp_path.iterdir()), "it has not begun"
        bench.send_signal(sent)
        bench.communicate(timeout=60)
    assert bench.returncode == 128 + sent
    assert list(tmp_path.iterdir()) == []


def test_signals_do_as_before_when_a_command_has_ended(capsys):
    before = signal.getsignal(signal.SIGTERM)
    run(capsys, "--version")
    assert signal.getsignal(signal.SIGTERM) is before


def test_doctor_prints_json(capsys, tmp_path):
    code, out, _ = run(capsys, "doctor", "--json", "--dir", str(tmp_path))
    report = json.loads(out)
    assert code == 0 and report["ok"] is True
    names = [finding["name"] for finding in report["findings"]]
    assert {"Python", "torch", "GPU", "io_uring", "GPUDirect Storage"} <= set(names)


def test_doctor_prints_where_there_is_no_sign_for_a_tick(monkeypatch):
    from dataeff.doctor import Finding

    monkeypatch.setattr(
        "dataeff.doctor.examine", lambda directory: [Finding("torch", True, "2.13")]
    )
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    with pytest.raises(SystemExit) as exited:
        main(["doctor"])
    sys.stdout.flush()
    assert not exited.value.code and b"?   torch" in sys.stdout.buffer.getvalue()


def test_doctor_exits_with_1_when_something_essential_is_broken(monkeypatch, capsys, tmp_path):
    from dataeff.doctor import Finding

    broken = Finding("compiled core", False, "cannot load", "all", "reinstall", essential=True)
    monkeypatch.setattr("dataeff.doctor.examine", lambda directory: [broken])
    code, out, _ = run(capsys, "doctor", "--dir", str(tmp_path))
    assert code == 1 and "reinstall" in out


def test_demo_passes_what_was_typed(monkeypatch, capsys, tmp_path):
    asked = {}
    monkeypatch.setattr("dataeff.demo.run_demo", lambda **options: asked.update(options))
    typed = ["--report-dir", str(tmp_path), "--scale", "0.5", "--seed", "3", "--device", "cpu"]
    code, _, _ = run(capsys, "demo", *typed, "--spill", str(tmp_path), "--tiny")
    assert code == 0
    expected = {"report_dir": tmp_path, "scale": 0.5, "seed": 3, "spill": tmp_path}
    expected |= {"device": torch.device("cpu"), "max_seconds": 480.0, "tiny": True}
    assert asked == expected


def test_demo_that_cannot_write_says_so_in_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "demo", "--report-dir", str(tmp_path / "file"))
    assert code == 2 and "cannot write the report" in err and err.count("\n") == 1


def test_demo_refuses_a_spill_directory_before_it_trains(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("dataeff.demo.run.run_gnn", None)  # would fail, were it called
    typed = ("demo", "--spill", "/proc", "--report-dir", str(tmp_path), "--tiny")
    code, _, err = run(capsys, *typed)
    assert code == 2 and "cannot spill activations to /proc" in err and err.count("\n") == 1


def test_plan_prints_what_the_capacity_functions_compute(capsys):
    from dataeff.offload.capacity import MODELS, Disks, Gpu, plan_capacity

    typed = ["plan", "--model", "llama-8b", "--gpus", "8", "--microbatch", "4", "--json"]
    code, out, _ = run(capsys, *typed, "--gpu-memory-gb", "40", "--disks", "2", "--write-gbs", "3")
    plan = plan_capacity(
        MODELS["llama-8b"],
        num_gpus=8,
        microbatch=4,
        gpu=Gpu(memory=40e9),
        disks=Disks(count=2, write_bandwidth=3e9),
    )
    assert code == 0
    assert json.loads(out)["activations"] == plan.activations
    assert json.loads(out)["rated_life_days"] == pytest.approx(plan.rated_life_days)
    assert json.loads(out)["verdict"] == plan.verdict


def test_plan_table_ends_with_the_verdict(capsys):
    code, out, _ = run(capsys, "plan", "--model", "llama-70b", "--gpus", "1")
    assert code == 0 and "shard over more GPUs" in out and "written per day" in out
    assert out.startswith("llama-70b on 1 GPU, a step") and "2,021 TB" in out


def test_plan_of_what_fits_wears_no_disk(capsys):
    typed = ["plan", "--model", "llama-8b", "--gpus", "64", "--sequence", "128"]
    assert "not worn" in run(capsys, *typed)[1]
    assert json.loads(run(capsys, *typed, "--json")[1])["rated_life_days"] is None


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--model", "nope"], "unknown model 'nope': choose from llama-8b"),
        (["--model", "llama-8b", "--sequence", "0"], "--sequence: 0 is not a positive number"),
        (["--model", "llama-8b", "--disks", "0"], "--disks: 0 is not a positive number"),
        (["--model", "llama-8b", "--disk-tb", "inf"], "--disk-tb: inf is not a positive number"),
        (["--model", "llama-8b", "--utilization", "40"], "utilization=40.0 is no share"),
        (["--model", "llama-8b", "--gpus", "3", "--tensor-parallel", "2"], "num_gpus=3"),
        (["--model", "llama-8b", "--microbatch", "1" + "0" * 320], "too large"),
    ],
)
def test_plan_refuses_in_one_line(capsys, typed, message):
    code, out, err = run(capsys, "plan", *typed)
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""


def saved_report(path, **changed):
    """A report of ten steps that moved 4 GB each in 2 s."""
    numbers = {f.name: 0 for f in fields(OffloadReport) if f.type in ("int", "float")}
    report = {**numbers, "endurance_days": None, "modules": {}, "reason": ""}
    report |= {"num_steps": 10, "step_s": 2.0, "bytes_written": 40 * 10**9}
    path.write_text(json.dumps(report | changed))
    return path


def test_plan_of_a_report(capsys, tmp_path):
    path = saved_report(tmp_path / "r.json")
    code, out, _ = run(capsys, "plan", "--from-report", str(path), "--json")
    plan = json.loads(out)
    assert code == 0
    assert (plan["excess"], plan["step_s"], plan["write_bandwidth"]) == (4e9, 2.0, 4e9)
    assert plan["verdict"].startswith("Offload 4 GB per step")
    saved_report(path, bytes_written=33 * 10**7)  # of a small model: not "0.0 GB"
    assert "Offload 0.033 GB per step" in run(capsys, "plan", "--from-report", str(path))[1]


@pytest.mark.parametrize(
    ("changed", "typed", "message"),
    [
        ({"step_s": -2.0}, [], "step_s=-2.0 is below 0"),
        ({"step_s": float("inf")}, [], "step_s=inf is below 0, or without end"),
        ({"step_s": float("nan")}, [], "step_s=nan is below 0, or without end"),
        ({"bytes_written": "much"}, [], "bytes_written='much' is no number"),
        ({"num_steps": None}, [], "num_steps=None is no number"),
        ({"num_steps": 0}, [], "holds no finished step"),
        ({"modules": []}, [], "is not a saved OffloadReport"),
        ({"another": 1}, [], "is not a saved OffloadReport"),
        ({}, ["--disks", "-1"], "--disks: -1 is not a positive number"),
        ({}, ["--gpus", "1024"], "--gpus is for --model"),
        ({}, ["--only-layer-inputs"], "--only-layer-inputs is for --model"),
        ({}, ["--model", "llama-8b"], "name either --model NAME or --from-report FILE"),
    ],
)
def test_plan_refuses_a_report_in_one_line(capsys, tmp_path, changed, typed, message):
    path = saved_report(tmp_path / "r.json", **changed)
    code, out, err = run(capsys, "plan", "--from-report", str(path), *typed)
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""


def test_convert(capsys, tmp_path):
    x = torch.randn(40, 3)
    dataeff.convert(x, tmp_path / "x.npy")
    target = tmp_path / "x.json"
    arguments = ("convert", str(tmp_path / "x.npy"), str(target), "--stripe", str(tmp_path))
    assert run(capsys, *arguments)[:2] == (0, f"{target}\n")
    with dataeff.FeatureTable.open(target) as table:
        assert torch.equal(table[:], x)
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "exists" in err and str(target) in err
    code, _, err = run(capsys, "convert", "no.npy", str(tmp_path / "y.npy"))
    assert code == 2 and err == "dataeff: no.npy: No such file or directory\n"


def test_convert_names_the_tensors_of_a_file_without_quotes_of_python(capsys, tmp_path):
    dataeff.convert(torch.zeros(2, 3), tmp_path / "x.safetensors")
    typed = ("convert", str(tmp_path / "x.safetensors"), str(tmp_path / "x.npy"), "--name", "y")
    assert run(capsys, *typed)[::2] == (
        2,
        f"dataeff: {tmp_path}/x.safetensors holds no tensor 'y', but one of 'x'\n",
    )


@pytest.mark.parametrize("arguments", [["--json"], [], ["--help"]])
def test_output_that_cannot_be_written_is_one_line(arguments):
    command = [sys.executable, "-m", "dataeff", "plan", "--model", "llama-8b", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.stderr == "dataeff: the output cannot be written: No space left on device\n"
    assert done.returncode == 1
