"""Problems for norm + RoPE-2D: types, head dimensions and memory layouts, with NaN around every view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gate4d.nn import RoPE2D

BATCH, HEADS, TOKENS = 2, 3, 9
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    dim: int
    dtype: torch.dtype
    memory: str
    out_memory: str
    norm: bool
    rotate: bool
    index: torch.dtype  # of the positions

    def __str__(self) -> str:
        kind = "+".join(name for name in ("norm", "rotate") if getattr(self, name)) or "copy"
        return f"{self.dim}-{str(self.dtype)[6:]}-{self.memory}-{self.out_memory}-{kind}-{str(self.index)[6:]}"


SINGLE, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    Case(64, SINGLE, "contiguous", "packed", True, True, torch.int64),
    Case(64, BF16, "packed", "cache", True, True, torch.int32),
    Case(48, HALF, "packed", "cache", True, True, torch.int64),
    Case(256, SINGLE, "strided", "strided", True, True, torch.int64),
    Case(4, SINGLE, "strided", "cache", False, True, torch.int32),
    Case(8, HALF, "packed", "cache", True, True, torch.int32),
    Case(80, HALF, "cache", "strided", True, False, torch.int64),
    Case(132, BF16, "packed", "packed", False, True, torch.int64),
    Case(64, BF16, "packed", "cache", False, False, torch.int64),
]


class Problem(NamedTuple):
    x: Tensor
    x_buffer: Tensor
    out: Tensor
    out_buffer: Tensor
    grad_out: Tensor
    weight: Tensor | None
    bias: Tensor | None
    settings: dict


def lay_out(x: Tensor, memory: str) -> tuple[Tensor, Tensor]:
    """A view with the values of ``x [B, H, N, D]``, and its buffer, which is NaN elsewhere."""
    b, h, n, d = x.shape
    if memory == "contiguous":
        buffer = torch.full((b, h, n, d), torch.nan, dtype=x.dtype, device=x.device)
        view = buffer
    elif memory == "packed":  # keys in the middle of qkv
        buffer = torch.full((b, n, 3, h, d), torch.nan, dtype=x.dtype, device=x.device)
        view = buffer[:, :, 1].transpose(1, 2)
    elif memory == "cache":  # slots in the middle of a longer cache
        buffer = torch.full((b, h, 2 * n + 5, d), torch.nan, dtype=x.dtype, device=x.device)
        view = buffer[:, :, 5 : 5 + n]
    else:  # no stride is 1
        buffer = torch.full((d, 2 * n, h, b, 2), torch.nan, dtype=x.dtype, device=x.device)
        view = buffer[:, ::2, :, :, 1].permute(3, 2, 1, 0)
    view.copy_(x)
    return view, buffer


def draw(case: Case, affine: bool) -> Problem:
    shape = BATCH, HEADS, TOKENS, case.dim
    x = lay_out((2 * torch.randn(shape) + 0.5).to(case.dtype), case.memory)
    out = lay_out(torch.full(shape, torch.nan).to(case.dtype), case.out_memory)
    grad_out, _ = lay_out(torch.randn(shape).to(case.dtype), case.out_memory)
    weight, bias = (torch.rand(case.dim) + 0.5, torch.randn(case.dim)) if affine and case.norm else (None, None)
    settings = {"eps": EPS if case.norm else None}
    if case.rotate:
        positions = torch.randint(-3, 60, (1 if case.dim == 48 else BATCH, TOKENS, 2)).to(case.index)
        positions[:, 0] = -1
        settings |= {"rope": RoPE2D(), "positions": positions}
    return Problem(*x, *out, grad_out, weight, bias, settings)


def evaluate(function: Callable[..., Tensor], x: Problem, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Output and gradients of x, weight and bias. ``dtype`` of x and the gradient; None: torch at the case's."""
    work, options = (x.x.dtype, {"backend": "torch"}) if dtype is None else (dtype, {})
    leaf = x.x.detach().to(work) if work != x.x.dtype else x.x.detach()  # the strided view itself where it fits
    # torch's LayerNorm wants parameters of x's type or fp32; float64 throughout for the reference.
    parameter = torch.float64 if work == torch.float64 else torch.float32
    leaves = [
        leaf.requires_grad_(),
        *(t.to(parameter).clone().requires_grad_() for t in (x.weight, x.bias) if t is not None),
    ]
    affine = {} if x.weight is None else {"weight": leaves[1], "bias": leaves[2]}
    if dtype is None and affine:
        affine = {name: t.to(work) for name, t in affine.items()}
    out = function(leaves[0], **affine, **x.settings, **options)
    grads = torch.autograd.grad(out, leaves, x.grad_out.to(work))
    leaf.requires_grad_(False)
    return out.detach(), *grads
