"""A key/value cache of whole frames for streaming models: no copy of past frames, bounded slack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..functional import gated_attention
from ..gates import MotionGate
from ..kernels.attention.merge import merge
from ..visibility import Visibility
from ._pages import Pages, Place

PAGE_TOKENS = 4096  # a page is a few frames: large enough that merging pages costs little, small enough to be slack

Policy = Callable[[Sequence[int], Tensor], int]


@dataclass(frozen=True)
class Slot:
    """Memory for the next frame of a cache, for a kernel that writes keys where they stay.

    Attributes:
        k, v: views ``[B, H, P, D]`` and ``[B, H, P, Dv]`` in the dtype stored; to be filled before :meth:`commit`.
    """

    cache: FrameKVCache
    k: Tensor
    v: Tensor

    def commit(self) -> FrameKVCache:
        """The frame is written: the cache holds it from now on. Returns the cache."""
        self.cache._commit(self)
        return self.cache


class FrameKVCache:
    """Keys (after norm and RoPE) and values of past frames.

    Without a window the cache grows by pages of about 4096 tokens, which are allocated once and never copied: attention
    runs over each page and the results are merged through their log-sum-exp. Reserved memory exceeds the bytes of K
    and V by less than a page. With a window there is one page, allocated at the first frame, whose slots are
    overwritten; the order of keys does not matter to the softmax.

    Stored tensors carry no gradient.

    Args:
        window: frames kept, the current one included; None keeps all.
        anchors: leading frames kept beside the window (STream3R keeps frame 0).
        dtype: storage dtype; None stores keys in the dtype of the values, which for a 16-bit model (also under
            autocast, where norms return fp32 keys) is 16 bits.
        policy: who leaves when a bounded cache is full: ``policy(frame_ids, scores)`` gets the ids of the frames that
            may go, oldest first, and their scores fp32 ``[len(frame_ids)]`` (see :meth:`add_scores`), and
            returns one of the ids. None evicts the oldest. Anchors never leave.
        page_frames: fewest frames of a page of a cache without a window.
        ragged: whether frames may differ in their number of tokens. Frames of one size share pages; a new size starts
            a page of ``page_frames`` frames, also beside the one page of a window.
        token_causal: a query of the newest frame sees of its own frame only the tokens up to itself, as language
            models do, instead of all of it. The queries must be that frame's, one a token.

    Attributes:
        frozen: while True, :meth:`append` keeps nothing, and any queries look at all that is held.
    """

    def __init__(
        self,
        window: int | None = None,
        *,
        anchors: int = 0,
        dtype: torch.dtype | None = None,
        policy: Policy | None = None,
        page_frames: int = 4,
        ragged: bool = False,
        token_causal: bool = False,
    ):
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"window must be None or an int >= 1 (frames, the current one included), got {window!r}.")
        if not isinstance(anchors, int) or anchors < 0:
            raise ValueError(f"anchors must be an int >= 0 (frames), got {anchors!r}.")
        if policy is not None and window is None:
            raise ValueError("policy needs a window: a cache without one never evicts.")
        self.window = window
        self.anchors = anchors
        self.dtype = dtype
        self.policy = policy
        self.page_frames = page_frames
        self.ragged = ragged
        self.token_causal = token_causal
        self.frozen = False
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next frame may have another number of tokens."""
        self._pages = Pages()
        self._scores: dict[int, Tensor] = {}  # by frame id, fp32 scalar
        self._next_id = 0
        self._index: Tensor | None = None  # int64 [P]: where write() puts the frame, inside its page
        self._newest = Place(0, 0)
        self._open: Slot | None = None  # claimed and not committed yet
        self._reserved = False  # a slot waits for write()
        self.tokens_per_frame = 0

    def __repr__(self) -> str:
        kept = "all" if self.window is None else f"window={self.window}, anchors={self.anchors}"
        return f"FrameKVCache({kept}, frames={self.num_frames}, tokens={self.num_tokens}, nbytes={self.nbytes})"

    @property
    def num_frames(self) -> int:
        """Frames held."""
        return self._pages.num_frames

    @property
    def num_tokens(self) -> int:
        """Keys held."""
        return self._pages.num_tokens

    @property
    def frame_ids(self) -> tuple[int, ...]:
        """Ids (0, 1, ... in order of arrival) of the frames held, in storage order."""
        return self._pages.frame_ids

    @property
    def frames_seen(self) -> int:
        """Frames appended since the last reset, evicted ones included."""
        return self._next_id

    @property
    def evicted(self) -> bool:
        """Whether tokens have left out of frames that are held: never in a cache of whole frames."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes reserved for K and V."""
        return self._pages.nbytes

    def append(self, k: Tensor, v: Tensor) -> None:
        """Append one frame: ``k [B, H, P, D]`` after norm and RoPE, ``v [B, H, P, Dv]``.

        ``append`` is :meth:`reserve` followed by :meth:`write`; while a CUDA graph is captured, :meth:`write` alone,
        into the slot reserved before.

        Raises:
            ValueError: the frame does not have the shape of those held (a change of resolution); reset() first, or
                make the cache ``ragged``.
            RuntimeError: a CUDA graph is captured, and no slot was reserved.
        """
        if self.frozen:
            return
        if not (self._reserved and capturing(k)):
            self.reserve(k, v)
        self.write(k, v)

    def claim(self, k: Tensor, v: Tensor) -> Slot:
        """:meth:`reserve`, and the memory of the frame: a kernel fills it, then :meth:`Slot.commit`.

        Of k and v only shapes, dtypes and devices are read.
        """
        self.reserve(k, v)
        self._open = Slot(self, *self._pages.view(self._newest))
        return self._open

    def _commit(self, slot: Slot) -> None:
        if slot is not self._open:
            raise RuntimeError("this slot is not open: it was committed already, or another frame came after it.")
        self._open = None
        self._reserved = False

    def stores(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a frame with values of ``dtype`` is stored."""
        held = self._pages.tensors
        return held[0][0].dtype if held else self.dtype or dtype

    def reserve(self, k: Tensor, v: Tensor) -> None:
        """Choose (and if need be, allocate or evict) the slot of the next frame; only shapes are read.

        For CUDA graphs: once a bounded cache is full its addresses and shapes never change. Capture :meth:`write` (or
        :meth:`append`) and :meth:`attend`. Call ``reserve`` once before the capture, for the first replay, and before
        each further replay: it puts the slot on the device.

        Raises:
            ValueError: the frame does not have the shape of those held.
            RuntimeError: a CUDA graph is captured, which would keep this one slot for ever.
        """
        self._check(k, v)
        if capturing(k):
            raise RuntimeError(
                "a slot cannot be reserved while a CUDA graph is captured: every replay would write the same one. Call "
                "reserve(k, v) before the capture and before each replay."
            )
        self._open = None
        tokens = self.tokens_per_frame = k.shape[2]
        pages, place = self._pages, None
        if self.window is not None and self.num_frames == self.window + self.anchors:
            place = pages.find(self._evict())
            if pages.sizes[place.page] != tokens:
                pages.release(place)
                place = None
        if place is None:
            page = pages.room(tokens)
            if page is None:
                page = pages.allocate(k, v, self._page_frames(tokens), self.dtype or v.dtype)
            place = Place(page, len(pages.ids[page]))
            pages.ids[page].append(0)
        pages.ids[place.page][place.slot] = self._next_id
        self._scores[self._next_id] = torch.zeros((), device=k.device)
        self._next_id += 1
        self._newest = place
        index = torch.arange(place.slot * tokens, (place.slot + 1) * tokens, device=k.device)
        held = self._index
        reusable = held is not None and held.device == k.device and held.shape == index.shape
        self._index = held.copy_(index) if reusable else index
        self._reserved = True

    def write(self, k: Tensor, v: Tensor) -> None:
        """Write one frame into the reserved slot; see :meth:`append` for shapes."""
        for stored, new in zip(self._pages.tensors[self._newest.page], (k, v), strict=True):
            stored.index_copy_(2, self._index, new.detach().to(stored.dtype))
        self._reserved = False

    def extend(self, k: Tensor, v: Tensor, frames: int) -> None:
        """Append ``frames`` frames at once: ``k [B, H, frames * P, D]``, ``v [B, H, frames * P, Dv]``."""
        _check_frames(k, v, frames)
        for new_k, new_v in zip(k.chunk(frames, dim=2), v.chunk(frames, dim=2), strict=True):
            self.append(new_k, new_v)

    @classmethod
    def adopt(cls, k: Tensor, v: Tensor, frames: int, **settings: Any) -> FrameKVCache:
        """A cache whose first page are these tensors, not copied: ``k [B, H, frames * P, D]``, v likewise."""
        _check_frames(k, v, frames)
        cache = cls(**settings)
        if cache.window is not None:
            cache.extend(k, v, frames)
            return cache
        cache.tokens_per_frame = k.shape[2] // frames
        cache._pages.adopt(k.detach().to(v.dtype), v.detach(), cache.tokens_per_frame, list(range(frames)))
        cache._scores = {i: torch.zeros((), device=k.device) for i in range(frames)}
        cache._next_id = frames
        return cache

    def pages(self) -> list[tuple[Tensor, Tensor]]:
        """The used part of each page: views ``k [B, H, n * P, D]`` and ``v [B, H, n * P, Dv]``, not copies."""
        return self._pages.used()

    def attend(
        self, q: Tensor, *, gate: MotionGate | None = None, scale: float | None = None, backend: str = "auto"
    ) -> Tensor:
        """Attention of ``q [B, H, Nq, D]`` to everything held, ``[B, H, Nq, Dv]`` in the dtype of q.

        ``gate`` has key scores ``[B, num_tokens]`` in storage order. Pages are merged through their lse: exact.
        """
        return self._over_pages(q, gate, scale, backend, False)[0]

    def _over_pages(
        self, q: Tensor, gate: MotionGate | None, scale: float | None, backend: str, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The attention and, if asked for, its lse ``[B, H, Nq]``."""
        dtype, start, merged = q.dtype, 0, None
        pages = self.pages()
        if not pages:
            raise ValueError("the cache is empty: append a frame before attending.")
        self._check_committed()
        for name in ("key_score", "dropped_keys"):
            x = getattr(gate, name, None)
            if x is not None and x.shape[-1] != self.num_tokens:
                raise ValueError(f"gate.{name} must have {self.num_tokens} keys, got {x.shape[-1]}.")
        for number, (k, v) in enumerate(pages):
            part = keys_of(gate, start, start + k.shape[2])
            start += k.shape[2]
            own = self.token_causal and not self.frozen and number == self._newest.page
            if own and capturing(q):
                raise RuntimeError("a token-causal cache cannot be captured: what a query sees depends on the slot.")
            visible = self._up_to_itself(q.shape[2], k.shape[2]) if own else None
            call = {"gate": part, "visible": visible, "scale": scale, "backend": backend}
            if len(pages) == 1 and not with_lse:
                return gated_attention(q.to(k.dtype), k, v, **call).to(dtype), None
            out, aux = gated_attention(q.to(k.dtype), k, v, return_aux=True, **call)
            if len(pages) == 1:
                return out.to(dtype), aux.lse
            merged = merge(merged, (out.float(), aux.lse))
        return merged[0].to(dtype), merged[1]

    def _check_committed(self) -> None:
        if self._open is not None:
            raise RuntimeError("the slot that was claimed last is not committed: its frame may not be written yet.")

    def _up_to_itself(self, queries: int, keys: int) -> Visibility:
        """Of the newest frame's page: every other slot, and of the frame's own slot the tokens up to the query's."""
        tokens = self.tokens_per_frame
        if queries != tokens:
            raise ValueError(
                f"q must be the {tokens} tokens of the newest frame in a token-causal cache, got {queries}."
            )
        slot = self._newest.slot
        after = torch.full((tokens,), (slot + 1) * tokens)
        return Visibility.intervals(after, torch.full_like(after, keys), torch.arange(tokens) + slot * tokens + 1)

    def add_scores(self, scores: Tensor) -> None:
        """Feed statistics to the eviction policy: ``scores [B, num_tokens]`` (such as attention received per key), in
        storage order. Each frame's score grows by the mean over its tokens and the batch."""
        if scores.shape[-1] != self.num_tokens:
            raise ValueError(f"scores must have {self.num_tokens} entries a batch item, got {list(scores.shape)}.")
        start, scores = 0, scores.detach().float().reshape(-1, self.num_tokens)
        for ids, size in zip(self._pages.ids, self._pages.sizes, strict=True):
            part = scores[:, start : start + len(ids) * size].unflatten(1, (len(ids), size))
            start += len(ids) * size
            self._scores |= {i: self._scores[i] + mean for i, mean in zip(ids, part.mean((0, 2)), strict=True)}

    def _check(self, k: Tensor, v: Tensor) -> None:
        for name, x in (("k", k), ("v", v)):
            if x.dim() != 4:
                raise ValueError(f"{name} must be one frame of shape [B, H, P, D], got {list(x.shape)}.")
        if v.shape[:3] != k.shape[:3]:
            raise ValueError(f"v must have one value per key of k {list(k.shape)}, got {list(v.shape)}.")
        if not self._pages.tensors:
            return
        for name, x, held in zip("kv", (k, v), self._pages.tensors[0], strict=True):
            tokens = x.shape[2] if self.ragged else self.tokens_per_frame
            wanted = [*held.shape[:2], tokens, held.shape[3]]
            if list(x.shape) != wanted:
                raise ValueError(
                    f"{name} must have the shape {wanted} of the frames held, got {list(x.shape)}: frames of another "
                    "resolution or batch need a reset() of the cache."
                )

    def _page_frames(self, tokens: int) -> int:
        """Slots of a new page."""
        if self.window is None:  # small caches start small; no page is larger than PAGE_TOKENS or page_frames frames
            return max(self.page_frames, min(self.num_frames, PAGE_TOKENS // max(1, tokens)))
        capacity = self.window + self.anchors
        first = not self._pages.tensors  # later ones are for frames of another size
        return capacity if first else min(self.page_frames, capacity)

    def _evict(self) -> int:
        """The id of the frame that leaves."""
        candidates = sorted(i for i in self.frame_ids if i >= self.anchors)
        chosen = candidates[0]
        if self.policy is not None:
            chosen = self.policy(candidates, torch.stack([self._scores[i] for i in candidates]))
            if chosen not in candidates:
                raise ValueError(f"policy must return one of the frame ids {candidates}, got {chosen!r}.")
        del self._scores[chosen]
        return chosen


def capturing(x: Tensor) -> bool:
    """Whether work on the device of ``x`` is being captured into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_frames(k: Tensor, v: Tensor, frames: int) -> None:
    if k.dim() != 4 or k.shape[:3] != v.shape[:3] or frames < 1 or k.shape[2] % frames:
        raise ValueError(f"k and v must hold {frames} frames, got {list(k.shape)} and {list(v.shape)}.")


def keys_of(gate: MotionGate | None, start: int, end: int) -> MotionGate | None:
    """The gate for some of the keys."""
    if gate is None:
        return None
    key, drop = gate.key_score, gate.dropped_keys
    return MotionGate(
        gate.query_score,
        None if key is None else key[:, start:end],
        gate.output_scale,
        None if drop is None else drop[:, start:end],
        gate.strength,
        gate.renormalize,
    )
