"""Gated attention as torch computes it at the inputs' precision: the measure for the error of a fast kernel.

Materialised, but with the roundings every flash-type kernel has, SDPA's own included: logits and sums in fp32,
probabilities and the logits' gradient rounded to the inputs' dtype before they are multiplied with v, k and q, the
backward from ``exp(s - lse)`` and ``sum(grad_out * out)`` with the rounded output, the entropy from running sums.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gate4d import MotionGate, Visibility
from gate4d.functional import AttentionAux

LOG2E = math.log2(math.e)


def torch_attention(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    v: Tensor,  # [B, H, Nk, Dv]
    *,
    gate: MotionGate | None = None,
    visible: Visibility | None = None,
    running: bool = False,
) -> tuple[Tensor, AttentionAux]:
    """``gate4d.gated_attention`` with all statistics.

    ``running`` computes as a kernel that streams over the keys must: sums grow term by term, in a random order, and
    exponentials are powers of two whose exponent is one fused multiply-add. The exact result is the same.
    """
    gate = MotionGate() if gate is None else gate
    mask = (Visibility.full() if visible is None else visible).dense(q.shape[2], k.shape[2])[:, None]
    if gate.dropped_keys is not None:
        mask = mask & ~gate.dropped_keys[:, None, None]
    weight = torch.ones(1, 1, q.shape[2], k.shape[2])
    if gate.key_score is not None:
        query_score = torch.ones(q.shape[:3:2]) if gate.query_score is None else gate.query_score
        weight = _power(1 - query_score[:, None, :, None] * gate.key_score[:, None, None, :], gate.strength)
    orders = (torch.randperm(n) if running else torch.arange(n) for n in (*mask.shape[2:], q.shape[3], v.shape[3]))
    rows, keys, features, values = orders
    q, k, v = q[:, :, rows][..., features], k[:, :, keys][..., features], v[:, :, keys][..., values]
    weight, mask = weight[:, :, rows][..., keys], mask[:, :, rows][..., keys]
    out, lse, stats = _Attention.apply(q, k, v, weight, mask, gate.renormalize, running)
    back = rows.argsort()
    out, lse, stats = out[:, :, back][..., values.argsort()], lse[:, :, back, 0], stats[:, :, :, back, 0]
    if gate.output_scale is not None:
        out = out * gate.output_scale[:, None, :, None].to(out.dtype)
    return out, AttentionAux(lse, *stats)


def _power(weight: Tensor, strength: float) -> Tensor:
    """``weight ** strength`` with gradient 0 at a weight of 0, unless strength is 1."""
    if strength in (0, 1):
        return weight**strength
    return torch.where(weight > 0, torch.where(weight > 0, weight, 1.0) ** strength, 0.0)


def _matmul(a: Tensor, b: Tensor, running: bool) -> Tensor:
    """``a [..., n, m] @ b [..., m, d]``; ``running``: the m terms are added one by one."""
    if not running:
        return a @ b
    total = a.new_zeros(*a.shape[:-1], b.shape[-1])
    for i in range(a.shape[-1]):
        total.addcmul_(a[..., i : i + 1], b[..., i : i + 1, :])
    return total


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, mask: Tensor, renormalize: bool, running: bool
    ):
        def total_of(x: Tensor) -> Tensor:
            return _matmul(x, x.new_ones(x.shape[-1], 1), running)

        scale = q.shape[-1] ** -0.5 if q.shape[-1] else 1.0
        products = _matmul(q.float(), k.float().mT, running)
        counted = mask & (weight > 0) if renormalize else mask
        top = products.masked_fill(~counted, -torch.inf).amax(-1, keepdim=True)
        top = torch.where(top.isfinite(), top, 0.0)
        exponent = _exponent(products, scale, scale * top, running)
        exponential = torch.where(mask, _exp(exponent, running), 0.0)
        numerator = exponential * weight
        total = total_of(numerator if renormalize else exponential)
        alive = total > 0
        safe = torch.where(alive, total, 1.0)
        out = (_matmul(numerator.to(q.dtype).float(), v.float(), running) / safe).to(q.dtype)
        log_weight = torch.where(numerator > 0, exponent + weight.log(), 0.0)
        entropy = total_of(numerator) / safe * safe.log() - total_of(numerator * log_weight) / safe
        largest = (numerator / safe).amax(-1, keepdim=True)
        stats = torch.stack((entropy, largest, total_of(numerator.square()) / safe / safe))
        lse = torch.where(alive, safe.log() + scale * top, -torch.inf)
        ctx.save_for_backward(q, k, v, weight, out, lse, alive & mask, products)
        ctx.settings = scale, renormalize, running
        ctx.mark_non_differentiable(stats)
        return out, lse, stats

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor, _: Any):
        q, k, v, weight, out, lse, counted, products = ctx.saved_tensors
        scale, renormalize, running = ctx.settings
        grad_out, dtype = grad_out.float(), q.dtype
        exponent = _exponent(products, scale, torch.where(lse.isfinite(), lse, 0.0), running)
        exponential = torch.where(counted, _exp(exponent, running), 0.0)  # e^s / Z
        p = weight * exponential
        grad_p = _matmul(grad_out, v.float().mT, running)
        delta = _matmul(grad_out * out.float(), grad_out.new_ones(out.shape[-1], 1), running) - grad_lse
        grad_logits = p * grad_p - (p if renormalize else exponential) * delta
        grad_logits = grad_logits.to(dtype).float()
        grad_q = scale * _matmul(grad_logits, k.float(), running)
        grad_k = scale * _matmul(grad_logits.mT, q.float(), running)
        grad_v = _matmul(p.to(dtype).float().mT, grad_out, running)
        grad_weight = exponential * (grad_p - (delta if renormalize else 0))
        grad_weight = grad_weight.sum_to_size(weight.shape)
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype), grad_weight, None, None, None


def _exponent(products: Tensor, scale: float, reference: Tensor, running: bool) -> Tensor:
    """``scale * products - reference``; ``running``: rounded as a fused multiply-add in units of log 2."""
    if not running:
        return scale * products - reference
    factor, shift = torch.tensor(scale * LOG2E), LOG2E * reference
    return ((products.double() * factor.double() - shift.double()).float() / LOG2E).float()


def _exp(exponent: Tensor, running: bool) -> Tensor:
    exponent = exponent.clamp(max=80)
    return torch.exp2(exponent * LOG2E) if running else torch.exp(exponent)
