"""The arguments that every kernel over a score matrix shares, normalised, and what its tiles of queries see."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .primitives import KEY_GATE, LOG2E, NO_GATE, PAIR_GATE, power_code, reach_kernel
from .runtime import dot_precision, launch, readable


class Problem(NamedTuple):
    """The arguments as the kernels over a score matrix take them."""

    q: Tensor  # [B, H, Nq, D]
    k: Tensor  # [B, H, Nk, D]
    query_score: Tensor | None  # [B, Nq] fp32, contiguous
    key_score: Tensor | None  # [B, Nk] fp32, contiguous
    bounds: Tensor | None  # [1 or B, 3, Nq] int32, contiguous
    key_count: Tensor | None  # [B] int32, keys that count, the first ones; None for all
    scale: float  # > 0
    sign: int  # of the caller's scale, already multiplied into q
    gate: int
    power: int
    strength: float
    renormalize: bool

    @property
    def natural(self) -> bool:
        """Whether logits and lse are kept to base e, as accurately as fp32 inputs deserve."""
        return self.q.dtype == torch.float32

    @property
    def multiplies(self) -> bool:
        """Whether the forward multiplies by the weight instead of adding its logarithm to the exponent."""
        return self.gate != NO_GATE and not (self.power == 0 and self.renormalize)

    @property
    def features(self) -> frozenset[str]:
        """What takes registers, as the tables of configurations name it."""
        have = {
            "gate": self.gate != NO_GATE,
            "power": self.gate != NO_GATE and self.power != 2,
            "bounds": self.bounds is not None,
            "drop": self.key_count is not None,
        }
        return frozenset(name for name, there in have.items() if there)

    @property
    def shared(self) -> dict:
        """Arguments that every kernel over the score matrix has."""
        per_batch = self.bounds is not None and self.bounds.shape[0] > 1
        return {
            "A": self.query_score, "B": self.key_score, "BOUNDS": self.bounds,
            "KEY_COUNT": self.key_count,
            "bounds_stride_b": 3 * self.q.shape[2] if per_batch else 0,
            "heads": self.q.shape[1], "num_queries": self.q.shape[2], "num_keys": self.k.shape[2],
            "strength": self.strength, "GATE": self.gate, "POWER": self.power, "RENORM": self.renormalize,
            "HAS_BOUNDS": self.bounds is not None, "HAS_COUNT": self.key_count is not None,
            "PRECISION": dot_precision(self.q.dtype), "NATURAL": self.natural,
            "exponent_scale": self.scale if self.natural else self.scale * LOG2E,
        }  # fmt: skip


def problem(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    query_score: Tensor | None,  # [B, Nq]
    key_score: Tensor | None,  # [B, Nk]
    bounds: Tensor | None,  # [1 or B, 3, Nq] int32
    scale: float,
    strength: float,
    renormalize: bool,
    key_count: Tensor | None = None,  # [B] int32
) -> Problem:
    """Normalise what is rare (a scale <= 0, strength 0) so that the kernels need not know it."""
    sign = (scale > 0) - (scale < 0)
    if sign != 1:
        q, scale = q * sign, abs(scale) if sign else 1.0
    if strength == 0:
        query_score = key_score = None
    gate = NO_GATE if key_score is None else KEY_GATE if query_score is None else PAIR_GATE
    if gate == NO_GATE:
        query_score = None
    power = power_code(strength, q.dtype == torch.float16) if gate else 0
    query_score, key_score, bounds = (None if x is None else x.contiguous() for x in (query_score, key_score, bounds))
    return Problem(
        readable(q), readable(k), query_score, key_score, bounds, key_count, scale, sign, gate, power, strength,
        renormalize or gate == NO_GATE,
    )  # fmt: skip


def query_reach(p: Problem, block_m: int) -> Tensor | None:
    """What each tile of queries sees, int32 ``[1 or B, 6, tiles]``; None without intervals."""
    if p.bounds is None:
        return None
    num_queries, num_keys = p.q.shape[2], p.k.shape[2]
    reach = p.bounds.new_empty(p.bounds.shape[0], 6, triton.cdiv(num_queries, block_m))
    args = {
        "BOUNDS": p.bounds, "REACH": reach, "num_queries": num_queries, "num_keys": num_keys,
        "bounds_stride_b": batch_stride(p.bounds), "BLOCK_M": block_m,
        "tiles": reach.shape[2],
    }  # fmt: skip
    launch(reach_kernel, (reach.shape[2] * reach.shape[0],), args, num_warps=1)
    return reach


def batch_stride(x: Tensor | None) -> int:
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)
