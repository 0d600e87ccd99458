"""StreamVGGT and STream3R: frame-causal attention and its key/value cache.

Dense causal masks become a :class:`Visibility`, caches become a :class:`FrameKVCache` that is passed through the
models' own streaming loops as tensors would be. Keys are stored after norm and RoPE; StreamVGGT's loop repeats both for
all cached keys at every frame, with the positions of the current frame, which gives the same as long as frames have one
grid (another grid is an error here).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.cache import FrameKVCache
from ..nn.token_cache import TokenKVCache
from ..visibility import TokenLayout, Visibility
from .base import PatchedAttention, Sample


class StreamCache(FrameKVCache):
    """A cache that knows the positions of its frames ``[B, P, 2]``."""

    positions: Tensor | None = None


class StreamTokenCache(TokenKVCache, StreamCache):
    """The same with a budget of tokens."""


class CachedTensor:
    """Stands for the keys or the values of a cache where upstream code expects a tensor.

    Shape, dtype and device are known without it; everything else that a tensor has (methods, operators, functions of
    torch) makes one tensor of what is held and goes to that.

    Args:
        cache: the cache.
        part: 0 for keys, 1 for values.
        by_frame: shape ``[B, H, frames, P, D]`` (StreamVGGT) instead of ``[B, H, frames * P, D]`` (STream3R).
    """

    def __init__(self, cache: StreamCache, part: int, by_frame: bool):
        self.cache = cache
        self.part = part
        self.by_frame = by_frame
        self.seen = cache.frames_seen

    @property
    def shape(self) -> torch.Size:
        page = self.cache.pages()[0][self.part]
        tokens = (self.cache.num_frames, self.cache.tokens_per_frame) if self.by_frame else (self.cache.num_tokens,)
        return torch.Size((*page.shape[:2], *tokens, page.shape[3]))

    @property
    def dtype(self) -> torch.dtype:
        return self.cache.pages()[0][self.part].dtype

    @property
    def device(self) -> torch.device:
        return self.cache.pages()[0][self.part].device

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name.endswith("_"):
            raise AttributeError(f"{name} would change a copy of what the cache holds: use clone() and change that.")
        if name in _KNOWN_OF_SHAPE:
            page = self.cache.pages()[0][self.part]
            return getattr(page.new_empty(()).expand(self.shape), name)
        return getattr(self.as_upstream(), name)

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        return bool(self.as_upstream())

    def tensor(self) -> Tensor:
        """The keys or values held, oldest slot first, as one new tensor.

        Raises:
            RuntimeError: frames were appended to the cache since this object was returned, or tokens have left it.
        """
        if self.cache.evicted:
            raise RuntimeError("tokens have left this cache: it holds no whole frames that a tensor could be made of.")
        if self.seen != self.cache.frames_seen:
            raise RuntimeError("this is the state of a cache to which frames were appended since: use the newest one.")
        whole = torch.cat([page[self.part] for page in self.cache.pages()], dim=2)
        return whole.unflatten(2, self.shape[2:4]) if self.by_frame else whole

    def as_upstream(self) -> Tensor:
        """What upstream's own code would compute with.

        Raises:
            RuntimeError: it expects keys before norm and RoPE (StreamVGGT), and they are not kept.
        """
        if self.by_frame and self.part == 0:
            raise RuntimeError(
                "the keys of this stream were stored after norm and RoPE, which unpatched attention would apply again: "
                "finish the stream before the patch is removed, or start a new one."
            )
        return self.tensor()

    def __getitem__(self, index: Any) -> Tensor:
        return self.as_upstream()[index]

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def real(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)(real(y) for y in x)
            return x.as_upstream() if isinstance(x, CachedTensor) else x

        return func(*real(args), **{k: real(v) for k, v in (kwargs or {}).items()})


# What a tensor knows without its values.
_KNOWN_OF_SHAPE = (
    "dim", "element_size", "is_complex", "is_cpu", "is_cuda", "is_floating_point", "is_meta", "itemsize", "layout",
    "ndim", "ndimension", "nelement", "numel", "requires_grad", "size",
)  # fmt: skip


def _operator(name: str) -> Callable[..., Any]:
    def call(self: CachedTensor, *args: Any) -> Any:
        others = (x.as_upstream() if isinstance(x, CachedTensor) else x for x in args)
        return getattr(self.as_upstream(), name)(*others)

    return call


# Operators are looked up in the class.
for _name in (
    "abs", "add", "and", "array", "eq", "float", "floordiv", "ge", "gt", "int", "invert", "iter", "le", "lt", "matmul",
    "mod", "mul", "ne", "neg", "or", "pow", "radd", "rmatmul", "rmul", "rpow", "rsub", "rtruediv", "sub", "truediv",
):  # fmt: skip
    setattr(CachedTensor, f"__{_name}__", _operator(f"__{_name}__"))
CachedTensor.__hash__ = object.__hash__  # type: ignore[method-assign]


class _Streaming(PatchedAttention):
    """Attention of one frame to a cache."""

    by_frame: bool

    def streamed(self, x: Tensor, cache: StreamCache, pos: Tensor | None):
        self.check_grid(cache, pos)
        q, k, v, held = self.project_into(x, pos, cache)
        out = self.attend(q, k, v, scale=self.scale, cache=held)
        return self.output(out), tuple(CachedTensor(cache, part, self.by_frame) for part in (0, 1))

    def check_grid(self, cache: StreamCache, pos: Tensor | None) -> None:
        """Frames of another grid but equal token count differ only in their positions."""
        if pos is None or (pos.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        known = cache.positions
        if known is None or not cache.num_frames:
            cache.positions = pos
        elif known.shape == pos.shape and known is not pos and not torch.equal(known, pos):
            raise ValueError(
                "the frame has another patch grid than the cached frames (same token count, other positions): "
                "start a new stream when the resolution changes."
            )


class StreamVggtSelf(_Streaming):
    """``attn(x, pos=None, attn_mask=None, past_key_values=None, use_cache=False)``; with a cache also returns it.

    The cache is a pair with the shape ``[B, H, frames, P, D]``. One started by the unpatched model (raw keys) is
    taken over; one started here cannot go on unpatched. ``window`` or ``budget`` of the patch apply to the cache of
    attention with positions: not to the camera head, whose entries are no frames, and not to a clip given at once.
    Once tokens have left, ``frames`` counts those seen.
    """

    family = "streamvggt"
    parameters = ("x", "pos", "attn_mask", "past_key_values", "use_cache")
    by_frame = True

    def __call__(
        self,
        x: Tensor,
        pos: Tensor | None = None,
        attn_mask: Tensor | Visibility | None = None,
        past_key_values: tuple | None = None,
        use_cache: bool = False,
    ):
        if not use_cache:
            return self.output(self.masked(*self.project(x, pos), attn_mask))
        if attn_mask is not None:
            raise ValueError("attn_mask must be None with use_cache=True: the cache holds past frames only.")
        return self.streamed(x, self.resume(past_key_values, pos), pos)

    @classmethod
    def windowed(cls, module: nn.Module) -> bool:
        return getattr(module, "rope", None) is not None

    def new_cache(self) -> StreamCache:
        options = self.options
        if not self.windowed(self.module):
            return StreamCache()
        if options.budget is None:
            return StreamCache(options.window, anchors=options.anchors or 0)
        settings = {"anchors": options.anchors, "specials": options.specials}
        return StreamTokenCache(options.layers.of_stream(self), options.policy, **settings)

    def resume(self, past: tuple | None, pos: Tensor | None) -> StreamCache:
        if past is None:
            return self.new_cache()
        k, v = past
        if isinstance(k, CachedTensor):
            if k.seen == k.cache.frames_seen:
                return k.cache
            k.tensor()  # raises: this state was left behind
        frames = k.shape[2]
        k, v = k.flatten(2, 3), v.flatten(2, 3)
        if getattr(self.module, "k_norm", None) is not None:
            k = self.module.k_norm(k)
        if pos is not None:
            repeated = pos.repeat(1, frames, 1)
            k, _ = self.rotate(k, k[:, :, :0], repeated, None)
        cache = self.new_cache()
        cache.extend(k, v, frames)
        return cache

    @staticmethod
    def exercise(call, sample: Sample):
        frames = [slice(0, sample.tokens), slice(sample.tokens, None)]
        results, past = [call(sample.x, pos=sample.positions)], None
        mask = _frame_causal(sample, torch.finfo(sample.x.dtype).min)
        results.append(call(sample.x, pos=sample.positions, attn_mask=mask))
        for frame in frames:
            pos = None if sample.positions is None else sample.positions[:, frame]
            out, past = call(sample.x[:, frame], pos=pos, past_key_values=past, use_cache=True)
            results.append(out)
        results.append(torch.tensor(past[0].shape).float())
        return results


class Stream3rSelf(_Streaming):
    """``attn(x, pos=None, attn_mask=None, kv_cache=None)``; with a cache (a list ``[k, v]``) also returns it.

    The cache has the shape ``[B, H, frames * P, D]``; a session's window mode slices and concatenates it, and the
    tensors it makes are taken over as they are. Upstream's own window session is kept as it is; ``window`` and
    ``anchors`` of the patch do not apply.
    """

    family = "stream3r"
    parameters = ("x", "pos", "attn_mask", "kv_cache")
    by_frame = False

    def __call__(
        self,
        x: Tensor,
        pos: Tensor | None = None,
        attn_mask: Tensor | Visibility | None = None,
        kv_cache: list | None = None,
    ):
        if kv_cache is None:
            return self.output(self.masked(*self.project(x, pos), attn_mask))
        if attn_mask is not None:
            raise ValueError("attn_mask must be None with kv_cache: the cache holds past frames only.")
        out, state = self.streamed(x, self.resume(kv_cache, x.shape[1]), pos)
        return out, list(state)

    def resume(self, past: list, tokens: int) -> StreamCache:
        k, v = past
        if k is None:
            return StreamCache()
        if isinstance(k, CachedTensor) and isinstance(v, CachedTensor) and k.seen == k.cache.frames_seen:
            return k.cache
        k, v = (x.tensor() if isinstance(x, CachedTensor) else x for x in (k, v))
        if k.shape[2] % tokens:
            raise ValueError(
                f"kv_cache must hold whole frames of {tokens} tokens, got {k.shape[2]} keys: "
                "start a new session when the resolution changes."
            )
        return StreamCache.adopt(k, v, k.shape[2] // tokens, page_frames=1)

    @staticmethod
    def exercise(call, sample: Sample):
        frames = [slice(0, sample.tokens), slice(sample.tokens, None)]
        results, past = [call(sample.x, sample.positions)], [None, None]
        results.append(call(sample.x, sample.positions, _frame_causal(sample, -torch.inf)))
        for frame in frames:
            pos = None if sample.positions is None else sample.positions[:, frame]
            out, past = call(sample.x[:, frame], pos, None, past)
            results.append(out)
        return [*results, past[0][:, :, 1:], past[1][:, :, 1:]]


def _frame_causal(sample: Sample, low: float) -> Tensor:
    frame = torch.arange(sample.frames * sample.tokens, device=sample.x.device) // sample.tokens
    mask = torch.zeros(len(frame), len(frame), device=frame.device, dtype=sample.x.dtype)
    return mask.masked_fill(frame[:, None] < frame[None], low)


class Stream3rMask:
    """Replaces the aggregator's ``_create_attn_mask``: a visibility instead of a dense mask."""

    attribute = "_create_attn_mask"
    parameters = ("S", "P", "mode", "dtype", "device")
    families = ("stream3r",)
    required = False

    def __init__(self, owner: nn.Module | None):
        self.owner = owner

    def __call__(self, S: int, P: int, mode: str, dtype: torch.dtype, device: torch.device) -> Visibility | None:
        layout = TokenLayout(S, P)
        if mode == "causal":
            return Visibility.frame_causal(layout)
        if mode == "window":
            return Visibility.frame_causal(layout, window=5, sinks=1)
        if mode == "full":
            return None
        raise NotImplementedError(f"Unknown attention mode: {mode}")

    @classmethod
    def differs(cls, owner: nn.Module) -> str | None:
        """None if the method of ``owner``'s class describes the same masks, else why not."""
        for mode in ("causal", "window", "full"):
            theirs = type(owner)._create_attn_mask(owner, 8, 2, mode, torch.float32, torch.device("cpu"))
            ours = cls(None)(8, 2, mode, torch.float32, torch.device("cpu"))
            if (theirs is None) != (ours is None):
                return f"mode {mode!r} differs"
            if theirs is not None and not torch.equal(theirs == 0, ours.dense(16, 16)[0]):
                return f"mode {mode!r} differs"
        return None


class StreamVggtGlobal:
    """Replaces the aggregator's ``_process_global_attention``, which builds a dense mask in every layer."""

    attribute = "_process_global_attention"
    parameters = (
        "tokens", "B", "S", "P", "C", "global_idx", "pos", "past_key_values_block", "use_cache", "past_frame_idx",
    )  # fmt: skip
    families = ("streamvggt",)
    required = False

    def __init__(self, owner: Any):
        self.owner = owner

    def __call__(
        self,
        tokens: Tensor,  # [B * S, P, C] or [B, S * P, C]
        B: int,
        S: int,
        P: int,
        C: int,
        global_idx: int,
        pos: Tensor | None = None,
        past_key_values_block: tuple | None = None,
        use_cache: bool = False,
        past_frame_idx: int = 0,
    ):
        tokens = tokens.reshape(B, S * P, C)
        if pos is not None:
            pos = pos.reshape(B, S * P, 2)
        call: dict[str, Any] = {"pos": pos}
        if use_cache:
            call |= {"attn_mask": None, "past_key_values": past_key_values_block, "use_cache": True}
        else:
            call["attn_mask"] = Visibility.frame_causal(TokenLayout(S, P))
        outputs, state = [], None
        for block in self.owner.global_blocks[global_idx : global_idx + self.owner.aa_block_size]:
            result = block(tokens, **call)
            tokens, state = result if use_cache else (result, None)
            outputs.append(tokens.reshape(B, S, P, C))
        result = (tokens, global_idx + len(outputs), outputs)
        return (*result, state) if use_cache else result

    @classmethod
    def differs(cls, owner: nn.Module) -> str | None:
        """None if the method of ``owner``'s class makes the same calls on a recorder, else why not."""
        calls: list[dict] = []

        def block(tokens: Tensor, **call: Any):
            calls.append({"tokens": tokens, **call})
            return (tokens + 1, "state") if call.get("use_cache") else tokens + 1

        recorder = SimpleNamespace(global_blocks=[block] * 2, aa_block_size=1)
        tokens, pos = torch.arange(96.0).reshape(6, 4, 4), torch.arange(48).reshape(6, 4, 2)
        arguments = [((tokens, 2, 3, 4, 4, 1, pos), {}), ((tokens, 6, 1, 4, 4, 0, pos, "past", True), {})]
        results = []
        for args, _ in arguments:
            results.append((cls(recorder)(*args), getattr(type(owner), cls.attribute)(recorder, *args)))
        for ours, theirs in results:
            if len(ours) != len(theirs) or not torch.equal(ours[0], theirs[0]) or ours[1] != theirs[1]:
                return "its results differ"
        for ours, theirs in zip(calls[::2], calls[1::2], strict=True):
            mask, visible = theirs.pop("attn_mask", None), ours.pop("attn_mask", None)
            if visible is not None and (mask is None or not torch.equal(mask == 0, visible.dense(12, 12)[0])):
                return "its mask is not frame-causal"
            same = (torch.equal(ours[n], x) if isinstance(x, Tensor) else ours.get(n) == x for n, x in theirs.items())
            if ours.keys() != theirs.keys() or not all(same):
                return "it calls its blocks in another way"
        return None
