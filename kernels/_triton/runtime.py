"""Launching Triton kernels, or recording what would be launched.

Recording lets the kernels be compiled and inspected for an architecture that is not present: the launchers run on
meta tensors, and every configuration they can select is seen exactly as a device would get it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

AMD = (0, 0)  # stands for the compute capability of every AMD GPU, whose numbers would be taken for NVIDIA's
LARGEST_GRID = (2**31 - 1, 65535, 65535)


@dataclass
class Launch:
    """One kernel launch: ``args`` maps every parameter, constexpr or not, to its value."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, int]


@dataclass
class Recording:
    """Launches recorded for a device of compute capability ``capability``."""

    capability: tuple[int, int]
    launches: list[Launch] = field(default_factory=list)


_recording: Recording | None = None


@contextmanager
def record(capability: tuple[int, int]) -> Iterator[Recording]:
    """Within the context launches are recorded and not executed; outputs hold no values."""
    global _recording
    previous, _recording = _recording, Recording(capability)
    try:
        yield _recording
    finally:
        _recording = previous


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability to choose a configuration for; of the recording if one is running.

    The interpreter, which runs on CPU tensors, takes the configuration of the oldest supported device.
    """
    if _recording is not None:
        return _recording.capability
    if device.type != "cuda":
        return 8, 0
    return AMD if torch.version.hip else torch.cuda.get_device_capability(device)


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; a few where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def launch(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], **options: int) -> None:
    """Run ``kernel`` over ``grid`` on the device of its tensors. An empty grid is no work."""
    if 0 in grid:
        return
    if any(n > most for n, most in zip(grid, LARGEST_GRID, strict=False)):
        raise ValueError(f"the grid {grid} of {kernel.__name__} is larger than {LARGEST_GRID[: len(grid)]}.")
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, args, options))
        return
    device = next(x.device for x in args.values() if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**args, **options)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products are exact to fp32 unless torch's own setting allows TF32."""
    # The older allow_tf32 cannot be read once the setting was made through fp32_precision; the newer reads both.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def readable(x: Tensor) -> Tensor:
    """``x`` itself if a kernel can address it: last stride 1, and a tile of rows spans less than 2**31 elements."""
    if (x.shape[-1] > 1 and x.stride(-1) != 1) or abs(x.stride(-2)) >= 2**23:
        return x.contiguous()
    return x


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Strides of ``x [B, H, N, D]`` as the arguments ``stride_<name>b``, ``...h``, ``...n``."""
    return {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate("bhn")}


def heads_last(like: Tensor, batch: int, heads: int, tokens: int, dim: int) -> Tensor:
    """Empty ``[B, H, N, D]`` over ``[B, N, H, D]`` memory, as the operators' fake kernels promise."""
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def block_dim(dim: int) -> int:
    """Width of a tile that holds a head of ``dim``: the next power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())
