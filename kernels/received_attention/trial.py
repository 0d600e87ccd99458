"""The tiny problem that the Triton kernel must compute right before it serves calls of a kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._reference import gate_log_weight, seen
from .._verify import Trial, accept, device_of
from .reference import received_attention

BATCH, HEADS, QUERIES, KEYS = 2, 2, 200, 300  # full tiles and tiles at the end


def describe(r: Any) -> str:
    """The configuration in words."""
    words = [str(r.dtype).removeprefix("torch."), f"head {r.head_dim}"]
    if r.gate:
        words.append(f"gate {r.gate} ** {r.strength:g}")
    if r.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        words.append("tf32")
    return ", ".join([*words, *(["bounds"] if r.masked else [])])


def check(r: Any) -> None:
    """Mean and squared deviations of a request's kind against float64, lse being given."""
    draw = torch.Generator().manual_seed(0)
    device = device_of(r)
    q, k = (
        torch.randn(BATCH, HEADS, n, r.head_dim, generator=draw, dtype=torch.float32).to(device, r.dtype)
        for n in (QUERIES, KEYS)
    )
    scores = [
        torch.rand(BATCH, n, generator=draw, dtype=torch.float32).mul(1.2).clamp(max=1).to(device)
        for n in (QUERIES, KEYS)
    ]
    query_score, key_score = scores if r.gate == "pairwise" else (None, scores[1] if r.gate else None)
    bounds = None
    if r.masked:  # inside tiles, over whole ones, with sinks, and empty
        rows = [(0, 60, 0)] * 50 + [(100, 300, 17)] * 50 + [(50, 50, 0)] * 28
        rows += [(10, 290, 130)] * (QUERIES - len(rows))
        bounds = torch.tensor(rows, dtype=torch.int32, device=device).T[None].contiguous()
    scale = r.head_dim**-0.5
    lse = _lse(q.double(), k.double(), query_score, key_score, bounds, scale, r.strength).float()
    settings = scale, r.strength

    def in_torch(order: int) -> dict[str, Tensor]:
        to = torch.arange(QUERIES) if order == 0 else torch.randperm(QUERIES, generator=draw)
        to = to.to(device)
        features = torch.randperm(r.head_dim, generator=draw).to(device)
        mean, m2 = received_attention(
            q[:, :, to][..., features].float(), k[..., features].float(), lse[:, :, to],
            None if query_score is None else query_score[:, to], key_score,
            None if bounds is None else bounds[..., to], *settings,
        )  # fmt: skip
        return {"mean": mean, "m2": m2}

    got = torch.ops.gate4d.received_attention(q, k, lse, query_score, key_score, bounds, *settings)
    a, b = (None if x is None else x.double() for x in (query_score, key_score))
    exact = received_attention(q.double(), k.double(), lse.double(), a, b, bounds, *settings)
    names = "mean", "m2"
    accept(in_torch, dict(zip(names, got, strict=True)), dict(zip(names, exact, strict=True)), {})


def _lse(q, k, query_score, key_score, bounds, scale: float, strength: float) -> Tensor:
    logits = scale * (q @ k.mT)
    if key_score is not None and strength != 0:
        a = None if query_score is None else query_score.double()
        logits = logits + gate_log_weight(a, key_score.double(), strength)[:, None]
    if bounds is not None:
        logits = logits.masked_fill(~seen(bounds, k.shape[2])[:, None], -torch.inf)
    return logits.logsumexp(-1)


TRIAL = Trial("received attention: triton", describe, check)
