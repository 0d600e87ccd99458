"""Runs one case and compares everything that it returns with the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gate4d

from . import oracle
from .cases import Case, Drawn, draw, make_gate, problem
from .oracle import EXACT, NAN, PRECISIONS, Expected

STATS = ("entropy", "max_prob", "sum_sq")
ORACLE_SHARE = 2.0  # float64 inputs: the oracle's own roundings are as large as those it judges
Attend = Callable[..., tuple[Tensor, Any]]


class Failure(AssertionError):
    """A result that differs from the oracle's, as text; ``kind`` stays the same while a case is shrunk."""

    def __init__(self, kind: str, text: str):
        super().__init__(f"{kind}: {text}")
        self.kind = kind


def check(case: Case, attend: Attend = gate4d.gated_attention, ratios: dict[str, float] | None = None) -> None:
    """Raise :class:`Failure` unless the case gives what the oracle says, twice the same, and leaves its inputs alone.

    Args:
        attend: in the place of ``gate4d.gated_attention``.
        ratios: gets the largest share of the allowed distance that each result used.
    """
    with _threads(case.threads):
        x = draw(case)
        before = [_bits(b) for b in x.buffers]
        values, grads = run(case, x, attend)
        _unchanged(x, before)
        if case.seed % 8 == 0 and case.backend == "cpu":  # torch's own sums may depend on the number of threads
            with _threads(case.threads % 3 + 1):
                again, grads_again = run(case, x, attend)
            for name in values:
                _same(name, values[name], again[name])
            for name in grads:
                _same(f"grad {name}", grads[name], grads_again[name])
        p = problem(case, x)
        with np.errstate(over="ignore", under="ignore"):
            attention = oracle.Attention(p)
            for name, expected in attention.values.items():
                _compare(case, name, values[name], expected, ratios)
            found = attention.backward(x.grad_out.double().numpy(), x.grad_lse.double().numpy())
            for name, expected in _leaf_grads(case, x, found).items():
                _compare(case, f"grad {name}", grads[name], expected, ratios)
            if case.backend in ("cpu", "auto") and attend is gate4d.gated_attention:
                _statistics(case, x, p, values["lse"], ratios)
        _unchanged(x, before)


def run(case: Case, x: Drawn, attend: Attend) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Values and gradients of the call, by name."""
    leaves = {n: t.detach().requires_grad_() for n, t in x.tensors.items()}
    gate = make_gate(case, Drawn(leaves, x.buffers, x.visible, x.sees, x.grad_out, x.grad_lse, x.masks))
    out, aux = attend(
        *(leaves[n] for n in ("q", "k", "v")), gate=gate, visible=x.visible, scale=case.scale or None,
        row_stats=STATS, return_aux=True, backend=case.backend,
    )  # fmt: skip
    grads = torch.autograd.grad((out, aux.lse), list(leaves.values()), (x.grad_out, x.grad_lse), allow_unused=True)
    values = {"out": out.detach(), "lse": aux.lse.detach(), **{n: getattr(aux, n) for n in STATS}}
    if out.dtype != getattr(torch, case.dtype):
        raise Failure("out dtype", f"{out.dtype} for {case.dtype} inputs")
    return values, dict(zip(leaves, grads, strict=True))


def _leaf_grads(case: Case, x: Drawn, found: dict[str, Expected]) -> dict[str, Expected]:
    """Gradients of what the gate was made of, from those of its scores."""
    grads = {n: found[n] for n in ("q", "k", "v")}
    if case.gate == "general":
        names = {"query_motion": "query_score", "key_motion": "key_score", "output_scale": "output_scale"}
        return grads | {leaf: found[n] for leaf, n in names.items()}
    if case.gate == "pairwise":
        grads["query_motion"] = found["query_score"]._replace(value=-found["query_score"].value)
    if case.gate in ("pairwise", "keys"):
        grads["key_motion"] = found["key_score"]
    if case.gate == "queries":
        static = 1 - x.tensors["query_motion"].double().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = -case.strength * static ** (case.strength - 1) if case.strength else np.zeros_like(static)
        slope = np.where(static > 0, slope, -1.0 if case.strength == 1 else 0.0)
        of = found["output_scale"]
        value, precision = of.value * slope, PRECISIONS[case.dtype]
        rounded = 16 * (1 + case.strength) * precision.u * np.abs(value) + precision.tiny
        grads["query_motion"] = Expected(value, of.allowed * np.abs(slope) + rounded, of.status)
    return grads


def _statistics(case: Case, x: Drawn, p: oracle.Problem, lse: Tensor, ratios: dict[str, float] | None) -> None:
    q, k = x.tensors["q"], x.tensors["k"]
    scale = case.scale or None
    rng = np.random.default_rng([case.seed, 3])
    got = gate4d.received_attention(q, k, lse, gate=make_gate(case, x), visible=x.visible, scale=scale)
    for name, expected in oracle.received(p, lse.double().numpy()).items():
        _compare(case, f"received {name}", getattr(got, name), expected, ratios)
    if case.poison not in ("none", "outside", "v", "hidden_v", "grad_out"):
        return  # closed forms mix what they reduce: nothing is promised for NaN among it
    over = [("keys",), ("queries",), ("heads", "keys"), ("heads", "queries"), ("queries", "keys"),
            ("heads", "queries", "keys")][int(rng.integers(6))]  # fmt: skip
    got = gate4d.logit_moments(q, k, over=over, visible=x.visible, scale=scale)
    for name, expected in oracle.logits(p, over).items():
        _compare(case, f"logit {name} over {'+'.join(over)}", getattr(got, name), expected, ratios)
    if k.shape[2]:
        factor = round(float(rng.uniform(0.1, 2)), 3)
        method = ("auto", "stream", "covariance")[int(rng.integers(3))]
        got = gate4d.cross_moments(q, k, scale=factor, method=method)
        for name, expected in oracle.cross(p.q, p.k, factor, p.precision).items():
            _compare(case, f"cross {name} by {method}", getattr(got, name), expected, ratios)


def _compare(case: Case, name: str, got: Tensor | None, expected: Expected, ratios: dict[str, float] | None) -> None:
    value, allowed, status = expected
    if got is None and not value.any():
        return  # torch's way to say that the result does not depend on it
    if got is None:
        raise Failure(name, "there is none")
    if tuple(got.shape) != value.shape:
        raise Failure(name, f"shape {list(got.shape)} instead of {list(value.shape)}")
    if not value.size:
        return
    if case.dtype == "float64":
        allowed = ORACLE_SHARE * allowed
    x = got.detach().double().numpy()
    largest = 3.4e38 if got.dtype == torch.float32 else PRECISIONS[case.dtype].largest
    status = np.broadcast_to(status, x.shape)
    missing = (status == NAN) & ~np.isnan(x)
    if missing.any():
        at = tuple(int(i) for i in np.argwhere(missing)[0])
        raise Failure(f"{name} hides NaN", f"{int(missing.sum())} entries, first {at}: {x[at]}")
    with np.errstate(invalid="ignore", over="ignore"):
        judged = (status == EXACT) & (np.abs(np.where(np.isfinite(value), value, 0)) + allowed < largest)
        equal = (value == x) & ~np.isfinite(value)
        wrong = judged & ~np.where(np.isfinite(value), np.abs(x - value) <= allowed, equal)
        if ratios is not None:
            counted = judged & ~wrong & np.isfinite(value) & (allowed > 0)
            share = np.abs(x - value)[counted] / np.broadcast_to(allowed, x.shape)[counted]
            short = name.split(" over ")[0].split(" by ")[0]
            ratios[short] = max(ratios.get(short, 0.0), float(share.max(initial=0.0)))
    if wrong.any():
        kind = f"{name} is not finite" if not np.isfinite(x[wrong]).all() and np.isfinite(value[wrong]).all() else name
        worst = np.where(
            wrong, np.nan_to_num(np.abs(x - np.nan_to_num(value)) / np.maximum(allowed, 1e-300), nan=1e308), -1
        )
        at = tuple(int(i) for i in np.unravel_index(worst.argmax(), x.shape))
        raise Failure(
            kind, f"{int(wrong.sum())} of {x.size} entries, worst {at}: got {x[at]:.9g}, exact {value[at]:.9g}, "
            f"allowed distance {allowed[at]:.3g}",
        )  # fmt: skip


def _bits(x: Tensor) -> Tensor:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(kinds[x.element_size()]).clone()


def _unchanged(x: Drawn, before: list[Tensor]) -> None:
    for b, old in zip(x.buffers, before, strict=True):
        if not torch.equal(_bits(b), old):
            raise Failure("input changed", "a call wrote into q, k, v or beside them")


def _same(name: str, a: Tensor | None, b: Tensor | None) -> None:
    same = a is b if a is None or b is None else torch.equal(_bits(a), _bits(b))
    if not same:
        raise Failure(f"{name} differs from run to run", "the same call twice, over other numbers of threads")


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
