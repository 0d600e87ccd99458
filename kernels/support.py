"""What every operator shares: types and sizes, why a kernel cannot serve, and how an implementation is chosen.

An implementation names the reasons why it cannot run. ``auto`` takes the first of an order that has none; an
implementation asked for by name never falls back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from ._constants import kept
from ._library import cuda_library_error, kernel_error, library_error

__all__ = [
    "Backend",
    "choose",
    "cpu_reasons",
    "cuda_library_error",
    "dtype_name",
    "explain",
    "kept",
    "library_error",
    "triton_reasons",
]

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator; ``run`` is called with what the operator's table says."""

    name: str
    not_supported_reasons: Callable[[Any], list[str]]
    run: Callable[..., Any]


def choose(table: Mapping[str, Backend], order: Sequence[str], name: str, request: Any) -> Backend:
    """The implementation of a table for a request.

    Args:
        table: every implementation of the operator by name.
        order: the names that ``"auto"`` tries.
        name: ``"auto"`` or a name of the table.
        request: what the table's reasons are asked about.

    Raises:
        ValueError: ``name`` is not in the table.
        NotImplementedError: nothing, or not the one named, can serve the request; lists every reason.
    """
    if name == "auto":
        for candidate in order:
            if not table[candidate].not_supported_reasons(request):
                return table[candidate]
    elif name not in table:
        raise ValueError(f"backend must be 'auto' or one of {list(table)}, got {name!r}.")
    elif not table[name].not_supported_reasons(request):
        return table[name]
    raise NotImplementedError(f"backend={name!r} cannot serve this call:\n{explain(table, request)}")


def explain(table: Mapping[str, Backend], request: Any) -> str:
    """One line per implementation: that it can serve the request, or every reason why not."""
    lines = []
    for name, backend in table.items():
        reasons = backend.not_supported_reasons(request)
        lines.append(f"  {name}: " + ("; ".join(reasons) if reasons else "can run"))
    return "\n".join(lines)


def cpu_reasons(operator: str, device_type: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Why the compiled CPU kernel of ``gate4d::operator`` cannot serve tensors of this kind; empty if it can."""
    reasons = []
    if (error := kernel_error(operator)) is not None:
        reasons.append(error)
    if device_type != "cpu":
        reasons.append(f"it needs CPU tensors, got {device_type}")
    if dtype not in KERNEL_DTYPES:
        reasons.append(f"it supports float32, bfloat16 and float16, got {dtype_name(dtype)}")
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"it supports head dimensions up to {MAX_HEAD_DIM}, got {head_dim}")
    return reasons


def triton_reasons(device_type: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Why the Triton kernels cannot serve tensors of this kind; empty if they can."""
    reasons = []
    if not has_triton():
        reasons.append("triton is not installed; pip install gate4d[triton]")
    if device_type != "cuda":
        missing = "" if torch.cuda.is_available() else " (there is no CUDA device)"
        reasons.append(f"it needs CUDA tensors, got {device_type}{missing}")
    elif torch.cuda.is_available() and (capability := torch.cuda.get_device_capability()) < (8, 0):
        reasons.append(f"it needs compute capability 8.0 or newer, got {capability[0]}.{capability[1]}")
    if dtype not in KERNEL_DTYPES:
        reasons.append(f"it supports float32, bfloat16 and float16, got {dtype_name(dtype)}")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        reasons.append(f"it supports head dimensions from 1 to {MAX_HEAD_DIM}, got {head_dim}")
    return reasons


try:  # once, at import: torch.compile warns of a cache where it traces
    _TRITON = find_spec("triton") is not None
except ImportError:
    _TRITON = False


def has_triton() -> bool:
    """Whether Triton is installed; it is not imported to find out."""
    return _TRITON


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
