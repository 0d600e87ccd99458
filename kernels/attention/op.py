"""Operator schemas, fake kernels and autograd: one registered boundary per call.

``torch.library.define`` with an ``autograd.Function`` outside costs a few microseconds a call;
``custom_op`` with registered autograd costs several times that. The C++ library registers the CPU kernels;
schemas live here so that they exist without it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autograd import first_derivative_only
from .._library import declare
from .._operands import same_device

_NAMESPACE = "gate4d"
_SECOND = "backend='reference' has second derivatives, in torch operations that hold the attention map."
GATE_ARGS = (
    "Tensor? query_score, Tensor? key_score, Tensor? dropped_keys, Tensor? bounds, "
    "float scale, float strength, bool renormalize"
)

torch.library.define(
    f"{_NAMESPACE}::attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {GATE_ARGS}, bool row_stats) -> (Tensor out, Tensor lse, Tensor stats)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    f"{_NAMESPACE}::attention_backward",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {GATE_ARGS}, "
    "bool score_grads) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, "
    "Tensor grad_query_score, Tensor grad_key_score)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Request(NamedTuple):
    """What an implementation must know to say whether it can serve a call."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    gate: str = ""  # "pairwise", "keys", "drop", "drop+pairwise", "drop+keys" or none
    masked: bool = False
    aux: bool = False
    renormalize: bool = True
    learned: bool = False  # the gate's scores ask for a gradient
    device_index: int | None = None  # of the CUDA device of the tensors, which need not be the current one
    # What else decides which code a GPU kernel is; left at the defaults for the CPU.
    power: float = 1.0  # of power_class
    row_stats: bool = False
    grad: bool = False  # a gradient is asked for

    @property
    def gated(self) -> bool:
        return self.gate != ""


def power_class(strength: float) -> float:
    """One strength of those that the kernels compute by the same code."""
    return strength if strength in (0.0, 0.5, 1.0, 1.5, 2.0) else 1.7


class Call(NamedTuple):
    """The arguments of one attention call, checked and normalised."""

    q: Tensor  # [B, H, Nq, D]
    k: Tensor  # [B, H, Nk, D]
    v: Tensor  # [B, H, Nk, Dv]
    query_score: Tensor | None  # [B, Nq] fp32
    key_score: Tensor | None  # [B, Nk] fp32
    dropped_keys: Tensor | None  # [B, Nk] bool
    bounds: Tensor | None  # [1 or B, 3, Nq] int32
    scale: float
    strength: float
    renormalize: bool
    row_stats: bool


def empty_heads_last(like: Tensor, batch: int, heads: int, tokens: int, dim: int) -> Tensor:
    """``[B, H, N, D]`` over ``[B, N, H, D]`` memory, so that concatenating heads afterwards is a view."""
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)


declare("attention_forward")
declare("attention_backward")


@torch.library.impl(f"{_NAMESPACE}::attention_forward", "CUDA")
def _attention_forward_cuda(*args):
    from .triton_launch import forward  # Triton is imported by the first call that needs it

    return forward(*args)


@torch.library.impl(f"{_NAMESPACE}::attention_backward", "CUDA")
def _attention_backward_cuda(*args):
    from .triton_launch import backward

    return backward(*args)


@torch.library.register_fake(f"{_NAMESPACE}::attention_forward")
def forward_fake(q, k, v, query_score, key_score, dropped_keys, bounds, scale, strength, renormalize, row_stats):
    same_device(q=q, k=k, v=v, query_score=query_score, key_score=key_score, dropped_keys=dropped_keys, bounds=bounds)
    batch, heads, num_queries, _ = q.shape
    out = empty_heads_last(q, batch, heads, num_queries, v.shape[-1])
    lse = q.new_empty((batch, heads, num_queries), dtype=torch.float32)
    stats = q.new_empty((3, batch, heads, num_queries) if row_stats else (0,), dtype=torch.float32)
    return out, lse, stats


@torch.library.register_fake(f"{_NAMESPACE}::attention_backward")
def backward_fake(
    grad_out, grad_lse, q, k, v, out, lse, query_score, key_score, dropped_keys, bounds,
    scale, strength, renormalize, score_grads,
):  # fmt: skip
    same_device(
        grad_out=grad_out, grad_lse=grad_lse, q=q, k=k, v=v, out=out, lse=lse, query_score=query_score,
        key_score=key_score, dropped_keys=dropped_keys, bounds=bounds,
    )  # fmt: skip

    def like(x: Tensor) -> Tensor:
        return empty_heads_last(x, *x.shape)

    def score(x: Tensor | None) -> Tensor:
        return q.new_empty((0,) if x is None or not score_grads else x.shape, dtype=torch.float32)

    return like(q), like(k), like(v), score(query_score), score(key_score)


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, query_score, key_score, dropped_keys, bounds, scale, strength, renormalize, row_stats):
        return torch.ops.gate4d.attention_forward(
            q, k, v, query_score, key_score, dropped_keys, bounds, scale, strength, renormalize, row_stats
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        q, k, v, query_score, key_score, dropped_keys, bounds, *settings, _ = inputs
        out, lse, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, query_score, key_score, dropped_keys, bounds)
        ctx.settings = settings

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _grad_stats: Tensor | None):
        q, k, v, out, lse, query_score, key_score, dropped_keys, bounds = ctx.saved_tensors
        none = (None,) * 6
        if grad_out is None and grad_lse is None:
            return None, None, None, None, None, *none
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        gate = (query_score, key_score, dropped_keys, bounds, *ctx.settings)
        score_grads = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        grads = torch.ops.gate4d.attention_backward(grad_out, grad_lse, q, k, v, out, lse, *gate, score_grads)
        grads = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[:5], strict=True)]
        sources = grad_out, grad_lse, q, k, v, query_score, key_score
        return *first_derivative_only("gated_attention", grads, sources, _SECOND), *none


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_score: Tensor | None,
    key_score: Tensor | None,
    dropped_keys: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    strength: float,
    renormalize: bool,
    row_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operator, with autograd where a gradient can be asked for."""
    args = (q, k, v, query_score, key_score, dropped_keys, bounds, scale, strength, renormalize, row_stats)
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad  # no generator: it costs as much as the checks
        or (query_score is not None and query_score.requires_grad)
        or (key_score is not None and key_score.requires_grad)
        or _is_transformed()
    ):  # fmt: skip
        return _Attention.apply(*args)
    return torch.ops.gate4d.attention_forward(*args)


def _is_transformed() -> bool:
    """Inside ``torch.func``: a tensor batched by vmap does not tell whether an outer level differentiates it."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _fold(x: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """Merge a vmapped dimension into the batch dimension 0; ``batch`` is 1 or B where the axis may be broadcast."""
    if x is None:
        return None
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    if x.shape[1] != batch:
        x = x.expand(size, batch, *x.shape[2:])
    return x.flatten(0, 1)


def _fold_all(tensors, dims, size):
    q_index = 2 if len(tensors) > 7 else 0
    q, dim = tensors[q_index], dims[q_index]
    batch = q.shape[0] if dim is None else q.movedim(dim, 0).shape[1]
    return [_fold(x, d, size, batch) for x, d in zip(tensors, dims, strict=True)]


@torch.library.register_vmap(f"{_NAMESPACE}::attention_forward")
def _attention_forward_vmap(info, in_dims, *args):
    size = info.batch_size
    out, lse, stats = torch.ops.gate4d.attention_forward(*_fold_all(args[:7], in_dims[:7], size), *args[7:])
    stats_dim = 1 if stats.dim() == 4 else None
    stats = stats if stats_dim is None else stats.unflatten(1, (size, -1))
    return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1)), stats), (0, 0, stats_dim)


@torch.library.register_vmap(f"{_NAMESPACE}::attention_backward")
def _attention_backward_vmap(info, in_dims, *args):
    size = info.batch_size
    grads = torch.ops.gate4d.attention_backward(*_fold_all(args[:11], in_dims[:11], size), *args[11:])
    dims = tuple(None if g.numel() == 0 and g.dim() == 1 else 0 for g in grads)
    return tuple(g if d is None else g.unflatten(0, (size, -1)) for g, d in zip(grads, dims, strict=True)), dims
