import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from ast import literal_eval
from pathlib import Path

import pytest
import torch

from dataeff.rgnn.cpp import parallel as cpp_parallel
from dataeff.rgnn.cpp import toolchain
from dataeff.rgnn.cpp.toolchain import CompileError, CompilerMissing, compile_cpp

EXPORT = 'extern "C" __attribute__((visibility("default"))) '
ANSWER = EXPORT + "int answer() { return %d; }\n"
SUM = (
    toolchain.PARALLEL_HEADER
    + EXPORT
    + """
void twice(const double* in, double* out, int64_t size, int64_t grain, int64_t num_threads) {
  dataeff::parallel_for(size, grain, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] += 2 * in[i];
  });
}
"""
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DATAEFF_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(toolchain, "_libraries", {})
    return tmp_path / "cpp"


def test_source_and_object_are_kept_and_found_again(cache, monkeypatch):
    assert compile_cpp(ANSWER % 42).answer() == 42
    (source,) = cache.glob("*.cpp")
    (made,) = cache.glob("*.so")
    assert source.read_text() == ANSWER % 42
    assert len(list(cache.iterdir())) == 2  # nothing else is left behind
    stamp = made.stat().st_mtime_ns
    monkeypatch.setattr(toolchain, "_libraries", {})
    assert compile_cpp(ANSWER % 42).answer() == 42
    assert made.stat().st_mtime_ns == stamp


def test_source_flags_and_compiler_each_make_their_own_object(cache, monkeypatch):
    compile_cpp(ANSWER % 1)
    compile_cpp(ANSWER % 2)
    assert compile_cpp(ANSWER % 2, flags=["-DX"]).answer() == 2
    monkeypatch.setenv("CXX", "c++ -O1")
    assert compile_cpp(ANSWER % 2).answer() == 2
    assert len(list(cache.glob("*.so"))) == 4


@pytest.mark.parametrize("damage", ["cut", "altered", "empty"])
def test_a_damaged_object_is_built_again(cache, monkeypatch, damage):
    compile_cpp(ANSWER % 7)
    (made,) = cache.glob("*.so")
    whole = made.read_bytes()
    bad = {"cut": whole[:1000], "altered": whole[:-1] + b"\x55", "empty": b""}[damage]
    made.unlink()  # a new file: this process still has the old one mapped
    made.write_bytes(bad)
    monkeypatch.setattr(toolchain, "_libraries", {})
    assert compile_cpp(ANSWER % 7).answer() == 7
    (made,) = cache.glob("*.so")
    assert made.read_bytes() != bad


def test_two_processes_at_once(cache):
    call = f"print(compile_cpp({ANSWER % 9!r}).answer())"
    code = f"from dataeff.rgnn.cpp.toolchain import compile_cpp; {call}"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [run.communicate(timeout=120)[0] for run in runs] == ["9\n", "9\n"]
    assert sorted(path.suffix for path in cache.iterdir())[0] == ".cpp"


def test_compile_error_shows_the_message_and_the_source(cache):
    with pytest.raises(CompileError, match="no_such_type") as caught:
        compile_cpp("no_such_type x;")
    (source,) = cache.glob("*.cpp")
    assert str(source) in str(caught.value)


def test_missing_compiler_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CompilerMissing, match="apt-get install"):
        compile_cpp(ANSWER % 1)
    monkeypatch.setenv("CXX", " ")  # as if it were not set
    with pytest.raises(CompilerMissing, match="apt-get install"):
        compile_cpp(ANSWER % 1)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompilerMissing, match="no-such-compiler"):
        compile_cpp(ANSWER % 1)


BROKEN = """#!/bin/sh
[ "$1" = --version ] && { echo compiler 1.0; exit 0; }
echo "cannot execute cc1plus" >&2
exit 1
"""
SILENT = """#!/bin/sh
[ "$1" = --version ] && echo compiler 1.0
exit 0
"""
LAYER = """
import torch, warnings
from dataeff.nn import RGCNConv
conv, edges, types = RGCNConv(4, 4, 2), torch.tensor([[0, 1], [1, 2]]), torch.tensor([0, 1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        conv.to(dtype)(torch.ones(3, 4, dtype=dtype), edges, types).sum().backward()
print([str(w.message) for w in caught if w.category is RuntimeWarning])
"""


def _a_program(folder, text):
    folder.mkdir()
    for name in ("c++", "g++", "clang++"):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize(
    "text, reason",
    [
        (BROKEN, "compiles nothing, it says 'cannot execute cc1plus'"),
        (SILENT, "compiles nothing, it says ''"),
        ("no program", "on the PATH"),
    ],
)
def test_a_compiler_that_compiles_nothing_is_none(cache, monkeypatch, tmp_path, text, reason):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(_a_program(tmp_path / "bin", text)))
    with pytest.raises(CompilerMissing, match=reason):
        compile_cpp(ANSWER % 1)


def test_the_next_compiler_compiles_what_a_broken_one_does_not(cache, monkeypatch, tmp_path):
    works = shutil.which("c++")
    folder = _a_program(tmp_path / "bin", BROKEN)
    (folder / "clang++").write_text(f'#!/bin/sh\nPATH={os.environ["PATH"]} exec {works} "$@"\n')
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    assert compile_cpp(ANSWER % 1).answer() == 1
    tried = []
    run = toolchain._finish
    monkeypatch.setattr(toolchain, "_finish", lambda c: tried.append(c[0]) or run(c))
    assert compile_cpp(ANSWER % 2).answer() == 2
    assert set(tried) == {str(folder / "clang++")}  # the broken ones are remembered
    monkeypatch.setenv("CXX", "c++")  # who names one is told about that one
    with pytest.raises(CompilerMissing, match="compiles nothing, it says 'cannot execute"):
        compile_cpp(ANSWER % 3)


@pytest.mark.parametrize("text", [BROKEN, None], ids=["broken", "none"])
def test_layers_and_explain_run_without_a_compiler(cache, tmp_path, text):
    folder = tmp_path / "empty" if text is None else _a_program(tmp_path / "bin", text)
    here = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", LAYER], capture_output=True, text=True, env=here)
    assert done.returncode == 0, done.stderr
    (warned,) = literal_eval(done.stdout)
    assert warned.startswith("no C++ compiler: ")
    example = Path(__file__).parents[2] / "examples" / "explain_rgcn.py"
    command = [sys.executable, "-m", "dataeff", "rgnn", "explain", str(example)]
    done = subprocess.run(command, capture_output=True, text=True, env=here)
    assert done.returncode == 0 and "== forward kernels ==" in done.stdout, done.stderr
    assert "kernels below do not run here, plain PyTorch does: no C++ compiler: " in done.stdout


def test_unwritable_cache_warns_and_compiles_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    code = (
        f"from dataeff.rgnn.cpp.toolchain import cache_dir, compile_cpp\n"
        f"assert compile_cpp({ANSWER % 3!r}).answer() == 3\n"
        f"assert [p.name for p in cache_dir().parent.iterdir()] == ['cpp']"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    here = {"DATAEFF_CACHE_DIR": str(tmp_path / "file" / "below"), "TMPDIR": str(scratch)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | here
    )
    assert done.returncode == 0, done.stderr
    assert "set DATAEFF_CACHE_DIR" in done.stderr and str(scratch) in done.stderr
    assert list(scratch.iterdir()) == []


def test_a_cache_deleted_while_the_process_runs_is_made_again(cache):
    assert compile_cpp(ANSWER % 1).answer() == 1
    shutil.rmtree(cache.parent)
    assert compile_cpp(ANSWER % 2).answer() == 2
    assert compile_cpp(ANSWER % 1).answer() == 1  # still loaded
    assert len(list(cache.glob("*.so"))) == 1


@pytest.mark.parametrize("by", ["source", "linker"])
def test_a_cache_that_filled_up_warns_once_and_compiles(cache, monkeypatch, tmp_path, by):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if by == "source":
        write = Path.write_text

        def write_text(path, text):
            if cache in path.parents:
                raise full
            return write(path, text)

        monkeypatch.setattr(Path, "write_text", write_text)
    else:
        run = toolchain._finish

        def linked(command):
            if str(cache) in command[-1]:
                return subprocess.CompletedProcess(command, 1, "", f"ld: {full.strerror}")
            return run(command)

        monkeypatch.setattr(toolchain, "_finish", linked)
    with pytest.warns(UserWarning, match=rf"{cache} cannot be written .*No space left.*{scratch}"):
        assert compile_cpp(ANSWER % 1).answer() == 1
    assert compile_cpp(ANSWER % 2).answer() == 2  # without a second warning, which is an error here
    assert not list(cache.glob("*.so")) and len(list(scratch.glob("*/cpp/*.so"))) == 2


def twice(library, size, grain, num_threads):
    values, out = torch.arange(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    args = [ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr())]
    library.twice(*args, *map(ctypes.c_int64, (size, grain, num_threads)))
    return torch.equal(out, 2 * values)


@pytest.mark.parametrize("bound", [True, False])
def test_parallel_loop_visits_every_index_once(bound):
    library = compile_cpp(SUM)
    if not bound:
        library.dataeff_bind_parallel(None)
    for size, grain, num_threads in [
        (0, 1, 4),
        (1, 1, 4),
        (1000, 7, 3),
        (1000, 0, 2),
        (99, 200, 8),
    ]:
        assert twice(library, size, grain, num_threads)
    cpp_parallel.bind(library)


def test_one_openmp_runtime_in_the_process():
    compile_cpp(SUM)
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "gomp" in line or "libomp" in line}
    assert len(runtimes) <= 1


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside threads
def test_a_forked_child_runs_its_loops():
    library = compile_cpp(SUM)
    assert twice(library, 1000, 10, 2)  # torch's team has its threads now
    child = os.fork()
    if child == 0:
        os._exit(0 if twice(library, 1000, 10, 2) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


INTERRUPTED = """
import os, signal, sys, threading, time, traceback
from pathlib import Path

from dataeff.rgnn.cpp.toolchain import compile_cpp

folder = Path(sys.argv[1])


def waits_for_compiler():
    frame = sys._current_frames()[threading.main_thread().ident]
    return "communicate" in (at.f_code.co_name for at, _ in traceback.walk_stack(frame))


def interrupt():
    while not ((folder / "begun").exists() and waits_for_compiler()):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


threading.Thread(target=interrupt).start()
try:
    compile_cpp("// slow")
except KeyboardInterrupt:
    print([(folder / name).exists() for name in ("begun", "left")], os.listdir(folder / "cpp"))
"""


def test_an_interrupt_ends_the_compiler_which_cleans_up(tmp_path, monkeypatch):
    """The interrupt of a notebook, which its compiler does not hear."""
    program = tmp_path / "c++"
    program.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && exit 0\n'
        f"touch {tmp_path}/left\n"
        f"trap 'rm {tmp_path}/left; exit 1' TERM\n"
        f"touch {tmp_path}/begun\n"
        "i=0; while [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", INTERRUPTED, str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "[True, False] []\n"
    assert not done.stderr
