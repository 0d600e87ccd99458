"""LayerNorm of q or k, RoPE-2D and the append to a cache in one pass over memory.

The CUDA kernel reads and writes any strides. It was compiled, and its arithmetic checked on the CPU; it has not run on
a GPU yet. Everywhere else, and where the extension was built without CUDA, the same is computed with torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.attention.op import empty_heads_last
from .rope import RoPE2D

MAX_HEAD_DIM = 256

torch.library.define(
    "gate4d::norm_rope_forward",
    "(Tensor x, Tensor(a!) out, Tensor? weight, Tensor? bias, Tensor? positions, Tensor? frequencies, bool norm, "
    "float eps) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "gate4d::norm_rope_backward",
    "(Tensor grad_out, Tensor x, Tensor? weight, Tensor? positions, Tensor? frequencies, bool norm, float eps, "
    "bool affine_grads) -> (Tensor grad_x, Tensor sums)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("gate4d::norm_rope_forward")
def _forward_fake(x, out, weight, bias, positions, frequencies, norm, eps):
    return None


@torch.library.register_fake("gate4d::norm_rope_backward")
def _backward_fake(grad_out, x, weight, positions, frequencies, norm, eps, affine_grads):
    parts = torch.library.get_ctx().new_dynamic_size() if affine_grads else 0
    return empty_heads_last(x, *x.shape), x.new_empty(parts, 2, x.shape[3], dtype=torch.float32)


def norm_rope(
    x: Tensor,  # [B, H, N, D]
    *,
    weight: Tensor | None = None,  # [D]
    bias: Tensor | None = None,  # [D]
    eps: float | None = None,
    rope: RoPE2D | None = None,
    positions: Tensor | None = None,  # [B or 1, N, 2]
    out: Tensor | None = None,  # [B, H, N, D]
) -> Tensor:
    """LayerNorm over D (with ``eps``), then RoPE-2D (with ``rope``): ``[B, H, N, D]`` in the dtype of ``x``.

    Args:
        x: queries, keys or values of any strides; fp32, bf16 or fp16 (float64 without the CUDA kernel).
        weight, bias: of the LayerNorm.
        eps: of the LayerNorm; None leaves it out.
        rope, positions: the rotation and its integer positions (y, x), which may be negative; both or none.
        out: where to write, for example the slots of a cache; any strides. Without gradients only.

    Raises:
        ValueError: a shape does not fit, or arguments that belong together are not given together.
        NotImplementedError: ``out`` where a gradient is asked for.
    """
    _check(x, weight, bias, eps, rope, positions, out)
    if out is not None:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, out)):
            raise NotImplementedError("out has no gradient: call under torch.no_grad(), or without out.")
        if _fused(x, rope):
            _write(x, out, weight, bias, *_rotation(x, rope, positions), eps)
            return out
        return out.copy_(_plain(x, weight, bias, eps, rope, positions))
    if _fused(x, rope):
        return _NormRope.apply(x, weight, bias, *_rotation(x, rope, positions), eps)
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


def _fused(x: Tensor, rope: RoPE2D | None) -> bool:
    """Whether the CUDA kernel serves the call."""
    return (
        x.is_cuda
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.shape[3] % 4 == 0
        and x.shape[3] <= MAX_HEAD_DIM
        and (rope is None or rope.exact)
        and torch._C._dispatch_has_kernel_for_dispatch_key("gate4d::norm_rope_forward", "CUDA")
    )


def fuses(x: Tensor, norm: nn.Module, rope: nn.Module | None) -> bool:
    """Whether one kernel computes ``rope(norm(x))`` for tokens ``[B, H, N, D]``: a LayerNorm over D or no norm, RoPE-2D
    or no rotation, on CUDA with the extension compiled. A norm with hooks is left to run them."""
    plain_norm = type(norm) is nn.Identity or (type(norm) is nn.LayerNorm and norm.normalized_shape == x.shape[3:])
    hooked = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    return plain_norm and not hooked and (rope is None or type(rope) is RoPE2D) and _fused(x, rope)


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


@lru_cache(maxsize=16)
def frequencies_of(dim: int, base: float, scale: float, device: torch.device) -> Tensor:
    """Angle of one position in radians, fp32 ``[D / 4]``, rounded once."""
    exponent = torch.arange(0, dim // 2, 2, dtype=torch.float64) / (dim // 2)
    return (scale / base**exponent).float().to(device)


def _rotation(x: Tensor, rope: RoPE2D | None, positions: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if rope is None:
        return None, None
    if positions.dtype not in (torch.int32, torch.int64):
        positions = positions.int()
    return positions.to(x.device), frequencies_of(x.shape[3], rope.base, rope.scale, x.device)


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


def _write(x, out, weight, bias, positions, frequencies, eps) -> None:
    settings = eps is not None, 0.0 if eps is None else eps
    torch.ops.gate4d.norm_rope_forward(x, out, _floats(weight), _floats(bias), positions, frequencies, *settings)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, positions, frequencies, eps):
        out = empty_heads_last(x, *x.shape)
        _write(x, out, weight, bias, positions, frequencies, eps)
        ctx.save_for_backward(x, weight, bias, positions, frequencies)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor):
        x, weight, bias, positions, frequencies = ctx.saved_tensors
        _, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_x, sums = torch.ops.gate4d.norm_rope_backward(
            grad_out, x, _floats(weight), positions, frequencies, ctx.eps is not None, ctx.eps or 0.0,
            want_weight or want_bias,
        )  # fmt: skip
        grad_weight, grad_bias = sums.sum(0).unbind(0) if want_weight or want_bias else (None, None)
        grad_weight = grad_weight.to(weight.dtype) if want_weight else None
        return grad_x, grad_weight, grad_bias.to(bias.dtype) if want_bias else None, None, None, None
