"""What fake and Triton kernels demand of their operands, as ``csrc/checks.h`` does for the compiled ones.

Values are not looked at: in a graph there are none, and on a GPU it would wait for the device. The Triton kernels keep
bounds within the keys themselves, so that wrong ones cannot read foreign memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SIZE = 2**31 - 2**16 - 1
_FP32_MAX = torch.finfo(torch.float32).max


def same_device(**tensors: Tensor | None) -> None:
    """RuntimeError unless all are on one device; torch does not look where an operator has its own fake kernel."""
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise RuntimeError(f"gate4d: all tensors must be on one device, got {got}.")


def check_settings(scale: float, strength: float) -> None:
    """RuntimeError unless both are finite in fp32 and the strength is not negative."""
    if not abs(scale) <= _FP32_MAX:  # also for NaN
        raise RuntimeError(f"gate4d: scale must be finite in float32, got {scale}.")
    if not 0 <= strength <= _FP32_MAX:
        raise RuntimeError(f"gate4d: strength must be finite in float32 and >= 0, got {strength}.")


def expect(name: str, x: Tensor | None, dtype: torch.dtype, shape: Sequence[int | None], device: torch.device) -> None:
    """RuntimeError unless x is None or has this dtype, device and shape, None in which is any size."""
    if x is None:
        return
    fits = len(shape) == x.dim() and all(n is None or n == m for n, m in zip(shape, x.shape, strict=True))
    if not fits or x.dtype != dtype or x.device != device:
        wanted = ["any" if n is None else n for n in shape]
        raise RuntimeError(
            f"gate4d: {name} must be {dtype} {wanted} on {device}, got {x.dtype} {list(x.shape)} on {x.device}."
        )


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    query_score: Tensor | None,
    key_score: Tensor | None,
    dropped_keys: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    strength: float,
) -> None:
    """RuntimeError unless the operands of an operator over the score matrix fit each other."""
    check_settings(scale, strength)
    dtype, device = q.dtype, q.device
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(f"gate4d: q must be float32, bfloat16 or float16, got {dtype}.")
    expect("q", q, dtype, (None,) * 4, device)
    batch, heads, queries, dim = q.shape
    expect("k", k, dtype, (batch, heads, None, dim), device)
    keys = k.shape[2]
    if max(math.prod(q.shape[:2]), queries, keys) > MAX_SIZE:
        raise RuntimeError(f"gate4d: each of B * H, Nq and Nk must be at most {MAX_SIZE}, got {q.shape} and {k.shape}.")
    expect("v", v, dtype, (batch, heads, keys, None), device)
    expect("query_score", query_score, torch.float32, (batch, queries), device)
    expect("key_score", key_score, torch.float32, (batch, keys), device)
    expect("dropped_keys", dropped_keys, torch.bool, (batch, keys), device)
    if bounds is not None:
        expect("bounds", bounds, torch.int32, (batch if len(bounds) != 1 else 1, 3, queries), device)
