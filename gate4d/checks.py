"""Checks that several public functions share; each message names the argument, what it got and what is wanted."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .gates import MotionGate
from .visibility import Visibility

_FP32_MAX = torch.finfo(torch.float32).max


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int]:
    """B, Nq, Nk, D and Dv."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}.")
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape [B, H, N, D], got {list(x.shape)}.")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}.")
    (qb, qh, qn, qd), (kb, kh, kn, kd), (vb, vh, vn, vd) = q.shape, k.shape, v.shape
    if qb != kb or qb != vb or qh != kh or qh != vh:
        raise ValueError(
            "q, k and v must have the same batch and head counts [B, H, ...], "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}."
        )
    if qd != kd:
        raise ValueError(f"k must have q's head dimension {qd}, got {kd}.")
    if kn != vn:
        raise ValueError(f"v must have one value per key ({kn}), got {vn}.")
    return qb, qn, kn, qd, vd


def check_gate(gate: MotionGate, queries: tuple[int, int], keys: tuple[int, int], device: torch.device) -> None:
    if not isinstance(gate, MotionGate):
        raise TypeError(f"gate must be a MotionGate or None, got {type(gate).__name__}.")
    for name, x, shape in (
        ("query_score", gate.query_score, queries),
        ("key_score", gate.key_score, keys),
        ("output_scale", gate.output_scale, queries),
        ("dropped_keys", gate.dropped_keys, keys),
    ):
        if x is None:
            continue
        if x.shape != shape:
            kind = "Nq" if shape is queries else "Nk"
            raise ValueError(f"gate.{name} must have shape [B, {kind}] = {list(shape)}, got {list(x.shape)}.")
        if x.device != device:
            raise ValueError(f"gate.{name} must be on q's device {device}, got {x.device}.")


def check_visible(visible: Visibility, q: Tensor, k: Tensor) -> Tensor | None:
    if not isinstance(visible, Visibility):
        raise TypeError(f"visible must be a Visibility or None, got {type(visible).__name__}.")
    bounds = visible.bounds
    if bounds is None:
        return None
    if torch.compiler.is_compiling():
        _check_traced(visible, bounds, q.shape[2], k.shape[2])
    if bounds.shape[2] != q.shape[2] or bounds.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"visible must describe Nq={q.shape[2]} queries of a batch of 1 or {q.shape[0]}, "
            f"got {bounds.shape[2]} queries and a batch of {bounds.shape[0]}."
        )
    if visible.num_keys is not None and visible.num_keys != k.shape[2]:
        raise ValueError(f"visible describes {visible.num_keys} keys, but k has Nk={k.shape[2]}.")
    if visible.key_extent is not None and visible.key_extent > k.shape[2]:
        raise ValueError(f"visible has intervals up to key {visible.key_extent}, but k has Nk={k.shape[2]}.")
    return visible.bounds_on(q.device)


def _check_traced(visible: Visibility, bounds: Tensor, num_queries: int, num_keys: int) -> None:
    """What a visibility built inside a compiled function does not know while it is traced is checked when it runs."""
    torch._check(bounds.shape[2] == num_queries)
    if visible.num_keys is not None:
        torch._check(visible.num_keys == num_keys)
    if visible.key_extent is None:
        torch._assert_async((bounds <= num_keys).all(), "visible has intervals beyond the last key.")


def check_pair(q: Tensor, k: Tensor) -> None:
    """Raise unless q and k are ``[B, H, N, D]`` tensors that multiply."""
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}.")
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"{name} must be a floating tensor [B, H, N, D], got {x.dtype} {list(x.shape)}.")
    if q.dtype != k.dtype or q.device != k.device:
        raise TypeError(f"k must have q's dtype and device ({q.dtype}, {q.device}), got {k.dtype}, {k.device}.")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k must have q's B, H and D ({list(q.shape)}), got {list(k.shape)}.")


def check_over(over: Collection[str], allowed: Collection[str]) -> set[str]:
    """``over`` as a set of axis names."""
    if isinstance(over, str) or not over or not set(over) <= set(allowed):
        raise ValueError(f"over must be a non-empty collection of names out of {list(allowed)}, got {over!r}.")
    return set(over)


def score_for(score: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    return score if score is None or score.dtype == wanted else score.to(wanted)


def check_scale(scale: float) -> float:
    """``scale`` as a float; ValueError unless it is finite, in fp32 too."""
    scale = float(scale)
    if not -_FP32_MAX <= scale <= _FP32_MAX:  # also for NaN
        raise ValueError(f"scale must be finite (in float32 too), got {scale}.")
    return scale
