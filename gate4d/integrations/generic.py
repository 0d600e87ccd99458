"""Attention modules of models never seen before, and those of which only the attention call can be replaced."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .base import SELF_PARTS, PatchedAttention, Sample
from .masks import recognise

_POSITIONS = ("pos", "xpos", "positions")


class InterceptedSelf(PatchedAttention):
    """Runs the module's own method and replaces the ``scaled_dot_product_attention`` inside it.

    Serves any self-attention with ``qkv`` and ``proj`` whose method needs only tokens (and positions): projections,
    norms, RoPE, token merging stay the module's own, so their convention need not be known.
    """

    family = "generic (attention call)"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        if not all(hasattr(module, p) for p in (*SELF_PARTS, "num_heads")) or hasattr(module, "forward_list"):
            return False  # DINOv3's blocks go around forward
        _self, *inputs = inspect.signature(type(module).forward).parameters.values()
        others = [p for p in inputs[1:] if p.name not in _POSITIONS]
        optional = (p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others)
        return bool(inputs) and all(optional)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Intercept(self) as mode:
            result = type(self.module).forward(self.module, *args, **kwargs)
        if mode.calls == 0 and (self.gate is not None or self.visible is not None or self.cache is not None):
            raise RuntimeError(
                f"{type(self.module).__name__} took a path that does not call scaled_dot_product_attention, so that "
                "what is set on it (gate, visible or cache) had no effect: unset it, or keep the module on that path."
            )
        return result

    @staticmethod
    def exercise(call, sample: Sample):
        return _exercise_default(call, sample)


class FastVggtSelf(InterceptedSelf):
    """FastVGGT merges q, k and v after RoPE and unmerges after ``proj``: only its attention call is replaced."""

    family = "fastvggt"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return super().fits(module) and "global_merging" in inspect.signature(type(module).forward).parameters


class GenericSelf(PatchedAttention):
    """A self-attention with ``qkv``, ``proj``, optional norms and RoPE that materialises its attention itself."""

    family = "generic (recomputed)"

    fits = InterceptedSelf.fits

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bound = inspect.signature(type(self.module).forward).bind(self.module, x, *args, **kwargs).arguments
        extra = {n: a for n, a in list(bound.items())[2:] if n not in _POSITIONS and a is not None}
        if extra:
            raise ValueError(f"arguments {sorted(extra)} of a generic attention must be left at None: unknown meaning.")
        pos = next((bound[n] for n in _POSITIONS if n in bound), None)
        q, k, v = self.project(x, pos)
        return self.output(self.attend(q, k, v, scale=self.scale))

    @staticmethod
    def exercise(call, sample: Sample):
        return _exercise_default(call, sample)


def _exercise_default(call, sample: Sample) -> list[Tensor]:
    function = call.__func__ if inspect.ismethod(call) else type(call.module).forward
    names = inspect.signature(function).parameters
    positions = {n: sample.pos for n in _POSITIONS if n in names} if sample.has_rope else {}
    result = call(sample.x, **positions)
    results = result if isinstance(result, (tuple, list)) else (result,)
    return [r for r in results if isinstance(r, Tensor)]


class _Intercept(TorchFunctionMode):
    def __init__(self, control: PatchedAttention):
        super().__init__()
        self.control = control
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.replace(*args, **(kwargs or {}))

    def replace(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        visible = None if attn_mask is None else recognise(attn_mask, query.shape[2], key.shape[2])
        if is_causal or enable_gqa or dropout_p > 0 or (attn_mask is not None and visible is None):
            more = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
            return self.control.dense(query, key, value, attn_mask, **more)
        return self.control.attention(query, key, value, scale=scale, visible=visible)
