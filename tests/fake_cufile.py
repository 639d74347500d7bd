"""A libcufile of system calls (`fake_cufile.c`), whose "device" memory is host memory."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")
SWITCHES = ("open_error", "register_error", "result", "errno", "corrupt", "most")


def build(folder, *options, source=SOURCE, name="libcufile.so.0"):
    """The library, compiled into `folder`."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    library = folder / name
    command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(library)]
    command += [str(source), *options]
    subprocess.run(command, check=True)
    return library


class FakeCufile:
    """The library's variables as attributes: counts to read, switches to `set`."""

    def __init__(self, library):
        self.path = str(library)
        self._loaded = ctypes.CDLL(self.path)

    def __getattr__(self, name):
        return ctypes.c_int.in_dll(self._loaded, f"fake_{name}").value

    def set(self, **values):
        for name, value in values.items():
            ctypes.c_int.in_dll(self._loaded, f"fake_{name}").value = value

    def reset(self):
        self.set(nvfs_major=2, **dict.fromkeys(SWITCHES, 0))
