"""Implementations of gated attention, what each can do, and how one is chosen.

A backend names the reasons why it cannot run. ``auto`` takes the first of its device's order that has none;
a backend asked for by name never falls back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import library_error
from . import op as ops
from . import torch_backends as cuda


class Request(NamedTuple):
    """What an implementation must know to say whether it can serve a call."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    gated: bool
    masked: bool
    aux: bool
    gate: str = ""  # "pairwise", "keys", "drop", "drop+pairwise", "drop+keys" or none
    renormalize: bool = True
    learned: bool = False  # the gate's scores ask for a gradient


class Call(NamedTuple):
    """The arguments of one attention call, checked and normalised."""

    q: Tensor  # [B, H, Nq, D]
    k: Tensor  # [B, H, Nk, D]
    v: Tensor  # [B, H, Nk, Dv]
    query_score: Tensor | None  # [B, Nq] fp32
    key_score: Tensor | None  # [B, Nk] fp32
    dropped_keys: Tensor | None  # [B, Nk] bool
    bounds: Tensor | None  # [1 or B, 3, Nq] int32
    scale: float
    strength: float
    renormalize: bool
    row_stats: bool


@dataclass(frozen=True)
class Backend:
    """``run(call)`` returns ``(out, lse, stats)``; lse and stats may be None where not asked for."""

    name: str
    not_supported_reasons: Callable[[Request], list[str]]
    run: Callable[[Call], tuple[Tensor, Tensor | None, Tensor | None]]


_LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


def _cpu_reasons(r: Request) -> list[str]:
    reasons = []
    if (error := library_error()) is not None:
        reasons.append(error)
    if r.device_type != "cpu":
        reasons.append(f"it needs CPU tensors, got {r.device_type}")
    if r.dtype not in _LOW_PRECISION:
        reasons.append(f"it supports float32, bfloat16 and float16, got {_name(r.dtype)}")
    if max(r.head_dim, r.value_dim) > 256:
        reasons.append(f"it supports head dimensions up to 256, got {max(r.head_dim, r.value_dim)}")
    return reasons


def _sdpa_reasons(r: Request) -> list[str]:
    reasons = []
    if r.gated:
        reasons.append("it cannot apply a gate")
    if r.masked:
        reasons.append("it would need a dense mask for this visibility")
    if r.aux:
        reasons.append("it returns neither lse nor row statistics")
    return reasons


def _run_sdpa(c: Call):
    return F.scaled_dot_product_attention(c.q, c.k, c.v, scale=c.scale), None, None


def _run_reference(c: Call):
    from .reference import attention

    return attention(*c[:-1])


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("cpu", _cpu_reasons, lambda c: ops.attention(*c)),
        Backend("triton", cuda.triton_reasons, lambda c: ops.attention(*c)),
        Backend("sdpa", _sdpa_reasons, _run_sdpa),
        Backend("sdpa_folded", cuda.folded_reasons, cuda.run_folded),
        Backend("sdpa_compacted", cuda.compacted_reasons, cuda.run_compacted),
        Backend("flex", cuda.flex_reasons, cuda.run_flex),
        Backend("reference", lambda r: [], _run_reference),
    )
}
# Per device type; measured on the CPU, the own kernel also beats SDPA where no gate is applied.
# On CUDA plain attention goes to SDPA until the own kernel is measured to beat it there.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "sdpa", "reference"),
    "cuda": ("sdpa", "triton", "sdpa_compacted", "reference"),
}
_DEFAULT_ORDER = ("sdpa", "reference")
# Measured exceptions, the first match counts: fields of Request a row applies to, and the order there. A row is
# {"device_type": "cuda", "dtype": "bfloat16", "gate": "drop", "order": ["sdpa_compacted", "triton"]}.
MEASURED: list[dict] = json.loads(Path(__file__).with_name("auto_order.json").read_text())
_selected: dict[tuple[str, Request], Backend] = {}


def select(backend: str, request: Request) -> Backend:
    """The backend for a request.

    Raises:
        ValueError: ``backend`` is not the name of a backend.
        NotImplementedError: the named backend cannot serve the request, with every reason.
    """
    if torch.compiler.is_compiling():
        return _select(backend, request)
    chosen = _selected.get((backend, request))
    if chosen is None:
        chosen = _selected[backend, request] = _select(backend, request)
    return chosen


def _select(backend: str, request: Request) -> Backend:
    if backend == "auto":
        for name in auto_order(request):
            if not BACKENDS[name].not_supported_reasons(request):
                return BACKENDS[name]
    elif backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {list(BACKENDS)}, got {backend!r}.")
    elif not BACKENDS[backend].not_supported_reasons(request):
        return BACKENDS[backend]
    raise NotImplementedError(f"backend={backend!r} cannot serve this call:\n{explain(request)}")


def auto_order(request: Request) -> tuple[str, ...]:
    """The backends ``auto`` tries, in order: a measured row that fits, then the fixed order of the device type."""
    fixed = AUTO_ORDER.get(request.device_type, _DEFAULT_ORDER)
    fields = {**request._asdict(), "dtype": _name(request.dtype)}
    for row in MEASURED:
        if all(fields[key] == value for key, value in row.items() if key != "order"):
            return (*row["order"], *(name for name in fixed if name not in row["order"]))
    return fixed


def explain(request: Request) -> str:
    """One line per backend: that it can serve the request, or every reason why not."""
    lines = []
    for name, backend in BACKENDS.items():
        reasons = backend.not_supported_reasons(request)
        lines.append(f"  {name}: " + ("; ".join(reasons) if reasons else "can run"))
    return "\n".join(lines)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
