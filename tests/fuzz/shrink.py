"""The simplest case that fails as a given one does, and code that shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from torch import Tensor

from .cases import Case, draw

_STEPS = 400
# What is simplified first: sizes cost the reader most. The seed stays.
_ORDER = (
    "queries", "keys", "dim", "value_dim", "heads", "batch", "gate", "visible", "frames", "dtype", "poison", "values",
    "order", "gap", "step", "window", "sinks", "scores", "strength", "magnitude", "scale", "renormalize", "infinite",
    "threads",
)  # fmt: skip
_SHOWN = 40  # entries of the tensors that are printed as numbers


def simpler(case: Case) -> Iterator[Case]:
    """Cases one step simpler, the largest steps first."""
    defaults = {f.name: f.default for f in fields(Case)}
    for name in _ORDER:
        now, simplest = getattr(case, name), defaults[name]
        if now == simplest:
            continue
        yield replace(case, **{name: simplest})
        if isinstance(now, int) and not isinstance(now, bool) and now > simplest:
            for smaller in sorted({now // 2, now - now // 4, now - 1}):
                if simplest < smaller < now:
                    yield replace(case, **{name: smaller})


def shrink(case: Case, fails_alike: Callable[[Case], bool], seconds: float = 60.0) -> Case:
    """The simplest case found for which ``fails_alike`` is still true, within the time and 400 trials."""
    end, left = time.monotonic() + seconds, _STEPS
    tried: set[Case] = set()
    progress = True
    while progress:
        progress = False
        for candidate in simpler(case):
            if candidate in tried:
                continue
            if left == 0 or time.monotonic() > end:
                return case
            tried.add(candidate)
            left -= 1
            if fails_alike(candidate):
                case, progress = candidate, True
                break
    return case


def snippet(case: Case, isa: str, kind: str) -> str:
    """Shell lines that run the case again; where it is small enough, also the call with its numbers."""
    lines = [
        f"# {kind}",
        f"GATE4D_CPU_ISA={isa} PYTHONPATH=tests python - <<'END'",
        "from fuzz.cases import Case",
        "from fuzz.check import check",
        f"check({case.code()})",
        "END",
    ]
    x = draw(case)
    named = {n: t for n, t in x.tensors.items() if case.gate == "general" or n in _used(case)}
    named |= dict(zip(("query_mask", "key_mask"), x.masks, strict=True)) if case.gate in _MASKED else {}
    if sum(t.numel() for t in named.values()) > _SHOWN:
        return "\n".join(lines)
    lines += ["# or, in Python, without the oracle:", "import torch", "import gate4d", ""]
    lines += [f"{n} = {literal(t)}" for n, t in named.items()]
    if x.visible is not None:
        start, end, sink = x.visible.bounds.unbind(1)
        values = ", ".join(f"torch.tensor({t.tolist()})" for t in (start, end, sink))
        lines.append(f"visible = gate4d.Visibility.intervals({values})")
    lines += [
        f"torch.set_num_threads({case.threads})",
        f"for x in ({', '.join(n for n in named if named[n].is_floating_point())}):",
        "    x.requires_grad_()",
        f"out, aux = gate4d.gated_attention(q, k, v, gate={_gate(case)}, "
        f"visible={'None' if x.visible is None else 'visible'}, scale={case.scale or None!r}, "
        f"row_stats=('entropy', 'max_prob', 'sum_sq'), return_aux=True, backend={case.backend!r})",
        f"grad_out, grad_lse = {literal(x.grad_out)}, {literal(x.grad_lse)}",
        "torch.autograd.backward((out, aux.lse), (grad_out, grad_lse))",
        "print(out, aux, q.grad, k.grad, v.grad)",
    ]
    return "\n".join(lines)


_MASKED = ("drop_keys", "static_to_dynamic", "general")


def _used(case: Case) -> tuple[str, ...]:
    scores = {"pairwise": ("query_motion", "key_motion"), "keys": ("key_motion",), "queries": ("query_motion",)}
    return ("q", "k", "v", *scores.get(case.gate, ()))


def _gate(case: Case) -> str:
    strength = f"strength={case.strength}"
    return {
        "none": "None",
        "pairwise": f"gate4d.MotionGate.pairwise(query_motion, key_motion, {strength})",
        "keys": f"gate4d.MotionGate.keys(key_motion, {strength})",
        "queries": f"gate4d.MotionGate.queries(query_motion, {strength})",
        "drop_keys": "gate4d.MotionGate.drop_keys(key_mask)",
        "static_to_dynamic": "gate4d.MotionGate.static_to_dynamic(query_mask, key_mask, "
        f"renormalize={case.renormalize})",
        "general": f"gate4d.MotionGate(query_motion, key_motion, output_scale, key_mask, {strength}, "
        f"renormalize={case.renormalize})",
    }[case.gate]


def literal(t: Tensor) -> str:
    """A tensor as Python, with its exact values."""
    text = repr(t.detach().tolist()).replace("nan", "torch.nan").replace("inf", "torch.inf")
    shape = "" if t.numel() else f".reshape({list(t.shape)})"
    return f"torch.tensor({text}, dtype={t.dtype}){shape}"
