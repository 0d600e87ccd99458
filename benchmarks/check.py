"""The correctness gate: no number is printed for an implementation whose result is wrong.

The truth is the float64 reference. An implementation may be off from it by at most twice what a plain torch
computation in the same dtype is off, plus one rounding step of that dtype. A peer is not held to torch's accuracy,
only to computing the same thing: it may sum one number after the other, whose rounding steps add up like a random
walk, to the square root of the number of summands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gate4d import MotionGate, Visibility, gated_attention

from .inputs import Inputs
from .peers import eager_attention

_ROW_BLOCK = 16  # one query in each block of 16 is compared: every tile of every kernel is sampled
_CHUNK = 256  # queries a chunk of the gradient reference


class WrongResult(RuntimeError):
    """A variant's result is not what it claims to compute."""


@dataclass(frozen=True)
class Expected:
    """Results in float64 and the same in the tested dtype by plain torch; ``rows`` selects queries of per-query ones.

    Attributes:
        names: what each result is: out, then statistics or gradients.
        truth, yardstick: one tensor per name.
        summands: how many numbers are summed into one result.
        rows: the queries that are compared, None for all.
    """

    names: tuple[str, ...]
    truth: tuple[Tensor, ...]
    yardstick: tuple[Tensor, ...]
    summands: int
    rows: Tensor | None = None

    def verify(self, variant: str, results: Sequence[Tensor], *, peer: bool = False) -> None:
        """Raise WrongResult unless every result is finite and close enough to the truth."""
        if len(results) != len(self.names):
            raise WrongResult(f"{variant}: gave {len(results)} results, {len(self.names)} were expected: {self.names}.")
        for name, got, truth, yardstick in zip(self.names, results, self.truth, self.yardstick, strict=True):
            if not bool(torch.isfinite(got).all()):
                raise WrongResult(f"{variant}: {name} has values that are not finite.")
            picked = got if self.rows is None else got[:, :, self.rows]
            if picked.shape != truth.shape:
                raise WrongResult(f"{variant}: {name} has shape {list(got.shape)}, which is not {list(truth.shape)}.")
            error = _distance(picked, truth)
            rounding = torch.finfo(got.dtype).eps * float(truth.abs().max())
            allowed = 2 * _distance(yardstick, truth) + rounding * (math.sqrt(self.summands) if peer else 1)
            if not error <= allowed:
                raise WrongResult(f"{variant}: {name} is off by {error:.2e}, allowed are {allowed:.2e}.")


def expected_forward(x: Inputs, row_stats: tuple[str, ...] = ()) -> Expected:
    """Truth for a forward pass, on one random query of every 16."""
    starts = torch.arange(0, x.q.shape[2], _ROW_BLOCK)
    generator = torch.Generator().manual_seed(1)
    rows = (
        starts + (torch.rand(len(starts), generator=generator) * (x.q.shape[2] - starts).clamp(max=_ROW_BLOCK)).long()
    )
    with torch.no_grad():
        truth = _reference_rows(x, rows, torch.float64, row_stats)
        out = eager_attention(x.q[:, :, rows], x.k, x.v, x.bias(rows))
        stats = _reference_rows(x, rows, torch.float32, row_stats)[1:] if row_stats else ()
    return Expected(("out", *row_stats), truth, (out, *stats), x.k.shape[2], rows)


def expected_backward(x: Inputs, grad_out: Tensor) -> Expected:
    """Truth for ``(out, dq, dk, dv[, dmotion])``, all rows, chunk by chunk over the queries."""
    names = ("out", "dq", "dk", "dv") + (("dmotion",) if x.motion_scores is not None else ())
    truth = _reference_gradients(x, grad_out, torch.float64)
    yardstick = _reference_gradients(x, grad_out, torch.float32)
    return Expected(names, truth, yardstick, max(x.q.shape[2], x.k.shape[2]))


def _distance(a: Tensor, truth: Tensor) -> float:
    return float((a.detach().double() - truth).abs().max())


def _gate_rows(x: Inputs, motion: Tensor | None, rows: Tensor | slice, dtype: torch.dtype) -> dict:
    """Gate and visibility of some queries; built field by field to keep float64."""
    gate = visible = None
    if x.dropped is not None:
        gate = MotionGate.drop_keys(x.dropped)
    elif motion is not None:
        query = None if x.keys_only else 1 - motion[:, rows].to(dtype)
        gate = MotionGate(query_score=query, key_score=motion.to(dtype))
    if x.visible is not None and x.visible.bounds is not None:
        visible = Visibility(x.visible.bounds[:, :, rows], x.visible.key_extent)
    return {"gate": gate, "visible": visible, "backend": "reference"}


def _reference_rows(x: Inputs, rows: Tensor, dtype: torch.dtype, row_stats: tuple[str, ...]) -> tuple[Tensor, ...]:
    q, k, v = x.q[:, :, rows].to(dtype), x.k.to(dtype), x.v.to(dtype)
    out, aux = gated_attention(
        q, k, v, **_gate_rows(x, x.motion_scores, rows, dtype), row_stats=row_stats, return_aux=True
    )
    return out, *(getattr(aux, name) for name in row_stats)


def _reference_gradients(x: Inputs, grad_out: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x.q, x.k, x.v, x.motion_scores) if t is not None]
    q, k, v = leaves[:3]
    outs = []
    for begin in range(0, q.shape[2], _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        out = gated_attention(
            q[:, :, rows], k, v, **_gate_rows(x, leaves[3] if x.motion_scores is not None else None, rows, dtype)
        )
        out.backward(grad_out[:, :, rows].to(dtype))
        outs.append(out.detach())
    return torch.cat(outs, dim=2), *(leaf.grad for leaf in leaves)
