"""LayerNorm of q or k, RoPE-2D and the append to a cache in one pass over memory.

On a GPU one Triton kernel reads and writes any strides. It was interpreted and compiled; it has not run on a GPU yet.
Everywhere else the same is computed with torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.norm_rope import op
from .rope import RoPE2D


def norm_rope(
    x: Tensor,  # [B, H, N, D]
    *,
    weight: Tensor | None = None,  # [D]
    bias: Tensor | None = None,  # [D]
    eps: float | None = None,
    rope: RoPE2D | None = None,
    positions: Tensor | None = None,  # [B or 1, N, 2]
    out: Tensor | None = None,  # [B, H, N, D]
    backend: str = "auto",
) -> Tensor:
    """LayerNorm over D (with ``eps``), then RoPE-2D (with ``rope``): ``[B, H, N, D]`` in the dtype of ``x``.

    Args:
        x: queries, keys or values of any strides; any floating dtype (``auto`` computes float64 with torch).
        weight, bias: of the LayerNorm.
        eps: of the LayerNorm; None leaves it out.
        rope, positions: the rotation and its integer positions (y, x), which may be negative; both or none.
        out: where to write, for example the slots of a cache; any strides. Without gradients only.
        backend: "triton", "torch", "cuda" (the CUDA C++ kernel, an opt-in build), or "auto": Triton on a GPU, else
            torch.

    Raises:
        ValueError: a shape does not fit, arguments that belong together are not given together, or there is no such
            backend.
        NotImplementedError: ``out`` where a gradient is asked for, or the backend named cannot serve the call.
    """
    _check(x, weight, bias, eps, rope, positions, out)
    kind = {"weight": weight, "bias": bias, "norm": eps is not None, "rotate": rope is not None}
    chosen = op.select(backend, x, rope is None or rope.exact, **kind)
    if out is not None:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, out)):
            raise NotImplementedError("out has no gradient: call under torch.no_grad(), or without out.")
        if chosen != "torch":
            op.write(chosen, x, out, weight, bias, *_rotation(x, rope, positions), eps)
            return out
        return out.copy_(_plain(x, weight, bias, eps, rope, positions))
    if chosen != "torch":
        return op.NormRope.apply(chosen, x, weight, bias, *_rotation(x, rope, positions), eps)
    return _plain(x, weight, bias, eps, rope, positions)


def _check(x, weight, bias, eps, rope, positions, out) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating point of shape [B, H, N, D], got {x.dtype} {list(x.shape)}.")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and eps is None:
            raise ValueError(f"{name} belongs to the LayerNorm, which needs eps.")
        if t is not None and t.shape != x.shape[3:]:
            raise ValueError(f"{name} must have shape [{x.shape[3]}], got {list(t.shape)}.")
    if (rope is None) != (positions is None):
        raise ValueError("rope and positions must be given together.")
    if positions is not None and (
        positions.is_floating_point() or positions.shape[1:] != (x.shape[2], 2) or positions.shape[0] not in (1, len(x))
    ):
        raise ValueError(
            f"positions must be integers of shape [{len(x)}, {x.shape[2]}, 2], "
            f"got {positions.dtype} {list(positions.shape)}."
        )
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        raise ValueError(
            f"out must be {x.dtype} {list(x.shape)} on {x.device}, got {out.dtype} {list(out.shape)} on {out.device}."
        )


def fuses(x: Tensor, norm: nn.Module, rope: nn.Module | None) -> bool:
    """Whether one kernel computes ``rope(norm(x))`` for tokens ``[B, H, N, D]``: a LayerNorm over D or no norm, RoPE-2D
    or no rotation, on a GPU. A norm with hooks is left to run them."""
    plain_norm = type(norm) is nn.Identity or (type(norm) is nn.LayerNorm and norm.normalized_shape == x.shape[3:])
    hooked = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    return (
        plain_norm and not hooked and (rope is None or type(rope) is RoPE2D) and op.fits(x, rope is None or rope.exact)
    )


def apply_fused(
    x: Tensor, norm: nn.Module, rope: RoPE2D | None, positions: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """``rope(norm(x))`` of modules that :func:`fuses`; with ``positions`` None nothing is rotated."""
    settings = {} if type(norm) is nn.Identity else {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
    return norm_rope(x, **settings, rope=None if positions is None else rope, positions=positions, out=out)


def _plain(x, weight, bias, eps, rope, positions) -> Tensor:
    if eps is not None:
        x = F.layer_norm(x, x.shape[3:], weight, bias, eps)
    return x if rope is None else rope(x, positions)


def _rotation(x: Tensor, rope: RoPE2D | None, positions: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if rope is None:
        return None, None
    if positions.dtype not in (torch.int32, torch.int64):
        positions = positions.int()
    return positions.to(x.device), op.frequencies(x.shape[3], rope.base, rope.scale, x.device)
