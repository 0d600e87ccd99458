"""The implementations of gated attention that are made of PyTorch's own attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._reference import gate_weight
from .op import Call, Request


def sdpa_reasons(r: Request) -> list[str]:
    reasons = []
    if r.gated:
        reasons.append("it cannot apply a gate")
    return [*reasons, *_plain_reasons(r)]


def _plain_reasons(r: Request) -> list[str]:
    """What PyTorch's attention cannot do, whatever the gate."""
    reasons = []
    if r.masked:
        reasons.append("it would need a dense mask for this visibility")
    if r.aux:
        reasons.append("it returns neither lse nor row statistics")
    return reasons


def run_sdpa(c: Call) -> tuple[Tensor, None, None]:
    return F.scaled_dot_product_attention(c.q, c.k, c.v, scale=c.scale), None, None


def _kind_reasons(r: Request, gate: str) -> list[str]:
    reasons = []
    if r.gate != gate:
        got = f"one of the kind {r.gate!r}" if r.gate else "a call without a gate"
        reasons.append(f"it serves gates of the kind {gate!r} alone, got {got}")
    return [*reasons, *_plain_reasons(r)]


def folded_reasons(r: Request) -> list[str]:
    return _kind_reasons(r, "keys")


def run_folded(c: Call) -> tuple[Tensor, None, None]:
    """A gate on keys alone as plain SDPA: its weight is multiplied into V, and an extra column of V sums it.

    Its error grows with the share of the un-gated softmax that the gate takes away, so ``auto`` does not choose it.
    """
    assert c.key_score is not None, "folded_reasons"
    weight = gate_weight(None, c.key_score, c.strength)[:, :, :, None].to(c.v.dtype)  # [B, 1, Nk, 1]
    value = c.v * weight
    if not c.renormalize:
        return F.scaled_dot_product_attention(c.q, c.k, value, scale=c.scale), None, None
    extra = weight.expand(*c.v.shape[:3], 8)  # 8 columns keep the rows of V aligned for the fast kernels
    both = F.scaled_dot_product_attention(c.q, c.k, torch.cat((value, extra), -1), scale=c.scale)
    out, total = both[..., : c.v.shape[3]], both[..., c.v.shape[3], None]
    alive = total > 0
    return torch.where(alive, out / torch.where(alive, total, 1.0), 0.0), None, None


def compacted_reasons(r: Request) -> list[str]:
    reasons = _kind_reasons(r, "drop")
    if torch.compiler.is_compiling():
        reasons.append("it reads the number of kept keys, which torch.compile cannot trace")
    return reasons


def run_compacted(c: Call) -> tuple[Tensor, None, None]:
    """Dropped keys as a gather of the kept ones, followed by the fastest plain SDPA. Waits for the device once a
    batch item, to learn how many are kept."""

    dropped = c.dropped_keys
    assert dropped is not None, "compacted_reasons"

    def item(b: int) -> Tensor:
        keep = (~dropped[b]).nonzero().squeeze(1)
        q, k, v = (x[b : b + 1] for x in (c.q, c.k, c.v))
        if not keep.numel():
            return q.new_zeros(*q.shape[:3], v.shape[3])
        return F.scaled_dot_product_attention(q, k.index_select(2, keep), v.index_select(2, keep), scale=c.scale)

    return torch.cat([item(b) for b in range(c.q.shape[0])]), None, None
