"""The operator for a scale or strength that ``torch.compile`` keeps as a symbol: one graph serves every value.

A float argument of an operator is a constant of the graph, and every new value a compilation. A tensor's value is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import op

_GATE_ARGS = op.GATE_ARGS.replace("float scale, float strength", "Tensor numbers")
torch.library.define(
    "gate4d::attention_forward_symbolic",
    f"(Tensor q, Tensor k, Tensor v, {_GATE_ARGS}, bool row_stats) -> (Tensor out, Tensor lse, Tensor stats)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "gate4d::attention_backward_symbolic",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_GATE_ARGS}, "
    "bool score_grads) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, "
    "Tensor grad_query_score, Tensor grad_key_score)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("gate4d::attention_forward_symbolic", "CompositeExplicitAutograd")
def _forward(*args):
    *tensors, numbers, renormalize, row_stats = args
    return torch.ops.gate4d.attention_forward(*tensors, *numbers.tolist(), renormalize, row_stats)


@torch.library.impl("gate4d::attention_backward_symbolic", "CompositeExplicitAutograd")
def _backward(*args):
    *tensors, numbers, renormalize, score_grads = args
    return torch.ops.gate4d.attention_backward(*tensors, *numbers.tolist(), renormalize, score_grads)


@torch.library.register_fake("gate4d::attention_forward_symbolic")
def _forward_fake(*args):
    *tensors, _, renormalize, row_stats = args
    return op.forward_fake(*tensors, 1.0, 1.0, renormalize, row_stats)


@torch.library.register_fake("gate4d::attention_backward_symbolic")
def _backward_fake(*args):
    *tensors, _, renormalize, score_grads = args
    return op.backward_fake(*tensors, 1.0, 1.0, renormalize, score_grads)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, query_score, key_score, dropped_keys, bounds, numbers, renormalize, row_stats):
        scores = query_score, key_score, dropped_keys, bounds
        out, lse, stats = torch.ops.gate4d.attention_forward_symbolic(q, k, v, *scores, numbers, renormalize, row_stats)
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(q, k, v, out, lse, *scores, numbers)
        ctx.renormalize = renormalize
        return out, lse, stats

    @staticmethod
    def backward(ctx, grad_out, grad_lse, _grad_stats):
        q, k, v, out, lse, *scores, numbers = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        grads = torch.ops.gate4d.attention_backward_symbolic(
            grad_out, grad_lse, q, k, v, out, lse, *scores, numbers, ctx.renormalize, wanted
        )
        given = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[:5], strict=True)]
        return *given, None, None, None, None, None


def attention(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    v: Tensor,  # [B, H, Nk, Dv]
    query_score: Tensor | None,  # [B, Nq]
    key_score: Tensor | None,  # [B, Nk]
    dropped_keys: Tensor | None,  # [B, Nk]
    bounds: Tensor | None,  # [1 or B, 3, Nq]
    scale: float,
    strength: float,
    renormalize: bool,
    row_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`.op.attention` in a compiled function, for numbers that are symbols there."""
    one = torch.ones((), dtype=torch.float64)
    numbers = torch.stack((one * scale, one * strength))
    args = (q, k, v, query_score, key_score, dropped_keys, bounds, numbers, renormalize, row_stats)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:5]):
        return _Attention.apply(*args)
    return torch.ops.gate4d.attention_forward_symbolic(*args)


def is_symbolic(*numbers: float) -> bool:
    """Whether a number is a symbol of the function that ``torch.compile`` traces."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # only ever while it traces

    return not all(has_static_value(x) for x in numbers)
