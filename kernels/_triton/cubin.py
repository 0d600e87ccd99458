"""Compile recorded launches for an architecture that is not present, and read what the compiler made of them."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import create_function_from_signature

from .hot_path import hot_path
from .runtime import AMD, Launch

# Largest dynamic shared memory of a block, bytes (CUDA C++ Programming Guide, technical specifications; CDNA3's LDS).
SHARED_LIMIT = {
    (8, 0): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (12, 0): 99 * 1024,
    AMD: 64 * 1024,
}
AMD_ARCH = "gfx942"
TENSOR_LIMIT = 512  # columns of tensor memory of a processor, Blackwell's; kernels for older ones use none
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Cubin:
    """What one compiled kernel uses.

    Attributes:
        registers: per thread, or lane.
        stack, local: bytes of local memory per thread; anything but 0 is a spill or a run-time indexed array.
        shared: bytes of shared memory per block, static and dynamic.
        tensor: columns of tensor memory per block.
        opcodes: number of instructions in the machine code per opcode with its modifiers.
        hot: the same for one turn of the main loop, with the branches of boundary tiles skipped (:mod:`.hot_path`).
        serialized: whether the assembler had to wait for every asynchronous matrix product of Hopper (C7515, C7510).
    """

    kernel: str
    capability: tuple[int, int]
    registers: int
    stack: int
    local: int
    shared: int
    tensor: int
    opcodes: dict[str, int]
    hot: dict[str, int]
    serialized: bool

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    @property
    def hot_instructions(self) -> int:
        return sum(self.hot.values())

    @property
    def spills(self) -> int:
        """Bytes of local memory."""
        return self.stack + self.local

    def count(self, prefix: str) -> int:
        """Instructions whose opcode starts with ``prefix``."""
        return sum(n for op, n in self.opcodes.items() if op.startswith(prefix))


def compile_launch(launch: Launch, capability: tuple[int, int]) -> Cubin:
    """Compile exactly what the launch would run on a device of that compute capability. Needs no device."""
    source, target, options = _source(launch, capability)
    compiled = triton.compile(source, target=target, options=options)
    return (_code_object if capability == AMD else _cubin)(launch.kernel.__name__, capability, compiled)


def _cubin(kernel: str, capability: tuple[int, int], compiled: Any) -> Cubin:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("cuobjdump", "--dump-sass", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    code = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(.*?);", sass, re.MULTILINE)
    return Cubin(
        kernel, capability, numbers["REG"], numbers["STACK"], numbers["LOCAL"],
        max(numbers["SHARED"], compiled.metadata.shared), compiled.metadata.tmem_size, _opcodes(code),
        _opcodes(hot_path(sass)), _serialized(compiled.asm["ptx"]),
    )  # fmt: skip


def _opcodes(code: list[str]) -> dict[str, int]:
    """How often each opcode occurs, without the predicate in front of it."""
    return dict(Counter(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in code))


def _code_object(kernel: str, capability: tuple[int, int], compiled: Any) -> Cubin:
    """The same of AMD's: 4 bytes a spilled register, no hot path."""
    text = compiled.asm["amdgcn"]
    registers, spills = (int(re.findall(rf"\.{n}:\s+(\d+)", text)[0]) for n in ("vgpr_count", "vgpr_spill_count"))
    opcodes = re.findall(r"^\t((?:s|v|ds|buffer|global|flat|scratch)_\w+)", text, re.MULTILINE)
    shared = compiled.metadata.shared
    return Cubin(kernel, capability, registers, 0, 4 * spills, shared, 0, dict(Counter(opcodes)), {}, False)


def identity(launch: Launch, capability: tuple[int, int]) -> str:
    """What :func:`compile_launch` depends on, as one hash: two launches that share it share their machine code."""
    source, target, options = _source(launch, capability)
    parts = triton.__version__, source.hash(), str(target), str(sorted(options.items(), key=str))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _source(launch: Launch, capability: tuple[int, int]) -> tuple[ASTSource, GPUTarget, dict]:
    if capability == AMD:
        from triton.backends.amd.compiler import HIPBackend as Backend

        target = GPUTarget("hip", AMD_ARCH, 64)
    else:
        from triton.backends.nvidia.compiler import CUDABackend as Backend

        target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    source, options = _bound(launch, Backend(target))
    return source, target, options


def _bound(launch: Launch, backend: BaseBackend) -> tuple[ASTSource, dict]:
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.args, **launch.options, debug=False)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, {**launch.args, **launch.options}, bound, specialization, options
    )
    return ASTSource(kernel, signature, constexprs, attrs), options.__dict__


def _serialized(ptx: str) -> bool:
    """Triton drops what the assembler says about kernels that it could assemble: it is asked again."""
    if "wgmma" not in ptx:
        return False
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(_TOOLS / "ptxas"), "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return "serializ" in said


def _run(tool: str, *args: str) -> str:
    return subprocess.run([_TOOLS / tool, *args], check=True, capture_output=True, text=True).stdout
