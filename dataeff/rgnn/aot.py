"""Compiles Triton kernels ahead of time, on a machine without a GPU, and says what they use.

    report = compile_kernel(kernel, {"X": "*fp32", "n": "i32"}, {"BLOCK": 128}, "sm_90")
    assert report.spill_bytes == 0

Registers and spills are read from the machine code with the `cuobjdump` that Triton ships, or a
CUDA toolkit's. Works with Triton 3.6 to 3.9.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dataeff.rgnn.cpp.toolchain import cache_dir

# Shared memory that one block may have, by compute capability (CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability").
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}

# Targets that Triton's LLVM and assembler know, from what the library needs on: given others, LLVM
# ends the process. An older Triton names those that it does not know yet.
TARGETS = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


@dataclass(frozen=True)
class KernelReport:
    """What one compiled kernel uses.

    Attributes:
        name: the kernel's function name.
        target: the architecture, as in `sm_90`.
        registers: per thread.
        shared_bytes: per block, the dynamic part that Triton asks for at launch.
        spill_bytes: stack and local memory per thread: what did not fit the registers.
        ptx_bytes: size of the assembly text.
        cubin_bytes: size of the machine code with its sections.
    """

    name: str
    target: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    ptx_bytes: int
    cubin_bytes: int

    @property
    def fits(self) -> bool:
        """Nothing spills, and a block's shared memory is within the target's limit."""
        limit = shared_limit(capability_of(self.target))
        return self.spill_bytes == 0 and self.shared_bytes <= limit


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str = "sm_90",
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    max_registers: int | None = None,
    fp_fusion: bool = True,
    divisible_by_16: Collection[str] | None = None,
) -> KernelReport:
    """Compiles one `@triton.jit` function down to machine code and reports what it uses.

    Args:
        fn: the decorated function; for generated source, from `load_kernels`.
        signature: Triton's type of every argument that is not in `constexprs`: `*fp32`, `i32`, ...
        constexprs: values of the `tl.constexpr` arguments, of `None` arguments, and of arguments
            that a launch would specialise because they are 1.
        target: `sm_80`, `sm_90`, `sm_100`, ...
        num_warps: warps per block.
        num_stages: stages of the software pipeline.
        max_registers: most registers per thread that the assembler may use; its own choice if None.
        fp_fusion: whether products may be fused with the sums that read them.
        divisible_by_16: arguments that a launch would find divisible by 16 (pointers: aligned to 16
            bytes), which widens loads; every argument in `signature` if not given.

    Raises:
        ValueError: an unknown target, or arguments missing from or unknown to the function.
        RuntimeError: the kernel was decorated under TRITON_INTERPRET=1, or there is no cuobjdump.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(fn, JITFunction):
        raise RuntimeError(
            f"{fn!r} is not a compilable @triton.jit function: unset TRITON_INTERPRET, or leave "
            "dataeff.kernels.interpreter.interpreted()"
        )
    full = _full_signature(fn.arg_names, signature, constexprs)
    aligned = set(signature if divisible_by_16 is None else divisible_by_16)
    attrs = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(full)
        if name in aligned and full[name] != "constexpr"
    }
    source = ASTSource(fn=fn, signature=full, constexprs=dict(constexprs), attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    options["enable_fp_fusion"] = fp_fusion
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability_of(target), 32),
        options=options if max_registers is None else {**options, "maxnreg": max_registers},
    )
    registers, spill_bytes = _resource_usage(compiled.asm["cubin"])
    return KernelReport(
        name=compiled.metadata.name,
        target=target,
        registers=registers,
        shared_bytes=compiled.metadata.shared,
        spill_bytes=spill_bytes,
        ptx_bytes=len(compiled.asm["ptx"]),
        cubin_bytes=len(compiled.asm["cubin"]),
    )


def load_kernels(source: str) -> ModuleType:
    """Imports generated Triton source from a file of its own in the cache folder.

    Triton reads a kernel's source back from its file; people do too. The same text gives the same
    file and, within a process, the same module.
    """
    name = f"dataeff_kernels_{hashlib.sha256(source.encode()).hexdigest()[:24]}"
    if name in sys.modules:
        return sys.modules[name]
    folder = cache_dir().parent / "triton"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.py"
    if not path.exists() or path.read_text() != source:
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as file:
            file.write(source)
        os.replace(file.name, path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _full_signature(
    arg_names: list[str], signature: Mapping[str, str], constexprs: Mapping[str, Any]
) -> dict[str, str]:
    given = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    if set(given) != set(arg_names):
        missing, unknown = set(arg_names) - set(given), set(given) - set(arg_names)
        raise ValueError(
            f"arguments missing from signature and constexprs: {sorted(missing)}; "
            f"unknown to the kernel: {sorted(unknown)}"
        )
    return {name: given[name] for name in arg_names}


def shared_limit(capability: int) -> int:
    """Bytes of shared memory that one block may have, no more than is known of others' GPUs."""
    return SHARED_LIMIT.get(capability, 99 << 10)


def capability_of(target: str) -> int:
    """90 for `sm_90`.

    Raises:
        ValueError: another text, or a target that is not in `TARGETS`.
    """
    match = re.fullmatch(r"sm_(\d{2,3})", target)
    if match is None or int(match.group(1)) not in TARGETS:
        known = ", ".join(f"sm_{capability}" for capability in TARGETS)
        raise ValueError(f"target must be one of {known}, got {target!r}")
    return int(match.group(1))


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) per thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [_cuobjdump(), "--dump-resource-usage", str(path)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    fields = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    if set(fields) != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump printed no register count: {usage!r}")
    return int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"])


def _cuobjdump() -> str:
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(shipped) if shipped.exists() else shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError(
            f"no cuobjdump in {shipped.parent} nor on the PATH: install triton's Linux wheel or "
            "the CUDA toolkit"
        )
    return found
