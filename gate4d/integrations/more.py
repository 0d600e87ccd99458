"""MoRe's own code (github.com/HellexF/MoRe): VGGT's attention with another signature, by key ranges, or with a cache.

Its aggregators (``Aggregator``, ``StreamAggregator``) have VGGT's parts under VGGT's names. Every attention takes six
arguments and returns a pair.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..visibility import TokenLayout, Visibility
from .base import PatchedAttention, Sample
from .stream import CachedTensor, StreamCache

KERNEL = "flex_flash_attn_func"  # MagiAttention's, which SparseAttention calls


class MoreSelf(PatchedAttention):
    """``Attention``: full, of a clip or with a cache; ``attn_bias`` and ``motion_scores`` are ignored, as upstream.

    ``save_attn=n`` returns the attention of every n-th query beside the output, ``[B, H, ceil(N / n), Nk]``: with a
    frame's tokens the row of its camera token, which the forcing reads. ``kv_cache`` is a dict of ``"k"`` and ``"v"``
    that is updated and returned. ``StreamAggregator`` hands each layer's dict on to the next, so that all layers of all
    frames share one; that is kept. A dict started by the unpatched model is taken over, and can go on unpatched.
    """

    family = "more"
    parameters = ("x", "attn_bias", "pos", "motion_scores", "save_attn", "kv_cache")

    def __call__(
        self,
        x: Tensor,
        attn_bias: Any = None,
        pos: Tensor | None = None,
        motion_scores: Tensor | None = None,
        save_attn: int = 0,
        kv_cache: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Any]:
        q, k, v = self.project(x, pos)
        cache = None if kv_cache is None or self.cache is not None else self.resume(kv_cache)
        out = self.output(self.attend(q, k, v, scale=self.scale, cache=cache))
        if cache is not None:
            kv_cache["k"], kv_cache["v"] = (CachedTensor(cache, part, by_frame=False) for part in (0, 1))
        if not save_attn:
            return out, kv_cache
        keys = k if cache is None else kv_cache["k"].tensor().to(k.dtype)
        return out, self.rows(q[:, :, ::save_attn], keys)

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        # Without its fused attention the module scales q where it stands, and the rows' once more.
        scale = self.scale if getattr(self.module, "fused_attn", True) else self.scale**2
        return ((q * scale) @ k.mT).softmax(-1)

    def resume(self, state: dict[str, Any]) -> StreamCache:
        k, v = state["k"], state["v"]
        if k is None or v is None:
            return StreamCache(ragged=True)
        if isinstance(k, CachedTensor) and k.seen == k.cache.frames_seen:
            return k.cache
        k, v = (x.tensor() if isinstance(x, CachedTensor) else x for x in (k, v))
        return StreamCache.adopt(k, v, 1, page_frames=1, ragged=True)

    @staticmethod
    def exercise(call: Callable[..., Any], sample: Sample) -> list[Tensor]:
        pos, size = sample.positions, sample.tokens
        results = [*call(sample.x, pos=pos, attn_bias=size, motion_scores=sample.x[..., 0], save_attn=size)]
        out, nothing = call(sample.x, pos=pos)
        results += [out, torch.tensor(float(nothing is None))]
        state: dict[str, Any] = {"k": None, "v": None}
        for frame in (slice(0, size), slice(size, None), slice(0, size - 1)):
            out, state = call(sample.x[:, frame], pos=None if pos is None else pos[:, frame], kv_cache=state)
            results.append(out)
        return [*results, state["k"][:, :, :], state["v"][:, :, :]]


class MoreSparse(MoreSelf):
    """``SparseAttention``: causal over frames of ``attn_bias`` tokens, by key ranges.

    Tokens behind the last whole frame (the copied camera tokens) see all whole frames, and nobody sees them. Upstream's
    kernel needs a Hopper GPU; this runs everywhere, and the trial run gives the module's own code one that takes the
    same ranges. ``save_attn`` and ``kv_cache`` are ignored, as upstream does.
    """

    family = "more-sparse"

    def __call__(
        self,
        x: Tensor,
        attn_bias: int | None = None,
        pos: Tensor | None = None,
        motion_scores: Tensor | None = None,
        save_attn: int = 0,
        kv_cache: dict[str, Any] | None = None,
    ) -> tuple[Tensor, None]:
        q, k, v = self.project(x, pos)
        visible = None
        if self.cache is None:  # a cache holds what is visible
            tokens = x.shape[1]
            if not isinstance(attn_bias, int) or not 1 <= attn_bias <= tokens:
                raise ValueError(
                    f"attn_bias must be the number of tokens of a frame, in [1, {tokens}], got {attn_bias!r}."
                )
            visible = _ranges(tokens, attn_bias)
            whole = tokens - tokens % attn_bias
            k, v = k[:, :, :whole], v[:, :, :whole]
        q, k = q.to(v.dtype), k.to(v.dtype)
        return self.output(self.attend(q, k, v, scale=self.scale, visible=visible)), None

    @staticmethod
    def exercise(call: Callable[..., Any], sample: Sample) -> list[Tensor]:
        call, results = _with_kernel(call), []
        for size in (sample.tokens, sample.tokens - 1, 2 * sample.tokens):  # two frames; two and two tokens more; one
            out, nothing = call(sample.x, pos=sample.positions, attn_bias=size)
            results += [out, torch.tensor(float(nothing is None))]
        return results


class MoreDino(MoreSelf):
    """``MemEffAttention`` of the patch embedding: the tokens alone."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        given = dict(zip(self.parameters[1:], args, strict=False)) | kwargs
        given = [name for name, value in given.items() if value is not None and value is not False]
        if given:
            raise ValueError(f"{given} must be left out: upstream passes them on only through xFormers.")
        return self.output(self.attend(*self.project(x, None), scale=self.scale)), None

    @staticmethod
    def exercise(call: Callable[..., Any], sample: Sample) -> list[Tensor]:
        out, nothing = call(sample.x)
        try:
            call(sample.x, attn_bias=sample.tokens)
            refused = False
        except (AssertionError, ValueError):
            refused = True
        return [out, torch.tensor([float(nothing is None), float(refused)])]


@lru_cache(maxsize=16)
def _ranges(tokens: int, size: int) -> Visibility:
    """Frames of ``size`` tokens and what is left of ``tokens`` behind them; shared by the layers."""
    layout = TokenLayout(tokens // size, size)
    visible = Visibility.frame_causal(layout)
    start = torch.zeros(tokens % size, dtype=torch.int64)
    return visible.with_rows(Visibility.intervals(start, start + layout.num_tokens)) if len(start) else visible


def _with_kernel(call: Callable[..., Any]) -> Callable[..., Any]:
    """The module's own method, with :func:`_by_ranges` where it calls MagiAttention's kernel."""
    function = getattr(call, "__func__", None)
    if function is None or KERNEL not in function.__globals__:
        return call
    twin = types.FunctionType(
        function.__code__, {**function.__globals__, KERNEL: _by_ranges}, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    twin.__kwdefaults__ = function.__kwdefaults__
    return types.MethodType(twin, call.__self__)


def _by_ranges(
    q: Tensor, k: Tensor, v: Tensor, *, q_ranges: Tensor, k_ranges: Tensor, attn_type_map: Tensor | None = None,
    softmax_scale: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What MagiAttention documents: queries ``[N, H, D]`` of a range see all keys of the range beside it (type 0)."""
    if attn_type_map is not None and bool(attn_type_map.any()):
        raise NotImplementedError(f"ranges of type {attn_type_map.unique().tolist()}, only 0 (full) is known")
    out = torch.zeros_like(q)
    for (a, b), (c, d) in zip(q_ranges.tolist(), k_ranges.tolist(), strict=True):
        parts = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        out[a:b] = F.scaled_dot_product_attention(*parts, scale=softmax_scale).transpose(0, 1)
    return out, None
