"""The implementations compared, each called as its users call it.

A builder takes :class:`~gate4d.benchmarks.inputs.Inputs`, prepares what may be prepared once (the gate, a dense bias,
compilation) and returns a step: a callable without arguments that gives the tuple of results.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gate4d import gated_attention

from .inputs import Inputs

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
    bias = _dense_bias(x)
    return lambda: (F.scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=bias),)


def _dense_bias(x: Inputs) -> Tensor:
    """The bias in q's dtype; part of the graph if the motion scores ask for gradients."""
    return x.bias().to(x.q.dtype)


def materialised(x: Inputs) -> Step:
    """Eager attention that holds the whole map, as code does that wants to look at it."""
    bias = _dense_bias(x)
    return lambda: (eager_attention(x.q, x.k, x.v, bias),)


def flex_attention(x: Inputs) -> Step:
    """Compiled FlexAttention: the pairwise gate as a score_mod that reads the two scores and adds ``log(1 - a_i b_j)``,
    visible intervals or dropped keys as a BlockMask. Both are made here, the compilation happens in the first call."""
    from torch.nn.attention import flex_attention as flex

    score_mod, block_mask = flex_mods(x)
    torch._dynamo.reset()  # shapes of an earlier case must not turn this one into a dynamic-shape kernel
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda: (compiled(x.q, x.k, x.v, score_mod=score_mod, block_mask=block_mask),)


def flex_mods(x: Inputs) -> tuple[Callable[..., Tensor] | None, object]:
    """score_mod and block_mask of FlexAttention for these inputs."""
    from torch.nn.attention.flex_attention import create_block_mask

    score_mod = mask_mod = None
    if x.motion_scores is not None:
        a = (
            x.motion_scores.new_ones(len(x.motion_scores), x.q.shape[2]) if x.keys_only else 1 - x.motion_scores
        )  # [B, Nq]
        score_mod = motion_score_mod(a, x.motion_scores)
    if x.dropped is not None:
        kept = ~x.dropped
        mask_mod = lambda batch, head, i, j: kept[batch, j]  # noqa: E731
    elif x.visible is not None and x.visible.bounds is not None:
        start, end, sink = x.visible.bounds[0]
        mask_mod = lambda batch, head, i, j: (j < sink[i]) | ((j >= start[i]) & (j < end[i]))  # noqa: E731
    if mask_mod is None:
        return score_mod, None
    batch = x.q.shape[0] if x.dropped is not None else None
    return score_mod, create_block_mask(mask_mod, batch, None, x.q.shape[2], x.k.shape[2], device=x.q.device)


def sdpa_folded(x: Inputs) -> Step:
    """Plain SDPA whose q and k carry the bias of a gate on keys, which has rank one, in eight more features.

    ``q' . k' = q . k + 1 * log(1 - b_j) / scale``; eight, because fast kernels want multiples of it.
    """
    scale = x.q.shape[3] ** -0.5
    log_weight = x.bias()[:, :, 0, :, None] / scale  # [B, 1, Nk, 1]

    def step() -> tuple[Tensor, ...]:
        ones = F.pad(x.q.new_ones(*x.q.shape[:3], 1), (0, 7))
        column = F.pad(log_weight.to(x.k.dtype), (0, 7)).expand(*x.k.shape[:3], 8)
        q, k = torch.cat((x.q, ones), -1), torch.cat((x.k, column), -1)
        return (F.scaled_dot_product_attention(q, k, x.v, scale=scale),)

    return step


def flash_attn(x: Inputs) -> Step:
    """flash-attn's function on its own layout ``[B, N, H, D]``."""
    from flash_attn import flash_attn_func

    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    return lambda: (flash_attn_func(q, k, v).transpose(1, 2),)


def xformers(x: Inputs) -> Step:
    """xformers' memory-efficient attention, with a dense bias where the operation needs one."""
    from xformers.ops import memory_efficient_attention

    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    bias = None
    if x.motion_scores is not None or x.dropped is not None or x.visible is not None:
        bias = x.bias().detach().to(q.dtype).expand(-1, q.shape[2], -1, -1).contiguous()
    return lambda: (memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2),)


def sageattention(x: Inputs) -> Step:
    """SageAttention, which computes q k^T in 8 bits."""
    from sageattention import sageattn

    return lambda: (sageattn(x.q, x.k, x.v, tensor_layout="HND"),)


def flash_colreduce(x: Inputs) -> Step:
    """flash-colreduce (0.2.2): mean over the queries of softmax(q k^T), ``[B, H, Nk]`` in q's dtype; it finds lse in a
    pass of its own and gives no variance. Not run: it needs CUDA."""
    from flash_colreduce import flash_colreduce as reduced

    return lambda: (reduced(x.q, x.k, reduction="mean"),)


def motion_score_mod(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
    """The pairwise gate as FlexAttention's score_mod; ``a [B, Nq]`` and ``b [B, Nk]`` as in MotionGate."""
    return lambda score, batch, head, i, j: score + torch.log(1 - a[batch, i] * b[batch, j])


def with_backward(build: Callable[[Inputs], Step], x: Inputs, grad_out: Tensor) -> Step:
    """Forward and backward of ``build``'s step; results ``(out, dq, dk, dv[, dmotion])``.

    The step is built anew in every call, because a gate that is learned is built from its scores in every call.
    """
    leaves = [t for t in (x.q, x.k, x.v, x.motion_scores) if t is not None]

    def step() -> tuple[Tensor, ...]:
        (out,) = build(x)()
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out)

    return step


@dataclass(frozen=True)
class Peer:
    """An implementation that users have, and what it can be compared on.

    Attributes:
        name: shown in tables.
        build: a builder of this module.
        operations: names of :data:`.registry.OPERATIONS` that it can compute.
        package: the package it comes from, None for torch.
        needs_cuda: it has no CPU implementation.
        unfit: why it cannot compute the others.
        exact: it keeps q k^T in the inputs' precision; the GPU targets are measured against such peers alone.
    """

    name: str
    build: Callable[[Inputs], Step]
    operations: tuple[str, ...]
    package: str | None = None
    needs_cuda: bool = False
    unfit: str = ""
    exact: bool = True

    def reasons(self, operation: str, device: str = "cpu") -> list[str]:
        """Why it cannot run here; empty if it can."""
        reasons = []
        if self.package is not None and not _installed(self.package):
            reasons.append(f"{self.package} is not installed")
        if self.needs_cuda and device != "cuda":
            reasons.append(f"it needs CUDA tensors, got {device}")
        if operation not in self.operations:
            reasons.append(self.unfit)
        return reasons


_FORWARD = ("plain", "gated", "keys", "drop", "frame_causal", "window")
_ALL = (*_FORWARD, "backward")
PEERS: dict[str, Peer] = {
    p.name: p
    for p in (
        Peer("SDPA", sdpa, ("plain",), unfit="it takes neither a gate nor visible intervals without a dense mask"),
        Peer("SDPA + mask", sdpa_masked, _ALL, unfit="it gives no statistics"),
        Peer("SDPA, low rank", sdpa_folded, ("keys",), unfit="only the bias of a gate on keys has low rank"),
        Peer("maps", materialised, _ALL, unfit="its statistics are measured by the operation's target"),
        Peer("FlexAttention", flex_attention, _FORWARD, unfit="set up for forward passes"),
        Peer("flash-attn", flash_attn, ("plain",), "flash_attn", True, "it takes no bias"),
        Peer("xformers", xformers, _FORWARD, "xformers", True, "set up for forward passes"),
        Peer("sageattention", sageattention, ("plain",), "sageattention", True, "it takes no bias", False),
        Peer(
            "flash-colreduce", flash_colreduce, ("received",), "flash_colreduce", True, "it gives means per key alone"
        ),
    )
}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def eager_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale + bias) v with every intermediate in q's dtype."""
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.to(q.dtype)
    return torch.softmax(logits, dim=-1) @ v
