"""The implementations of gated attention and the order in which ``auto`` tries them.

``run(call)`` of a backend returns ``(out, lse, stats)``; lse and stats may be None where not asked for.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .. import support
from ..support import Backend, cpu_reasons, dtype_name, triton_reasons
from . import symbolic, trial
from .op import Call, Request, attention
from .torch_backends import (
    compacted_reasons,
    flex_reasons,
    folded_reasons,
    run_compacted,
    run_flex,
    run_folded,
    run_sdpa,
    sdpa_reasons,
)


def _cpu_reasons(r: Request) -> list[str]:
    return cpu_reasons("attention_forward", r.device_type, r.dtype, max(r.head_dim, r.value_dim))


def _triton_reasons(r: Request) -> list[str]:
    narrowest, widest = sorted((r.head_dim, r.value_dim))
    return triton_reasons(r.device_type, r.dtype, widest if narrowest else 0, r.device_index)


def _run_operator(c: Call):
    if torch.compiler.is_compiling() and symbolic.is_symbolic(c.scale, c.strength):
        return symbolic.attention(*c)
    return attention(*c)


def _run_reference(c: Call):
    from .reference import attention as reference

    return reference(*c[:-1])


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("cpu", _cpu_reasons, _run_operator),
        Backend("triton", _triton_reasons, _run_operator, trial.of("triton", _run_operator)),
        Backend("sdpa", sdpa_reasons, run_sdpa),
        Backend("sdpa_folded", folded_reasons, run_folded),
        Backend("sdpa_compacted", compacted_reasons, run_compacted),
        Backend("flex", flex_reasons, run_flex),
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


def select(backend: str, request: Request, *, trying: bool = True) -> Backend:
    """The backend for a request; errors as of :func:`gate4d.kernels.support.choose`."""
    if torch.compiler.is_compiling():
        return support.choose(BACKENDS, auto_order(request), backend, request)
    chosen = _selected.get((backend, request))
    if chosen is None:
        chosen = support.choose(BACKENDS, auto_order(request), backend, request, trying=trying)
        if trying and (chosen.trial is None or chosen.trial.settled(request)):
            _selected[backend, request] = chosen
    return chosen


def auto_order(request: Request) -> tuple[str, ...]:
    """The backends ``auto`` tries, in order: a measured row that fits, then the fixed order of the device type."""
    fixed = AUTO_ORDER.get(request.device_type, _DEFAULT_ORDER)
    fields = {**request._asdict(), "dtype": dtype_name(request.dtype)}
    for row in MEASURED:
        if all(fields[key] == value for key, value in row.items() if key != "order"):
            return (*row["order"], *(name for name in fixed if name not in row["order"]))
    return fixed


def explain(request: Request) -> str:
    """One line per backend: that it can serve the request, or every reason why not."""
    return support.explain(BACKENDS, request)
