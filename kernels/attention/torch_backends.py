"""The implementations of gated attention that are made of PyTorch's own attention."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .._reference import gate_weight
from ..support import KERNEL_DTYPES, dtype_name, has_triton
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


def flex_reasons(r: Request) -> list[str]:
    reasons = []
    if not has_triton():
        reasons.append("triton is not installed; pip install gate4d[triton]")
    if r.device_type != "cuda":
        reasons.append(f"it needs CUDA tensors, got {r.device_type}")
    if r.dtype not in KERNEL_DTYPES:
        reasons.append(f"it supports float32, bfloat16 and float16, got {dtype_name(r.dtype)}")
    if min(r.head_dim, r.value_dim) < 16:
        reasons.append(f"it supports head dimensions from 16 on, got {min(r.head_dim, r.value_dim)}")
    if r.masked:
        reasons.append("it would need a block mask made for this visibility")
    if r.aux:
        reasons.append("it returns neither lse nor row statistics")
    if r.gate and not r.renormalize:
        reasons.append("it always normalises with the gate's weights")
    if r.learned:
        reasons.append("it gives no gradient to the gate's scores")
    return reasons


@cache
def _flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def run_flex(c: Call) -> tuple[Tensor, None, None]:
    """torch's FlexAttention, compiled, with the logarithm of the weight added to each logit; compiles once a shape.

    Not run on a GPU yet, and so in no order of ``auto``: only a measured row can put it there.
    """

    def gated(score, b, h, i, j):
        if c.key_score is not None and c.strength != 0:
            product = c.key_score[b, j] if c.query_score is None else c.query_score[b, i] * c.key_score[b, j]
            score = score + c.strength * torch.log(1 - product)
        if c.dropped_keys is not None:
            score = torch.where(c.dropped_keys[b, j], -torch.inf, score)
        return score

    plain = c.key_score is None and c.dropped_keys is None
    return _flex_attention()(c.q, c.k, c.v, score_mod=None if plain else gated, scale=c.scale), None, None


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
