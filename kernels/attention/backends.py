"""The implementations of gated attention and the order in which ``auto`` tries them.

``run(call)`` of a backend returns ``(out, lse, stats)``; lse and stats may be None where not asked for.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from .. import support
from ..support import Backend, cpu_reasons, dtype_name, triton_reasons
from . import flex, symbolic, trial
from .op import Call, Request, attention
from .torch_backends import (
    compacted_reasons,
    folded_reasons,
    run_compacted,
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


def _run_small_reference(c: Call):
    """The reference where nobody asked for it: not if its maps need gigabytes."""
    gigabytes = reference_gigabytes(c)
    # Fake tensors hold nothing; those that torch.compile traces with stand for real ones.
    if gigabytes > REFERENCE_LIMIT and (torch.compiler.is_compiling() or not _is_fake(c.q)):
        raise NotImplementedError(
            f"no backend but the reference can serve this call, which would hold about {gigabytes:.1f} GiB of attention"
            f" maps: q is {list(c.q.shape)}, k {list(c.k.shape)}. Above {REFERENCE_LIMIT:g} GiB it is used only where "
            "backend='reference' asks for it (control.backend in a patched model). gate4d.explain(q, k, v, ...) says "
            "what keeps the others from it, `gate4d info` what is not installed; else use fewer tokens a call."
        )
    return _run_reference(c)


def _is_fake(x: Tensor) -> bool:
    return x.is_meta or bool(torch._C._len_torch_dispatch_stack())


def reference_gigabytes(c: Call) -> float:
    """About what the reference holds of maps ``[B, H, Nq, Nk]``, in GiB; more where a gradient is asked for."""
    pairs = c.q.shape[0] * c.q.shape[1] * c.q.shape[2] * c.k.shape[2]
    return _MAPS * pairs * max(4, c.q.element_size()) / 2**30


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("cpu", _cpu_reasons, _run_operator),
        Backend("triton", _triton_reasons, _run_operator, trial.of("triton", _run_operator)),
        Backend("sdpa", sdpa_reasons, run_sdpa),
        Backend("sdpa_folded", folded_reasons, run_folded),
        Backend("sdpa_compacted", compacted_reasons, run_compacted),
        Backend("flex", flex.reasons, flex.run, trial.of("flex", flex.run)),
        Backend("reference", lambda r: [], _run_reference),
    )
}
# Per device type; measured on the CPU, the own kernel also beats SDPA where no gate is applied.
# On CUDA plain attention goes to SDPA until the own kernel is measured to beat it there. AMD's GPUs, which torch calls
# cuda too, and Intel's have no measured tile shapes: PyTorch's own kernels serve there.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "sdpa", "reference"),
    "cuda": ("sdpa", "triton", "sdpa_compacted", "flex", "reference"),
    "rocm": ("sdpa", "sdpa_compacted", "flex", "reference"),
    "xpu": ("sdpa", "sdpa_compacted", "flex", "reference"),
}
_DEFAULT_ORDER = ("sdpa", "sdpa_compacted", "reference")
# Of the maps that the reference holds at once, in GiB: what it may take without having been asked for.
REFERENCE_LIMIT = 4.0
# Measured exceptions, the first match counts: fields of Request a row applies to, and the order there. A row is
# {"device_type": "cuda", "dtype": "bfloat16", "gate": "drop", "order": ["sdpa_compacted", "triton"]}.
MEASURED: list[dict] = json.loads(Path(__file__).with_name("auto_order.json").read_text())
_MAPS = 8  # at the peak; 6.5 without a gate, 8.7 with the pairwise one and intervals, measured on the CPU
_AUTO_REFERENCE = Backend("reference", lambda r: [], _run_small_reference)
_selected: dict[tuple[str, Request], Backend] = {}


def select(backend: str, request: Request, *, trying: bool = True) -> Backend:
    """The backend for a request; errors as of :func:`gate4d.kernels.support.choose`."""
    if torch.compiler.is_compiling():
        return _choose(backend, request)
    chosen = _selected.get((backend, request))
    if chosen is None:
        chosen = _choose(backend, request, trying=trying)
        if trying and (chosen.trial is None or chosen.trial.settled(request)):
            _selected[backend, request] = chosen
    return chosen


def _choose(backend: str, request: Request, *, trying: bool = True) -> Backend:
    chosen = support.choose(BACKENDS, auto_order(request), backend, request, trying=trying)
    return _AUTO_REFERENCE if backend == "auto" and chosen.name == "reference" else chosen


def auto_order(request: Request) -> tuple[str, ...]:
    """The backends ``auto`` tries, in order: a measured row that fits, then the fixed order of the device type."""
    platform = "rocm" if request.device_type == "cuda" and torch.version.hip else request.device_type
    fixed = AUTO_ORDER.get(platform, _DEFAULT_ORDER)
    fields = {**request._asdict(), "dtype": dtype_name(request.dtype)}
    for row in MEASURED:
        if all(fields[key] == value for key, value in row.items() if key != "order"):
            return (*row["order"], *(name for name in fixed if name not in row["order"]))
    return fixed


def explain(request: Request) -> str:
    """One line per backend: that it can serve the request, or every reason why not."""
    return support.explain(BACKENDS, request)
