"""Random inputs of a measurement: tensors, gate and visibility, and the same as a dense additive bias."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gate4d import MotionGate, Visibility
from gate4d.kernels.attention.reference import gate_weight

from .registry import AttentionShape

GateKind = Literal["none", "pairwise", "keys", "drop"]
VisibleKind = Literal["full", "frame_causal"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What every implementation of a case gets.

    Attributes:
        q, k, v: ``[B, H, Nq, D]``, ``[B, H, Nk, D]``, ``[B, H, Nk, D]``.
        motion_scores: fp32 ``[B, Nk]`` in [0, 1), of the pairwise gate or the gate on keys; None without one.
        keys_only: the gate is that on keys.
        dropped: bool ``[B, Nk]``, the keys of a hard gate; None without one.
        visible: None for full attention.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    motion_scores: Tensor | None = None
    dropped: Tensor | None = None
    visible: Visibility | None = None
    keys_only: bool = False

    def gate(self) -> MotionGate | None:
        """The gate as a user builds it from motion scores."""
        if self.dropped is not None:
            return MotionGate.drop_keys(self.dropped)
        if self.motion_scores is None:
            return None
        return MotionGate.keys(self.motion_scores) if self.keys_only else MotionGate.pairwise(self.motion_scores)

    def ungated(self) -> Inputs:
        """The same tensors without gate and visibility: what plain attention computes."""
        return replace(self, motion_scores=None, dropped=None, visible=None, keys_only=False)

    def bias(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Gate and visibility as the additive bias of the papers, fp32 ``[1 or B, 1, rows, Nk]``, -inf = hidden."""
        queries, keys = self.q.shape[2], self.k.shape[2]
        bias = torch.zeros(1, len(range(queries)[rows]) if isinstance(rows, slice) else len(rows), keys)
        if self.motion_scores is not None:
            query = None if self.keys_only else 1 - self.motion_scores[:, rows]
            weight = gate_weight(query, self.motion_scores, 1.0)
            bias = weight.log() if weight.requires_grad else weight.log_()
        if self.dropped is not None:
            bias = bias.masked_fill(self.dropped[:, None, :], -torch.inf)
        if self.visible is not None and self.visible.bounds is not None:
            seen = Visibility(self.visible.bounds[:, :, rows]).dense(queries, keys)
            bias = bias.masked_fill(~seen, -torch.inf)
        return bias[:, None]


def make_inputs(
    shape: AttentionShape,
    frames: int,
    *,
    dtype: torch.dtype = torch.float32,
    gate: GateKind = "none",
    drop_fraction: float = 0.3,
    visible: VisibleKind = "full",
    window: int | None = None,
    requires_grad: bool = False,
    seed: int = 0,
) -> Inputs:
    """Random q, k, v for ``shape`` and ``frames``, with random motion scores or dropped keys."""
    generator = torch.Generator().manual_seed(seed)
    batch, queries, keys = shape.sizes(frames)

    def normal(tokens: int) -> Tensor:
        x = torch.randn(batch, shape.heads, tokens, shape.head_dim, generator=generator).to(dtype)
        return x.requires_grad_(requires_grad)

    q, k, v = normal(queries), normal(keys), normal(keys)
    motion = dropped = None
    if gate in ("pairwise", "keys"):
        motion = torch.rand(batch, keys, generator=generator).requires_grad_(requires_grad)
    elif gate == "drop":
        order = torch.rand(batch, keys, generator=generator).argsort(dim=1)
        dropped = order < round(drop_fraction * keys)
    seen = None if visible == "full" else Visibility.frame_causal(shape.layout(frames), window=window)
    return Inputs(q, k, v, motion, dropped, seen, gate == "keys")
