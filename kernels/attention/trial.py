"""The tiny problem that an implementation of attention must compute right before it serves calls of a kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._reference import gate_weight, seen
from .._verify import Trial, accept, device_of
from ..support import dtype_name
from .op import Call, Request
from .reference import attention as reference

BATCH, HEADS, QUERIES, KEYS = 2, 2, 200, 300  # full tiles and tiles at the end, with every tile shape of the tables
_STATS = ("entropy", "max_prob", "sum_sq")


def of(name: str, run: Callable[[Call], tuple[Tensor, Tensor | None, Tensor | None]]) -> Trial:
    """The trial of the backend ``name``, whose ``run`` is given."""
    return Trial(f"attention: {name}", describe, lambda request: check(request, run))


def describe(r: Request) -> str:
    """The configuration in words."""
    words = [dtype_name(r.dtype), f"head {r.head_dim}", f"value {r.value_dim}"]
    if r.gate:
        words.append(f"gate {r.gate} ** {r.power:g}" + ("" if r.renormalize else " not renormalised"))
    named = {"bounds": r.masked, "lse": r.aux, "statistics": r.row_stats, "backward": r.grad, "scores": r.learned}
    if r.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        words.append("tf32")
    return ", ".join([*words, *(word for word, wanted in named.items() if wanted)])


def problem(r: Request) -> tuple[Call, Tensor, Tensor]:
    """A call of the request's kind, and gradients of its output and lse; the same numbers each time."""
    draw = torch.Generator().manual_seed(0)
    device = device_of(r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float32)

    def score(tokens: int) -> Tensor:
        x, kind = (torch.rand(BATCH, tokens, generator=draw, dtype=torch.float32) for _ in range(2))
        return torch.where(kind < 0.1, 0.0, torch.where(kind > 0.9, 1.0, x)).to(device)

    q = normal(BATCH, HEADS, QUERIES, r.head_dim).to(device, r.dtype)
    k = normal(BATCH, HEADS, KEYS, r.head_dim).to(device, r.dtype)
    v = normal(BATCH, HEADS, KEYS, r.value_dim).to(device, r.dtype)
    grad_out = normal(BATCH, HEADS, QUERIES, r.value_dim).to(device, r.dtype)
    grad_lse = normal(BATCH, HEADS, QUERIES).to(device)
    query_score = score(QUERIES) if "pairwise" in r.gate else None
    key_score = score(KEYS) if "pairwise" in r.gate or "keys" in r.gate else None
    dropped = (torch.rand(BATCH, KEYS, generator=draw) < 0.3).to(device) if "drop" in r.gate else None
    call = Call(
        q, k, v, query_score, key_score, dropped, _bounds().to(device) if r.masked else None,
        r.head_dim**-0.5, r.power, r.renormalize, r.row_stats,
    )  # fmt: skip
    return call, grad_out, grad_lse


def _bounds() -> Tensor:
    """Intervals that end inside tiles and cover whole ones, sinks apart, inside and overlapping, and empty rows."""
    rows = [(0, 60, 0)] * 30 + [(30, 130, 0)] * 30 + [(100, 300, 17)] * 40 + [(50, 50, 0)] * 28
    rows += [(10, 290, 130)] * (QUERIES - len(rows))
    return torch.tensor(rows, dtype=torch.int32).T[None].contiguous()


def check(r: Request, run: Callable[[Call], tuple[Tensor, Tensor | None, Tensor | None]]) -> None:
    call, grad_out, grad_lse = problem(r)
    given = grad_out, grad_lse if r.aux else None
    got = _evaluate(r, call, run, *given)
    doubles = call._replace(**{n: x.double() for n in _LEAVES if (x := getattr(call, n)) is not None})
    exact = _evaluate(r, doubles, lambda c: reference(*c[:-1]), *given)
    accept(
        lambda order: _in_torch(r, call, *given, order),
        got, {name: exact[name].double() for name in got}, _allowances(r),
    )  # fmt: skip


_LEAVES = ("q", "k", "v", "query_score", "key_score")


def _allowances(r: Request) -> dict[str, tuple[float, float]]:
    """A logarithm moves by a whole step when its argument is rounded, a square by two; the gradients of scores are sums
    of what was rounded to the inputs' dtype."""
    coarse = torch.finfo(r.dtype).eps / torch.finfo(torch.float32).eps
    scores = {f"grad {n}": (0.0, coarse) for n in ("query_score", "key_score")}
    return {"lse": (1.0, 1.0), "entropy": (1.0, 1.0), "sum_sq": (0.0, 2.0), **scores}


def _wanted(r: Request, call: Call) -> list[str]:
    # With strength 0 the result does not depend on the scores.
    names = [*("q", "k", "v"), *(_LEAVES[3:] if r.learned and r.power else ())] if r.grad else []
    return [n for n in names if getattr(call, n) is not None]


def _evaluate(
    r: Request, call: Call, run: Callable[[Call], Any], grad_out: Tensor, grad_lse: Tensor | None
) -> dict[str, Tensor]:
    """Everything that a call of this kind returns, and its gradients, by name."""
    names = _wanted(r, call)
    leaves = {n: getattr(call, n).detach().clone().requires_grad_() for n in names}
    with torch.set_grad_enabled(bool(names)):
        out, lse, stats = run(call._replace(**leaves))
    results = {"out": out.detach()}
    if r.aux:
        results["lse"] = lse.detach()
    if r.row_stats:
        results |= dict(zip(_STATS, stats.detach(), strict=True))
    if names:
        outputs, grads = [out], [grad_out.to(out.dtype)]
        if grad_lse is not None:
            outputs, grads = [out, lse], [*grads, grad_lse.to(lse.dtype)]
        found = torch.autograd.grad(outputs, list(leaves.values()), grads)
        results |= {f"grad {n}": g for n, g in zip(names, found, strict=True)}
    return results


def _in_torch(r: Request, c: Call, grad_out: Tensor, grad_lse: Tensor | None, order: int) -> dict[str, Tensor]:
    """The call as torch computes it at the inputs' precision: fp32 logits and sums, probabilities and the gradient of
    the logits rounded to the inputs' dtype before they are multiplied, the backward from the rounded output.

    ``order`` permutes what is summed; the exact result stays.
    """
    draw = torch.Generator().manual_seed(order)
    to = torch.arange if order == 0 else lambda n: torch.randperm(n, generator=draw)
    keys, features, rows = (to(n).to(c.q.device) for n in (KEYS, r.head_dim, QUERIES))
    dtype, renormalize = c.q.dtype, c.renormalize
    q = c.q[:, :, rows][..., features].float()
    k, v = c.k[:, :, keys][..., features].float(), c.v[:, :, keys].float()
    visible = torch.ones(1, 1, QUERIES, KEYS, dtype=torch.bool, device=q.device)
    if c.bounds is not None:
        visible = seen(c.bounds, KEYS)[:, None][:, :, rows][..., keys]
    if c.dropped_keys is not None:
        visible = visible & ~c.dropped_keys[:, None, None, keys]
    scores = {n: x.clone().requires_grad_() for n in _LEAVES[3:] if (x := getattr(c, n)) is not None}
    weight = torch.ones((), device=q.device)
    if c.key_score is not None:
        with torch.enable_grad():
            weight = gate_weight(scores.get("query_score"), scores["key_score"], c.strength)
            weight = weight.expand(-1, QUERIES, -1)[:, None][:, :, rows][..., keys]
    w = weight.detach()
    logits = c.scale * (q @ k.mT)
    counted = visible & (w > 0) if renormalize else visible
    top = logits.masked_fill(~counted, -torch.inf).amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    exponential = torch.where(visible, (logits - top).clamp(max=80).exp(), 0.0)
    numerator = exponential * w
    total = (numerator if renormalize else exponential).sum(-1, keepdim=True)
    alive = total > 0
    safe = torch.where(alive, total, 1.0)
    out = (numerator.to(dtype).float() @ v / safe).to(dtype)
    p, share = numerator / safe, exponential / safe
    lse = torch.where(alive, safe.log() + top, -torch.inf)
    results = {"out": out, "lse": lse[..., 0], "max_prob": p.amax(-1), "sum_sq": p.square().sum(-1)}
    log_p = torch.where(numerator > 0, logits - top + w.log(), 0.0)  # as from running sums
    results["entropy"] = (total / safe * safe.log() - (numerator * log_p).sum(-1, keepdim=True) / safe)[..., 0]
    if not renormalize:
        results["entropy"] = -torch.special.xlogy(p, p).sum(-1)
    back = rows.argsort()
    if r.grad:
        grad = grad_out[:, :, rows].float()
        grad_p = grad @ v.mT
        delta = (grad * out.float()).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[:, :, rows, None]
        grad_logits = (p * grad_p - (p if renormalize else share) * delta).to(dtype).float()
        places = {"k": keys.argsort(), "v": keys.argsort(), "q": back}
        grads = {
            "q": c.scale * (grad_logits @ k),
            "k": c.scale * (grad_logits.mT @ q),
            "v": p.to(dtype).float().mT @ grad,
        }
        for name, g in grads.items():
            g = g[:, :, places[name]]
            results[f"grad {name}"] = (g if name == "v" else g[..., features.argsort()]).to(dtype)
        if r.learned and r.power:
            grad_weight = share * (grad_p - (delta if renormalize else 0.0))
            found = torch.autograd.grad(weight, list(scores.values()), grad_weight.sum(1, keepdim=True))
            results |= {f"grad {n}": g for n, g in zip(scores, found, strict=True)}
    return {n: x[:, :, back] if n in ("out", "lse", *_STATS) else x for n, x in results.items()}
