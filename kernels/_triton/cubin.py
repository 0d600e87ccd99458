"""Compile recorded launches for an architecture that is not present, and read what the compiler made of them."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import create_function_from_signature

from .runtime import Launch

# Largest dynamic shared memory of a block, bytes (CUDA C++ Programming Guide, technical specifications).
LDS_LIMIT = 64 * 1024  # of a block on CDNA3
SHARED_LIMIT = {(8, 0): 163 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024}
CONSUMER_SHARED_LIMIT = 99 * 1024  # of 8.6, 8.9 and 12.x
TENSOR_LIMIT = 512  # columns of tensor memory of a processor, Blackwell's; kernels for older ones use none
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Cubin:
    """What one compiled kernel uses.

    Attributes:
        registers: per thread.
        stack, local: bytes of local memory per thread; anything but 0 is a spill or a run-time indexed array.
        shared: bytes of shared memory per block, static and dynamic.
        tensor: columns of tensor memory per block.
        opcodes: number of instructions in the machine code per opcode with its modifiers.
    """

    kernel: str
    capability: tuple[int, int]
    registers: int
    stack: int
    local: int
    shared: int
    tensor: int
    opcodes: dict[str, int]

    def count(self, prefix: str) -> int:
        """Instructions whose opcode starts with ``prefix``."""
        return sum(n for op, n in self.opcodes.items() if op.startswith(prefix))


def compile_launch(launch: Launch, capability: tuple[int, int]) -> Cubin:
    """Compile exactly what the launch would run on a device of that compute capability. Needs no device."""
    source, target, options = _source(launch, capability)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("cuobjdump", "--dump-sass", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    opcodes: dict[str, int] = {}
    for op in re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE):
        opcodes[op] = opcodes.get(op, 0) + 1
    return Cubin(
        launch.kernel.__name__, capability, numbers["REG"], numbers["STACK"], numbers["LOCAL"],
        max(numbers["SHARED"], compiled.metadata.shared), compiled.metadata.tmem_size, opcodes,
    )  # fmt: skip


def machine_code(launch: Launch, capability: tuple[int, int]) -> tuple[str, str]:
    """The machine code of a launch as text, and what the assembler says about its performance."""
    source, target, options = _source(launch, capability)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        arch = f"sm_{capability[0]}{capability[1]}{'a' if capability >= (9, 0) else ''}"
        command = [str(_TOOLS / "ptxas"), "-v", f"--gpu-name={arch}", str(ptx), "-o", f"{folder}/again.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        return _run("cuobjdump", "--dump-sass", str(cubin)), said


def identity(launch: Launch, capability: tuple[int, int]) -> str:
    """What :func:`compile_launch` depends on, as one hash: two launches that share it share their machine code."""
    source, target, options = _source(launch, capability)
    parts = triton.__version__, source.hash(), str(target), str(sorted(options.items(), key=str))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _source(launch: Launch, capability: tuple[int, int]) -> tuple[ASTSource, GPUTarget, dict]:
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    source, options = _bound(launch, CUDABackend(target))
    return source, target, options


def _bound(launch: Launch, backend: BaseBackend) -> tuple[ASTSource, dict]:
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.args, **launch.options, debug=False)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, {**launch.args, **launch.options}, bound, specialization, options
    )
    return ASTSource(kernel, signature, constexprs, attrs), options.__dict__


def _run(tool: str, *args: str) -> str:
    return subprocess.run([_TOOLS / tool, *args], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class CodeObject:
    """What one kernel compiled for an AMD GPU uses: registers a lane, spilled registers, LDS bytes of a block."""

    kernel: str
    registers: int
    spills: int
    shared: int


def compile_amd(launch: Launch, arch: str = "gfx942", warp_size: int = 64) -> CodeObject:
    """Compile what the launch would run on an AMD GPU of that architecture. Needs no device."""
    from triton.backends.amd.compiler import HIPBackend

    target = GPUTarget("hip", arch, warp_size)
    source, options = _bound(launch, HIPBackend(target))
    compiled = triton.compile(source, target=target, options=options)
    text = compiled.asm["amdgcn"]
    registers, spills = (int(re.findall(rf"\.{n}:\s+(\d+)", text)[0]) for n in ("vgpr_count", "vgpr_spill_count"))
    return CodeObject(launch.kernel.__name__, registers, spills, compiled.metadata.shared)
