"""The implementations compared, each called as its users call it.

A builder takes :class:`~gate4d.benchmarks.cases.Inputs`, prepares what may be prepared once (the gate, a dense bias,
compilation) and returns a step: a callable without arguments that gives the tuple of results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gate4d import gated_attention

from .cases import Inputs

Step = Callable[[], tuple[Tensor, ...]]


def gate4d_forward(x: Inputs, *, backend: str = "auto", row_stats: tuple[str, ...] = ()) -> Step:
    """``gated_attention``; with ``row_stats`` the result is ``(out, *statistics)``."""
    gate = x.gate()
    if not row_stats:
        return lambda: (gated_attention(x.q, x.k, x.v, gate=gate, visible=x.visible, backend=backend),)

    def step() -> tuple[Tensor, ...]:
        out, aux = gated_attention(
            x.q, x.k, x.v, gate=gate, visible=x.visible, row_stats=row_stats, return_aux=True, backend=backend
        )
        return out, *(getattr(aux, name) for name in row_stats)

    return step


def sdpa(x: Inputs) -> Step:
    """Plain SDPA: no gate, everything visible."""
    return lambda: (F.scaled_dot_product_attention(x.q, x.k, x.v),)


def sdpa_masked(x: Inputs) -> Step:
    """SDPA with gate and visibility as a ready bias in q's dtype; building it is not counted."""
    bias = x.bias().detach().to(x.q.dtype)
    return lambda: (F.scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=bias),)


def materialised(x: Inputs) -> Step:
    """Eager attention that holds the whole map, as code does that wants to look at it."""
    bias = x.bias().detach().to(x.q.dtype)
    return lambda: (eager_attention(x.q, x.k, x.v, bias),)


def flex_attention(x: Inputs) -> Step:
    """Compiled FlexAttention whose score_mod reads the two scores and adds ``log(1 - a_i b_j)``."""
    from torch.nn.attention import flex_attention as flex

    if x.motion is None or x.visible is not None:
        raise ValueError("flex_attention is set up for the pairwise gate with full visibility.")
    score_mod = motion_score_mod(1 - x.motion, x.motion)
    torch._dynamo.reset()  # shapes of an earlier case must not turn this one into a dynamic-shape kernel
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda: (compiled(x.q, x.k, x.v, score_mod=score_mod),)


def motion_score_mod(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
    """The pairwise gate as FlexAttention's score_mod; ``a [B, Nq]`` and ``b [B, Nk]`` as in MotionGate."""
    return lambda score, batch, head, i, j: score + torch.log(1 - a[batch, i] * b[batch, j])


def with_backward(build: Callable[[Inputs], Step], x: Inputs, grad_out: Tensor) -> Step:
    """Forward and backward of ``build``'s step; results ``(out, dq, dk, dv[, dmotion])``.

    The step is built anew in every call, because a gate that is learned is built from its scores in every call.
    """
    leaves = [t for t in (x.q, x.k, x.v, x.motion) if t is not None]

    def step() -> tuple[Tensor, ...]:
        (out,) = build(x)()
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out)

    return step


def eager_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T scale + bias) v with every intermediate in q's dtype."""
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return torch.softmax(logits + bias.to(q.dtype), dim=-1) @ v
