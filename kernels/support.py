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
from ._triton import tuned as tile_tables
from ._triton.configurations import Config as TileShape
from ._triton.configurations import override as tile_shape
from ._verify import Trial, Verdict, recorded, report
from ._verify import directory as verdicts_directory
from ._verify import mode as verify_mode

__all__ = [
    "Backend",
    "TileShape",
    "Trial",
    "Verdict",
    "choose",
    "cpu_reasons",
    "cuda_library_error",
    "dtype_name",
    "explain",
    "kept",
    "library_error",
    "passes",
    "recorded",
    "report",
    "tile_shape",
    "tile_tables",
    "triton_reasons",
    "verdicts_directory",
    "verify_mode",
]

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator; ``run`` is called with what the operator's table says. With a ``trial`` it
    serves a request only once it has computed a tiny problem of that kind right."""

    name: str
    not_supported_reasons: Callable[[Any], list[str]]
    run: Callable[..., Any]
    trial: Trial | None = None

    def failure(self, request: Any, *, trying: bool) -> str | None:
        """What is wrong with its results; None if nothing is known. ``trying`` finds out where it can be."""
        if self.trial is None or torch.compiler.is_compiling():
            return None
        return self.trial.failure(request, trying=trying)


def choose(
    table: Mapping[str, Backend], order: Sequence[str], name: str, request: Any, *, trying: bool = True
) -> Backend:
    """The implementation of a table for a request.

    Args:
        table: every implementation of the operator by name.
        order: the names that ``"auto"`` tries.
        name: ``"auto"`` or a name of the table.
        request: what the table's reasons are asked about.
        trying: whether an implementation that was never tried on this device is tried now.

    Raises:
        ValueError: ``name`` is not in the table.
        NotImplementedError: nothing, or not the one named, can serve the request; lists every reason.
        RuntimeError: one that would serve fails its check, and ``GATE4D_VERIFY`` is ``strict``.
    """
    if name == "auto":
        failed: dict[str, str] = {}
        for candidate in order:
            backend = table[candidate]
            if backend.not_supported_reasons(request):
                continue
            failure = backend.failure(request, trying=trying)
            if failure is None:
                if trying:
                    _report_all(table, failed, f"backend {candidate!r}")
                return backend
            failed[candidate] = failure
        if trying:
            _report_all(table, failed, "nothing")
    elif name not in table:
        raise ValueError(f"backend must be 'auto' or one of {list(table)}, got {name!r}.")
    elif not table[name].not_supported_reasons(request):
        backend = table[name]
        failure = backend.failure(request, trying=trying)
        if failure is None:
            return backend
        if verify_mode() == "strict":
            _report_all(table, {name: failure}, "nothing")
    raise NotImplementedError(f"backend={name!r} cannot serve this call:\n{explain(table, request)}")


def _report_all(table: Mapping[str, Backend], failed: Mapping[str, str], instead: str) -> None:
    for name, failure in failed.items():
        trial = table[name].trial
        assert trial is not None, "only a trial fails"
        report(trial.operator, failure, instead)


def passes(trial: Trial, request: Any, instead: str) -> bool:
    """Whether a kernel outside of a table may serve a request, or ``instead`` does; said once where it fails."""
    if torch.compiler.is_compiling() or (failure := trial.failure(request, trying=True)) is None:
        return True
    report(trial.operator, failure, instead)
    return False


def explain(table: Mapping[str, Backend], request: Any) -> str:
    """One line per implementation: that it can serve the request, or every reason why not. Nothing is tried."""
    lines = []
    for name, backend in table.items():
        reasons = backend.not_supported_reasons(request)
        if not reasons and (failure := backend.failure(request, trying=False)) is not None:
            reasons = [failure]
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


def triton_reasons(device_type: str, dtype: torch.dtype, head_dim: int, index: int | None = None) -> list[str]:
    """Why the Triton kernels cannot serve tensors of this kind; empty if they can. ``index`` is their device's."""
    reasons = []
    if not has_triton():
        reasons.append("triton is not installed; pip install gate4d[triton]")
    if device_type != "cuda":
        missing = "" if torch.cuda.is_available() else " (there is no CUDA device)"
        reasons.append(f"it needs CUDA tensors, got {device_type}{missing}")
    elif (found := capability(index)) is not None and found < (8, 0):
        reasons.append(f"it needs compute capability 8.0 or newer, got {found[0]}.{found[1]}")
    if dtype not in KERNEL_DTYPES:
        reasons.append(f"it supports float32, bfloat16 and float16, got {dtype_name(dtype)}")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        reasons.append(f"it supports head dimensions from 1 to {MAX_HEAD_DIM}, got {head_dim}")
    return reasons


_capabilities: dict[int, tuple[int, int]] = {}


def capability(index: int | None) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, of the current one for None; None where there is none, as for fake tensors
    on a machine without one. Asked once a device."""
    if index in _capabilities:
        return _capabilities[index]
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_capability(index)
    if index is not None:
        _capabilities[index] = found
    return found


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ImportError:  # somebody's import hook forbids it
        return False


# Found out once, on import: torch.compile could not trace the search.
_TRITON = _installed("triton")


def has_triton() -> bool:
    """Whether Triton is installed; it is not imported to find out."""
    return _TRITON


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
