"""Norm + RoPE-2D as one registered operator: schemas, fake kernels, autograd, and who computes it.

The Triton kernel is what every GPU gets. The CUDA C++ kernel is a peer: an opt-in build, used where asked for by name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autograd import first_derivative_only
from .._triton.runtime import heads_last
from .._verify import Trial, accept, device_of
from ..support import (
    KERNEL_DTYPES,
    MAX_HEAD_DIM,
    capability,
    cuda_library_error,
    dtype_name,
    has_triton,
    kept,
    passes,
)  # fmt: skip
from .reference import norm_rope

BACKENDS = ("triton", "cuda", "torch")
_FORWARD = (
    "(Tensor x, Tensor(a!) out, Tensor? weight, Tensor? bias, Tensor? positions, Tensor? frequencies, bool norm, "
    "float eps) -> ()"
)
_BACKWARD = (
    "(Tensor grad_out, Tensor x, Tensor? weight, Tensor? positions, Tensor? frequencies, bool norm, float eps, "
    "bool affine_grads) -> (Tensor grad_x, Tensor {})"
)
for _suffix, _sums in (("", "affine"), ("_cuda", "sums")):
    torch.library.define(f"gate4d::norm_rope_forward{_suffix}", _FORWARD, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.define(
        f"gate4d::norm_rope_backward{_suffix}", _BACKWARD.format(_sums), tags=(torch.Tag.pt2_compliant_tag,)
    )


@torch.library.register_fake("gate4d::norm_rope_forward")
@torch.library.register_fake("gate4d::norm_rope_forward_cuda")
def _forward_fake(x, out, weight, bias, positions, frequencies, norm, eps):
    return None


@torch.library.register_fake("gate4d::norm_rope_backward")
def _backward_fake(grad_out, x, weight, positions, frequencies, norm, eps, affine_grads):
    return heads_last(x, *x.shape), x.new_empty(2 if affine_grads else 0, x.shape[3], dtype=torch.float32)


@torch.library.register_fake("gate4d::norm_rope_backward_cuda")
def _backward_cuda_fake(grad_out, x, weight, positions, frequencies, norm, eps, affine_grads):
    parts = torch.library.get_ctx().new_dynamic_size() if affine_grads else 0
    return heads_last(x, *x.shape), x.new_empty(parts, 2, x.shape[3], dtype=torch.float32)


@torch.library.impl("gate4d::norm_rope_forward", "CUDA")
def _forward(*args):
    from .triton import forward

    return forward(*args)


@torch.library.impl("gate4d::norm_rope_backward", "CUDA")
def _backward(*args):
    from .triton import backward

    return backward(*args)


def fits(x: Tensor, exact: bool) -> bool:
    """Whether ``auto`` takes the Triton kernel for ``x [B, H, N, D]``; ``exact`` is the rotation's in at least fp32."""
    return x.is_cuda and not triton_reasons(x, exact)


def triton_reasons(x: Tensor, exact: bool) -> list[str]:
    """Why the Triton kernel cannot serve the call; empty if it can."""
    reasons = _reasons(x, exact)
    if not has_triton():
        reasons.append("triton is not installed; pip install gate4d[triton]")
    if x.is_cuda and (found := capability(x.device.index)) is not None and found < (8, 0):
        reasons.append(f"it needs compute capability 8.0 or newer, got {found[0]}.{found[1]}")
    return reasons


def cuda_reasons(x: Tensor, exact: bool) -> list[str]:
    """Why the CUDA C++ kernel cannot serve the call; empty if it can."""
    reasons = _reasons(x, exact)
    if (error := cuda_library_error()) is not None:
        reasons.append(error)
    return reasons


def _reasons(x: Tensor, exact: bool) -> list[str]:
    reasons = []
    if not x.is_cuda:
        reasons.append(f"it needs CUDA tensors, got {x.device.type}")
    if x.dtype not in KERNEL_DTYPES:
        reasons.append(f"it supports float32, bfloat16 and float16, got {dtype_name(x.dtype)}")
    if x.shape[3] % 4 or not 4 <= x.shape[3] <= MAX_HEAD_DIM:
        reasons.append(f"it supports head dimensions that are multiples of 4 up to {MAX_HEAD_DIM}, got {x.shape[3]}")
    if not exact:
        reasons.append("it computes angles in fp32, and this RoPE rounds them to the dtype of the tokens")
    if _transformed():
        reasons.append("it has no rule for torch.func transforms")
    return reasons


def _transformed() -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


class Request(NamedTuple):
    """What decides which code the Triton kernels are."""

    device_type: str
    device_index: int | None
    dtype: torch.dtype
    dim: int
    norm: bool
    weight: bool
    bias: bool
    rotate: bool
    grad: bool


def select(
    backend: str, x: Tensor, exact: bool, *, weight: Tensor | None, bias: Tensor | None, norm: bool, rotate: bool
) -> str:
    """The name of the implementation for ``x [B, H, N, D]``.

    Raises:
        ValueError: ``backend`` is none of the names.
        NotImplementedError: the one named cannot serve the call, with every reason.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be 'auto' or one of {list(BACKENDS)}, got {backend!r}.")
    if backend == "torch" or (backend == "auto" and not fits(x, exact)):
        return "torch"
    reasons = []
    if backend != "auto":
        reasons = {"triton": triton_reasons, "cuda": cuda_reasons}[backend](x, exact)
    if not reasons and backend != "cuda" and x.is_cuda and not torch.compiler.is_compiling():
        grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        request = Request(
            x.device.type, x.device.index, x.dtype, x.shape[3], norm, weight is not None, bias is not None, rotate, grad
        )
        if backend == "auto":
            return "triton" if passes(TRIAL, request, "torch") else "torch"
        failure = TRIAL.failure(request, trying=True)
        reasons = [] if failure is None else [failure]
    if reasons:
        raise NotImplementedError(f"backend={backend!r} cannot serve this call: {'; '.join(reasons)}")
    return "triton" if backend == "auto" else backend


_frequencies: dict[tuple, Tensor] = {}


def frequencies(dim: int, base: float, scale: float, device: torch.device) -> Tensor:
    """Angle of one position in radians, fp32 ``[D / 4]``, rounded once."""

    def make() -> Tensor:
        angles = [scale / base ** (4 * i / dim) for i in range(dim // 4)]  # in double
        return torch.tensor(angles, dtype=torch.float32, device=device)

    return kept(_frequencies, (dim, base, scale, device), make)


def write(
    backend: str,
    x: Tensor,  # [B, H, N, D]
    out: Tensor,  # [B, H, N, D]
    weight: Tensor | None,  # [D]
    bias: Tensor | None,  # [D]
    positions: Tensor | None,  # [1 or B, N, 2] int32 or int64
    frequencies: Tensor | None,  # [D / 4] fp32
    eps: float | None,
) -> None:
    """Fill ``out`` of any strides; no gradient. ``backend`` is "triton" or "cuda"."""
    settings = eps is not None, 0.0 if eps is None else eps
    if backend == "cuda":
        args = x, out, _floats(weight), _floats(bias), positions, frequencies
        torch.ops.gate4d.norm_rope_forward_cuda(*args, *settings)
    else:
        args = x, out, _plain(weight), _plain(bias), positions, frequencies
        torch.ops.gate4d.norm_rope_forward(*args, *settings)


def _plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().contiguous()


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


class NormRope(torch.autograd.Function):
    """``apply(backend, x, weight, bias, positions, frequencies, eps)``: as :func:`write`, into new memory."""

    @staticmethod
    def forward(ctx: Any, backend: str, x, weight, bias, positions, frequencies, eps):
        out = heads_last(x, *x.shape)
        write(backend, x, out, weight, bias, positions, frequencies, eps)
        ctx.save_for_backward(x, weight, bias, positions, frequencies)
        ctx.backend, ctx.eps = backend, eps
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor):
        x, weight, bias, *_ = ctx.saved_tensors
        with torch.no_grad():
            grads = _gradients(ctx, grad_out)
        return None, *first_derivative_only("norm_rope", grads, (grad_out, x, weight, bias)), None, None, None


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, weight, bias, positions, frequencies = ctx.saved_tensors
    _, _, want_weight, want_bias = ctx.needs_input_grad[:4]
    affine = want_weight or want_bias
    rest = positions, frequencies, ctx.eps is not None, ctx.eps or 0.0, affine
    if ctx.backend == "cuda":
        grad_x, sums = torch.ops.gate4d.norm_rope_backward_cuda(grad_out, x, _floats(weight), *rest)
        sums = sums.sum(0) if affine else sums
    else:
        grad_x, sums = torch.ops.gate4d.norm_rope_backward(grad_out, x, _plain(weight), *rest)
    if not affine:
        return grad_x, None, None
    grad_weight, grad_bias = sums.unbind(0)
    return (
        grad_x,
        grad_weight.to(weight.dtype) if want_weight else None,
        grad_bias.to(bias.dtype) if want_bias else None,
    )


def _describe(r: Request) -> str:
    named = "norm", "weight", "bias", "rotate", "grad"
    return ", ".join([dtype_name(r.dtype), f"head {r.dim}", *(name for name in named if getattr(r, name))])


def check(r: Request) -> None:
    """Values and gradients of a request's kind against float64, in memory as qkv projections leave it."""
    draw = torch.Generator().manual_seed(0)
    device = device_of(r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float32).to(device)

    batch, tokens, heads = 2, 37, 5
    x = (2 * normal(batch, tokens, heads, r.dim) + 0.5).to(r.dtype).transpose(1, 2)
    grad_out = normal(batch, heads, tokens, r.dim).to(r.dtype)
    weight = normal(r.dim) if r.weight else None
    bias = normal(r.dim) if r.bias else None
    positions = angles = None
    if r.rotate:
        positions = torch.randint(-3, 60, (batch, tokens, 2), generator=draw).to(device)
        angles = torch.tensor([100.0 ** (-4 * i / r.dim) for i in range(r.dim // 4)], dtype=torch.float32).to(device)
    eps = 1e-5 if r.norm else None

    def evaluate(work: torch.dtype, run: Any) -> dict[str, Tensor]:
        given = {"x": x, "weight": weight, "bias": bias}
        wide = torch.promote_types(work, torch.float32)
        leaves = {
            n: t.to(work if n == "x" else wide).detach().clone().requires_grad_(r.grad)
            for n, t in given.items() if t is not None
        }  # fmt: skip
        out = run(leaves["x"], leaves.get("weight"), leaves.get("bias"))
        found = torch.autograd.grad(out, list(leaves.values()), grad_out.to(work)) if r.grad else ()
        return {"out": out.detach(), **{f"grad {n}": g for n, g in zip(leaves, found, strict=False)}}

    def kernel(t: Tensor, *affine: Tensor | None) -> Tensor:
        return NormRope.apply("triton", t, *affine, positions, angles, eps)

    def in_float64(t: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        wide = None if angles is None else angles.double()
        return norm_rope(t, w, b, positions, wide, r.norm, eps or 0.0)

    def rounded(t: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        """As torch does it in two steps, the norm rounded to the dtype."""
        y = norm_rope(t, w, b, None, None, r.norm, eps or 0.0)
        return norm_rope(y, None, None, positions, angles, False, 0.0)

    # Sums over rounded gradients, and a sum's own order.
    coarse = torch.finfo(r.dtype).eps / torch.finfo(torch.float32).eps
    allowances = {"grad weight": (0.0, coarse), "grad bias": (0.0, coarse)}
    baseline = evaluate(r.dtype, rounded)
    accept(lambda order: baseline, evaluate(r.dtype, kernel), evaluate(torch.float64, in_float64), allowances)


TRIAL = Trial("norm + RoPE: triton", _describe, check)
