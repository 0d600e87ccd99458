"""Which keys a query sees: frames, windows, anchors and packed sequences as intervals.

The keys visible to query ``i`` are ``[0, sink_end_i)`` together with ``[start_i, end_i)``. Three integers a
query describe every mask of the supported systems, so that no ``Nq x Nk`` mask is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import index
from typing import Any

import torch
from torch import Tensor

from .kernels.support import kept

MAX_KEYS = 2**31 - 2**16 - 1  # kernels count keys in 32 bits, and tiles past the last one


class TokenLayout:
    """How the tokens of a clip are laid out: frame after frame, special tokens first in each frame.

    Args:
        frames: number of frames ``T``.
        tokens_per_frame: tokens of a frame, special tokens included; an int, or one int per frame.
        special_tokens: leading camera, register or pose tokens ``R`` of each frame.
    """

    def __init__(self, frames: int, tokens_per_frame: int | Sequence[int], special_tokens: int = 0):
        if not isinstance(frames, int) or frames < 1:
            raise ValueError(f"frames must be an int >= 1, got {frames!r}.")
        try:
            given: Any = tokens_per_frame
            sizes = tuple(map(index, given)) if hasattr(given, "__len__") else (index(given),) * frames
        except TypeError:
            raise TypeError(
                f"tokens_per_frame must be an int or one int per frame, got {tokens_per_frame!r}."
            ) from None
        if len(sizes) != frames:
            raise ValueError(f"tokens_per_frame must be an int or {frames} ints (one per frame), got {len(sizes)}.")
        if not isinstance(special_tokens, int) or special_tokens < 0:
            raise ValueError(f"special_tokens must be an int >= 0, got {special_tokens!r}.")
        if min(sizes) < max(1, special_tokens):
            raise ValueError(
                f"tokens_per_frame must be at least 1 and at least special_tokens={special_tokens}, got {min(sizes)}."
            )
        self.frames = frames
        self.tokens_per_frame = sizes
        self.special_tokens = special_tokens
        self.offsets = (0, *accumulate(sizes))  # frame t holds the tokens offsets[t] .. offsets[t + 1]

    def __repr__(self) -> str:
        sizes = self.tokens_per_frame
        shown = sizes[0] if self.uniform else list(sizes)
        return f"TokenLayout(frames={self.frames}, tokens_per_frame={shown}, special_tokens={self.special_tokens})"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TokenLayout)
            and self.tokens_per_frame == other.tokens_per_frame
            and self.special_tokens == other.special_tokens
        )

    def __hash__(self) -> int:
        return hash((self.tokens_per_frame, self.special_tokens))

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole clip, ``N``."""
        return self.offsets[-1]

    @property
    def uniform(self) -> bool:
        """True if every frame has the same number of tokens."""
        return len(set(self.tokens_per_frame)) == 1

    @property
    def patches_per_frame(self) -> int:
        """Patch tokens of a frame; raises ValueError for a ragged layout."""
        if not self.uniform:
            raise ValueError("patches_per_frame needs a layout whose frames all have the same number of tokens.")
        return self.tokens_per_frame[0] - self.special_tokens

    def is_patch(self, device: torch.device | str = "cpu") -> Tensor:
        """Bool ``[N]``, False at special tokens."""
        keep = torch.ones(self.num_tokens, dtype=torch.bool, device=device)
        for begin in self.offsets[:-1]:
            keep[begin : begin + self.special_tokens] = False
        return keep

    def token_scores(self, patch_scores: Tensor) -> Tensor:
        """Patch scores ``[B, T, patches]`` (ragged: ``[B, sum of patches]``) to token scores ``[B, N]``.

        Special tokens get 0 (False for bool scores): no system gates them.
        """
        patches = self.num_tokens - self.frames * self.special_tokens
        if patch_scores.dim() not in (2, 3) or patch_scores.shape[1:].numel() != patches:
            raise ValueError(
                f"patch_scores must have {patches} patch scores a batch item for {self!r}, "
                f"got {list(patch_scores.shape)}."
            )
        scores = patch_scores.new_zeros(patch_scores.shape[0], self.num_tokens)
        scores[:, self.is_patch(scores.device)] = patch_scores.flatten(1)
        return scores

    def patch_tokens(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Select the patch tokens of ``tokens`` along ``dim`` (of length N), dropping special tokens."""
        if tokens.shape[dim] != self.num_tokens:
            raise ValueError(f"tokens must have {self.num_tokens} entries along dim {dim}, got {tokens.shape[dim]}.")
        return tokens.index_select(dim, self.is_patch(tokens.device).nonzero().squeeze(1))


class Visibility:
    """Interval-plus-sink visibility; use the named constructors.

    Args:
        bounds: int32 ``[1 or B, 3, Nq]``, rows ``start, end, sink_end``, none negative; None when all is visible.
        key_extent: at least the largest end or sink end of the bounds, 0 to have it read from them; on a device
            other than the CPU reading waits for it, and an extent that is given is believed.
        num_keys: the exact number of keys the bounds describe, None where they describe none.

    Attributes:
        bounds, num_keys: as given.
        key_extent: one past the largest key index mentioned, so that a call can be checked without a read; None where
            torch.compile built the visibility, which cannot read it.

    Raises:
        TypeError: bounds are not an int32 tensor.
        ValueError: bounds have another shape, hold a negative value or one beyond ``key_extent`` or ``num_keys``.
    """

    __slots__ = ("_on_device", "bounds", "key_extent", "num_keys")

    def __init__(self, bounds: Tensor | None, key_extent: int | None = 0, num_keys: int | None = None):
        if bounds is not None:
            key_extent = _check_bounds(bounds, key_extent)
        if num_keys is None or torch.compiler.is_compiling():
            pass
        elif not (key_extent or 0) <= num_keys <= MAX_KEYS:
            raise ValueError(
                f"num_keys must be in [{key_extent or 0}, {MAX_KEYS}] (key_extent, int32), got {num_keys}."
            )
        self.bounds = bounds
        self.key_extent = key_extent
        self.num_keys = num_keys
        self._on_device: dict[torch.device, Tensor] = {}

    @classmethod
    def _of_checked(cls, bounds: Tensor, key_extent: int | None, num_keys: int | None = None) -> Visibility:
        """Bounds that need not be read again."""
        visible = cls(None, 0, num_keys)
        visible.bounds, visible.key_extent = bounds, key_extent
        return visible

    def __repr__(self) -> str:
        shape = "full" if self.bounds is None else f"bounds={list(self.bounds.shape)}, key_extent={self.key_extent}"
        return f"Visibility({shape})"

    @classmethod
    def full(cls) -> Visibility:
        """Every query sees every key."""
        return cls(None)

    @classmethod
    def per_frame(cls, layout: TokenLayout) -> Visibility:
        """Self-attention inside each frame (VGGT's frame blocks)."""
        return cls.packed(layout.offsets)

    @classmethod
    def frame_causal(
        cls, layout: TokenLayout, window: int | None = None, sinks: int = 0, first_query_frame: int = 0
    ) -> Visibility:
        """Causal over frames, full inside a frame ("grouped causal"; MoRe, StreamVGGT, STream3R).

        Args:
            layout: describes the keys; the queries are its frames from ``first_query_frame`` on.
            window: number of frames a query sees, its own included; None for all earlier frames.
            sinks: number of leading frames (anchors) that stay visible beside the window. They are subject
                to causality: a query never sees a later frame.
            first_query_frame: offset of the queries into the cached keys.
        """
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"window must be None or an int >= 1 (frames, the current one included), got {window!r}.")
        if not isinstance(sinks, int) or sinks < 0:
            raise ValueError(f"sinks must be an int >= 0 (frames), got {sinks!r}.")
        if not isinstance(first_query_frame, int) or not 0 <= first_query_frame < layout.frames:
            raise ValueError(
                f"first_query_frame must be in [0, {layout.frames}) for {layout!r}, got {first_query_frame!r}."
            )
        _check_num_keys(layout.num_tokens, "layout")
        frames = range(first_query_frame, layout.frames)
        start = [layout.offsets[0 if window is None else max(0, t + 1 - window)] for t in frames]
        end = [layout.offsets[t + 1] for t in frames]
        sink = [layout.offsets[min(sinks, t + 1)] for t in frames]
        per_frame = torch.tensor([start, end, sink], dtype=torch.int32)
        sizes = layout.tokens_per_frame[first_query_frame:]
        bounds = per_frame.repeat_interleave(torch.tensor(sizes), dim=1, output_size=sum(sizes))
        return cls._of_checked(bounds[None], layout.num_tokens, layout.num_tokens)

    @classmethod
    def token_causal(cls, layout: TokenLayout, window: int | None = None, sinks: int = 0) -> Visibility:
        """:meth:`frame_causal`, and a token sees of its own frame only itself and those before it, as in a language
        model; an anchor's tokens too are seen by later ones only.
        """
        framed = cls.frame_causal(layout, window, sinks)
        last = torch.arange(1, layout.num_tokens + 1, dtype=torch.int32)
        assert framed.bounds is not None, "frame_causal lists its queries"
        start, end, sink = framed.bounds.unbind(1)
        bounds = torch.stack((start, end.minimum(last), sink.minimum(last)), dim=1)
        return cls._of_checked(bounds, framed.key_extent, framed.num_keys)

    @classmethod
    def packed(
        cls, cu_seqlens: Tensor | Sequence[int], cu_seqlens_k: Tensor | Sequence[int] | None = None
    ) -> Visibility:
        """Independent sequences packed one after the other.

        Args:
            cu_seqlens: cumulative query lengths, from 0 to Nq, non-decreasing.
            cu_seqlens_k: the same for the keys; None when queries and keys are packed alike.
        """
        queries = _cumulative(cu_seqlens, "cu_seqlens")
        keys = queries if cu_seqlens_k is None else _cumulative(cu_seqlens_k, "cu_seqlens_k")
        if len(keys) != len(queries):
            raise ValueError(
                f"cu_seqlens_k must describe as many sequences as cu_seqlens ({queries.numel() - 1}), "
                f"got {keys.numel() - 1}."
            )
        rows = torch.stack((keys[:-1], keys[1:], torch.zeros_like(keys[1:])))
        # Lengths given as numbers are known while torch.compile traces, those of a tensor are not.
        num_queries, num_keys = (
            int(cu[-1]) if isinstance(given, Tensor) else index(given[-1])
            for cu, given in ((queries, cu_seqlens), (keys, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k))
        )
        if torch.compiler.is_compiling():
            torch._check(num_queries >= 0)
        else:
            _check_num_keys(num_keys, "cu_seqlens" if cu_seqlens_k is None else "cu_seqlens_k")
        bounds = rows.repeat_interleave(queries.diff(), dim=1, output_size=num_queries).to(torch.int32)
        return cls._of_checked(bounds[None], num_keys, num_keys)

    @classmethod
    def intervals(cls, start: Tensor, end: Tensor, sink_end: Tensor | int = 0) -> Visibility:
        """Explicit intervals: query ``i`` sees ``[0, sink_end_i)`` and ``[start_i, end_i)``.

        Args:
            start, end: integer ``[Nq]``, ``[1, Nq]`` or ``[B, Nq]``; ``end <= start`` is an empty interval.
            sink_end: an int, or a tensor of the same shapes.
        """
        sink = torch.as_tensor(sink_end)
        named = {"start": start, "end": end, "sink_end": sink}
        for name, x in named.items():
            if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool:
                raise TypeError(f"{name} must be an integer tensor, got {getattr(x, 'dtype', type(x).__name__)}.")
            if x.dim() not in ((0, 1, 2) if name == "sink_end" else (1, 2)):
                raise ValueError(f"{name} must have shape [Nq] or [B, Nq], got {list(x.shape)}.")
        try:
            rows = torch.broadcast_tensors(*(x if x.dim() == 2 else x.reshape(1, -1) for x in named.values()))
        except RuntimeError:
            shapes = {name: list(x.shape) for name, x in named.items()}
            raise ValueError(f"start, end and sink_end must have matching shapes, got {shapes}.") from None
        bounds = torch.stack(tuple(r.to(start.device) for r in rows), dim=1)
        if torch.compiler.is_compiling():
            torch._assert_async((bounds >= 0).all(), "intervals must not be negative.")
            largest = torch.iinfo(torch.int32).max
            return cls(bounds.clamp(max=largest).to(torch.int32).contiguous(), None)
        if bounds.numel() and int(bounds.min()) < 0:
            raise ValueError(f"intervals must not be negative, got a bound of {int(bounds.min())}.")
        extent = int(bounds[:, 1:].max()) if bounds.numel() else 0
        if extent > torch.iinfo(torch.int32).max:
            raise ValueError(f"intervals must fit into int32, got a bound of {extent}.")
        return cls._of_checked(bounds.clamp(max=torch.iinfo(torch.int32).max).to(torch.int32).contiguous(), extent)

    def rows(self, index: Tensor | Sequence[int]) -> Visibility:
        """What the queries ``index`` see, in that order, over the same keys; of a full visibility, itself.

        Raises:
            ValueError: an index is out of range.
        """
        if self.bounds is None:
            return self
        index = torch.as_tensor(index, dtype=torch.int64, device=self.bounds.device)
        queries = self.bounds.shape[2]
        if index.dim() != 1 or bool(((index < 0) | (index >= queries)).any()):
            raise ValueError(f"index must be 1-D with entries in [0, {queries}), got {index.tolist()}.")
        return self._of_checked(self.bounds[:, :, index], self.key_extent, self.num_keys)

    def with_rows(self, other: Visibility) -> Visibility:
        """These queries followed by those of ``other``, over the same keys.

        Raises:
            ValueError: one of the two is full, and so does not say how many queries it has, or they describe another
                number of keys or batch items.
        """
        mine, theirs = self.bounds, other.bounds
        if mine is None or theirs is None:
            raise ValueError("with_rows needs two visibilities that list their queries, got a full one.")
        keys = {v.num_keys for v in (self, other)} - {None}
        batch = {mine.shape[0], theirs.shape[0]} - {1}
        if len(keys) > 1 or len(batch) > 1:
            raise ValueError(
                f"other must describe the same keys and batch, got {other.num_keys} keys for {self.num_keys} and "
                f"{theirs.shape[0]} items for {mine.shape[0]}."
            )
        both = [bounds.expand(max(batch, default=1), -1, -1) for bounds in (mine, theirs)]
        extent = None  # one of them was built while torch.compile traced, and is checked when it runs
        if self.key_extent is not None and other.key_extent is not None:
            extent = max(self.key_extent, other.key_extent)
        return self._of_checked(torch.cat(both, dim=2), extent, next(iter(keys), None))

    def bounds_on(self, device: torch.device) -> Tensor | None:
        """``bounds`` on ``device``; the copy is kept, so that a visibility reused over layers is moved once."""
        own = self.bounds
        if own is None:
            return None
        bounds = own if own.device == device else kept(self._on_device, device, lambda: own.to(device))
        # Made in inference mode they cannot be saved for a backward: they get a copy that can.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and bounds.is_inference():
            if bounds is self.bounds:
                bounds = self.bounds = bounds.clone()
            else:
                bounds = self._on_device[device] = bounds.clone()
        return bounds

    def dense(self, num_queries: int, num_keys: int) -> Tensor:
        """The boolean mask ``[1 or B, Nq, Nk]``, True = visible, for tests and peers: users run out of memory here."""
        if self.bounds is None:
            return torch.ones(1, num_queries, num_keys, dtype=torch.bool)
        start, end, sink = self.bounds[..., None].unbind(1)
        j = torch.arange(num_keys, device=self.bounds.device)
        return (j < sink) | ((j >= start) & (j < end))


def _check_num_keys(num_keys: int, name: str) -> int:
    if num_keys > MAX_KEYS:
        raise ValueError(f"{name} must describe at most {MAX_KEYS} keys (bounds are int32), got {num_keys}.")
    return num_keys


def _check_bounds(bounds: Tensor, key_extent: int | None) -> int | None:
    """The key extent of bounds that are fit for the kernels."""
    if not isinstance(bounds, Tensor) or bounds.dtype != torch.int32:
        got = getattr(bounds, "dtype", type(bounds).__name__)
        raise TypeError(f"bounds must be an int32 tensor or None, got {got}.")
    if bounds.dim() != 3 or bounds.shape[1] != 3:
        raise ValueError(f"bounds must have shape [1 or B, 3, Nq], got {list(bounds.shape)}.")
    if torch.compiler.is_compiling():
        return key_extent  # the operator looks
    if type(bounds) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(bounds) or bounds.is_meta:
        return key_extent
    if not bounds.numel() or (key_extent and bounds.device.type != "cpu"):
        return key_extent
    smallest, largest = int(bounds.amin()), int(bounds[:, 1:].amax())
    if smallest < 0:
        raise ValueError(f"bounds must not be negative, got {smallest}.")
    if key_extent and largest > key_extent:
        raise ValueError(f"bounds must not pass key_extent={key_extent}, got an end of {largest}.")
    return key_extent or largest


def _cumulative(lengths: Tensor | Sequence[int], name: str) -> Tensor:
    cu = torch.as_tensor(lengths).to("cpu")
    if cu.is_floating_point() and cu.numel():
        raise TypeError(f"{name} must hold integers, got {cu.dtype}.")
    cu = cu.to(torch.int64)
    if torch.compiler.is_compiling() and cu.dim() == 1 and cu.numel() >= 2:
        message = f"{name} must be a non-decreasing 1-D sequence that starts at 0."
        torch._assert_async((cu[0] == 0) & (cu.diff() >= 0).all(), message)
        return cu
    if cu.dim() != 1 or cu.numel() < 2 or int(cu[0]) != 0 or bool((cu.diff() < 0).any()):
        raise ValueError(f"{name} must be a non-decreasing 1-D sequence that starts at 0, got {cu.tolist()[:8]}.")
    return cu
