"""Four kinds of backbone with random weights, on which the attention is exchanged: alternating, pairwise, recurrent
state, streaming with a cache.

Each has a quarter of its model's width and of its tokens a frame, with the true head dimension, and few layers: both
the share of attention in the work (``N / C``, tokens over width) and the growth of memory with frames are then the
model's own at the same number of frames, at a size that two cores run. Layers come one after the other and cost the
same: more of one kind would hardly change a ratio of times. What a method keeps of each layer (caches, maps) grows with
their number.

A setup returns ``run(frames)``, which yields tokens ``[frames, P, C]``: once for a clip, frame by frame for a stream. A
clip yields no frames (``[0, P, C]``) after each layer, frame or pair, where another process may have its turn.
Methods of attention:

- ``gate4d``: :func:`gate4d.gated_attention`, the frame cache, closed-form statistics.
- ``SDPA + mask``: ``scaled_dot_product_attention`` with the gate as a dense bias; caches by concatenation; statistics
  from one logit map at a time.
- ``maps``: attention maps in memory, as code that reads them has them; statistics from the maps of all layers.
- ``SDPA``: what the model does without motion gate and statistics. It computes less.
- ``FlexAttention``: compiled, the gate as its score_mod.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gate4d import MotionGate, gated_attention, state_confidence
from gate4d.nn import FrameKVCache
from gate4d.statistics.logits import mean_logits

from ..measure.processes import Run
from ..models import Attend, CrossLayer, GatedBlock, scaled_normal_
from ..peers import eager_attention, motion_score_mod
from ..registry import SHAPES, AttentionShape

WINDOW, ANCHORS = 5, 1  # STream3R's window session: frame 0 and the last five


@dataclass(frozen=True)
class Case:
    """What a setup is built for.

    Attributes:
        method: see the module.
        gated: False leaves out motion gate and statistics.
        frames: largest number of frames that will be run.
        window: frames of the cache beside the anchor, None for all; only for streaming.
        dtype: of everything.
        scale: the model's tokens and heads are divided by it.
    """

    method: str
    gated: bool = True
    frames: int = 8
    window: int | None = None
    dtype: torch.dtype = torch.float32
    scale: int = 4

    def shape(self, name: str) -> AttentionShape:
        """A shape of the registry, scaled down."""
        return SHAPES[name].scaled(self.scale)

    def tokens(self, name: str, width: int) -> tuple[Tensor, Tensor]:
        """Random tokens ``[frames, P, width]`` and motion scores ``[frames, P]``, 0 at special tokens."""
        shape, generator = self.shape(name), torch.Generator().manual_seed(1)
        x = torch.randn(self.frames, shape.queries, width, generator=generator)
        motion = torch.rand(self.frames, shape.queries, generator=generator)
        motion[:, : shape.special] = 0
        return x.to(self.dtype), motion.to(self.dtype)

    def finish(self, model: nn.Module) -> nn.Module:
        """Weights in the case's dtype."""
        scaled_normal_(model, 0)
        return (model if self.dtype == torch.float32 else model.to(self.dtype)).eval()


def attention(method: str, query_motion: Tensor | None = None, key_motion: Tensor | None = None) -> Attend:
    """One way of attending, with the pairwise gate of motion ``[B, Nq]`` and ``[B, Nk]``, or without a gate."""
    if method == "gate4d":
        gate = None if query_motion is None else MotionGate.pairwise(query_motion, key_motion)
        return lambda q, k, v: gated_attention(q, k, v, gate=gate)
    if method == "FlexAttention":
        score_mod = motion_score_mod(1 - query_motion, key_motion)
        return lambda q, k, v: _compiled_flex()(q, k, v, score_mod=score_mod)
    bias = None
    if query_motion is not None:
        bias = (1 - (1 - query_motion)[:, None, :, None] * key_motion[:, None, None, :]).log_()  # [B, 1, Nq, Nk]
    if method == "maps":
        return lambda q, k, v: eager_attention(q, k, v, bias)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _no_frames(like: Tensor) -> Tensor:
    return like.new_empty(0, *like.shape[1:])  # not a view, which would keep the memory


# alternating: VGGT, Pi3


def alternating(case: Case, pairs: int = 1) -> Run:
    """Blocks inside each frame and over the whole clip in turn, both gated."""
    shape = case.shape("vggt.global")
    x, motion = case.tokens("vggt.global", shape.width)
    blocks = case.finish(nn.ModuleList(GatedBlock(shape.width, shape.heads) for _ in range(2 * pairs)))

    def run(frames: int) -> Iterator[Tensor]:
        y, g = x[:frames], motion[:frames]
        clip = g.reshape(1, -1)
        in_frame = attention(case.method, *((g, g) if case.gated else ()))
        over_clip = attention(case.method, *((clip, clip) if case.gated else ()))
        for frame_block, clip_block in zip(blocks[::2], blocks[1::2], strict=True):
            y = frame_block(y, in_frame)
            yield _no_frames(y)
            y = clip_block(y.flatten(0, 1)[None], over_clip).view_as(y)
            yield _no_frames(y)
        yield y

    return run


# pairwise: DUSt3R, MonST3R, Easi3R


class _PairCue:
    """Mean over queries, heads, layers and pairs of the cross-attention logits that a frame's keys receive."""

    def __init__(self, case: Case, frames: int, tokens: int):
        self.method = case.method
        self.sums = torch.zeros(frames, tokens, dtype=case.dtype)
        self.counts = torch.zeros(frames, 1, dtype=case.dtype)
        self.kept: list[tuple[int, Tensor]] = []  # (key frame, logits [1, H, Nq, Nk])

    def watching(self, attend: Attend, key_frame: int) -> Attend:
        """``attend``, with the logits of its calls counted for the frame that the keys belong to."""

        def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.method == "maps":  # kept until all pairs are done, as Easi3R keeps them
                logits = (q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5)
                self.kept.append((key_frame, logits))
                return torch.softmax(logits, dim=-1) @ v
            if self.method == "gate4d":
                self.add(key_frame, mean_logits(q, k, over=("heads", "queries"))[0])
            else:
                self.add(key_frame, ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).mean((1, 2))[0])
            return attend(q, k, v)

        return watched

    def add(self, frame: int, mean: Tensor) -> None:  # mean [P]
        self.sums[frame] += mean
        self.counts[frame] += 1

    def motion(self) -> Tensor:
        """Scores ``[T, P]`` in (0, 1): the less a token is attended to, the more dynamic."""
        for frame, logits in self.kept:
            self.add(frame, logits.mean((1, 2))[0])
        mean = self.sums / self.counts
        centred = mean - mean.mean(-1, keepdim=True)
        return torch.sigmoid(-centred / centred.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6))


def pairwise(case: Case, depth: int = 1, reach: int = 2) -> Run:
    """Each frame decoded with the ``reach`` frames after it, pair by pair; first to find what moves, then gated by it.

    Without the gate there is one pass.
    """
    encoder, decoder = case.shape("dust3r.encoder"), case.shape("dust3r.decoder")
    x, _ = case.tokens("dust3r.encoder", encoder.width)
    model = case.finish(
        nn.ModuleDict(
            {
                "encode": GatedBlock(encoder.width, encoder.heads),
                "embed": nn.Linear(encoder.width, decoder.width),
                "first": nn.ModuleList(CrossLayer(decoder.width, decoder.heads) for _ in range(depth)),
                "second": nn.ModuleList(CrossLayer(decoder.width, decoder.heads) for _ in range(depth)),
            }
        )
    )
    plain = attention("gate4d" if case.method == "gate4d" else "maps" if case.method == "maps" else "SDPA")

    def decode(a: Tensor, b: Tensor, attends: tuple[Attend, Attend, Attend, Attend]) -> tuple[Tensor, Tensor]:
        """Both views through both branches; attends: self 1, self 2, cross 1 (keys of view 2), cross 2."""
        for one, two in zip(model["first"], model["second"], strict=True):
            a, b = one(a, b, attends[0], attends[2]), two(b, a, attends[1], attends[3])
        return a, b

    def run(frames: int) -> Iterator[Tensor]:
        features: list[Tensor] = []
        for t in range(frames):
            features.append(model["embed"](model["encode"](x[t : t + 1], plain)))
            yield _no_frames(features[t])
        pairs = [(i, j) for i in range(frames) for j in range(i + 1, min(i + 1 + reach, frames))]
        motion = None
        if case.gated:
            cue = _PairCue(case, frames, encoder.queries)
            for i, j in pairs:
                attends = (plain, plain, cue.watching(plain, j), cue.watching(plain, i))
                decode(features[i], features[j], attends)
                yield _no_frames(features[i])
            motion = cue.motion()
            del cue
        out = torch.zeros(frames, encoder.queries, decoder.width, dtype=case.dtype)
        for i, j in pairs:
            attends = (plain,) * 4
            if motion is not None:
                g, h = motion[i : i + 1], motion[j : j + 1]
                attends = tuple(attention(case.method, *gate) for gate in ((g, g), (h, h), (g, h), (h, g)))
            a, b = decode(features[i], features[j], attends)
            out[i] += a[0]
            out[j] += b[0]
            yield _no_frames(out)
        yield out

    return run


# recurrent state: CUT3R, TTT3R


def recurrent(case: Case, depth: int = 2) -> Run:
    """Frame after frame against a state of constant size, whose tokens are updated at rates from the attention."""
    encoder, image, state = (case.shape(f"cut3r.{n}") for n in ("encoder", "image", "state"))
    x, _ = case.tokens("cut3r.image", encoder.width)
    model = case.finish(
        nn.ModuleDict(
            {
                "encode": GatedBlock(encoder.width, encoder.heads),
                "embed": nn.Linear(encoder.width, image.width),
                "image": nn.ModuleList(CrossLayer(image.width, image.heads) for _ in range(depth)),
                "state": nn.ModuleList(CrossLayer(state.width, state.heads) for _ in range(depth)),
            }
        )
    )
    start = torch.randn(1, state.queries, state.width, generator=torch.Generator().manual_seed(2)).to(case.dtype)
    attend = attention(case.method)

    def run(frames: int) -> Iterator[Tensor]:
        memory = start
        for t in range(frames):
            features: list[tuple[Tensor, Tensor]] = []  # q and k of the state's cross-attention, layer by layer
            maps: list[Tensor] = []

            def watched(q: Tensor, k: Tensor, v: Tensor, features=features, maps=maps) -> Tensor:
                if case.gated and case.method == "maps":  # all layers' maps are kept, as TTT3R keeps them
                    maps.append((q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5))
                    return torch.softmax(maps[-1], dim=-1) @ v
                if case.gated:
                    features.append((q, k))
                return attend(q, k, v)

            y, z = model["embed"](model["encode"](x[t : t + 1], attend)), memory
            for image_layer, state_layer in zip(model["image"], model["state"], strict=True):
                y, z = image_layer(y, z, attend, attend), state_layer(z, y, attend, watched)
            if case.gated and t:
                if maps:
                    beta = torch.stack(maps).mean((0, 2, 4)).sigmoid()  # [B, S]
                else:
                    beta = state_confidence(*zip(*features, strict=True))
                z = memory + beta[..., None] * (z - memory)
            memory = z
            yield y

    return run


# streaming with a cache: StreamVGGT, STream3R


class _Concatenated:
    """A cache as upstream code keeps it: everything concatenated anew for every frame."""

    def __init__(self, window: int | None, anchors: int):
        self.window, self.anchors = window, anchors
        self.frame_ids: list[int] = []
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        self.frame_ids = [*self.frame_ids, len(self.frame_ids) and self.frame_ids[-1] + 1]
        self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
        if self.window is not None and len(self.frame_ids) > self.window + self.anchors:
            p, first = k.shape[2], self.anchors
            self.k, self.v = (
                torch.cat((x[:, :, : first * p], x[:, :, -self.window * p :]), dim=2) for x in (self.k, self.v)
            )
            self.frame_ids = self.frame_ids[:first] + self.frame_ids[-self.window :]


def streaming(case: Case, pairs: int = 1) -> Run:
    """Frame after frame; the blocks over the clip see the frame and what a cache holds of those before it."""
    shape = case.shape("streamvggt.cached")
    x, motion = case.tokens("streamvggt.cached", shape.width)
    blocks = case.finish(nn.ModuleList(GatedBlock(shape.width, shape.heads) for _ in range(2 * pairs)))
    own = case.method == "gate4d"
    limits = {"window": case.window, "anchors": ANCHORS if case.window else 0}

    def cached(cache: FrameKVCache | _Concatenated, t: int) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.append(k, v)
            scores = ()
            if case.gated:
                scores = (motion[t : t + 1], motion[list(cache.frame_ids)].reshape(1, -1))
            if own:
                return cache.attend(q, gate=MotionGate.pairwise(*scores) if scores else None)
            return attention(case.method, *scores)(q, cache.k, cache.v)

        return attend

    def run(frames: int) -> Iterator[Tensor]:
        caches = [FrameKVCache(**limits) if own else _Concatenated(**limits) for _ in range(pairs)]
        for t in range(frames):
            g = motion[t : t + 1]
            in_frame = attention(case.method, *((g, g) if case.gated else ()))
            y = x[t : t + 1]
            for frame_block, clip_block, cache in zip(blocks[::2], blocks[1::2], caches, strict=True):
                y = clip_block(frame_block(y, in_frame), cached(cache, t))
            yield y

    return run


BACKBONES = {f.__name__: f for f in (alternating, pairwise, recurrent, streaming)}
_flex = None


def _compiled_flex():
    global _flex
    if _flex is None:
        from torch.nn.attention.flex_attention import flex_attention

        _flex = torch.compile(flex_attention, dynamic=True)
    return _flex


def setup(backbone: str, dtype: str = "float32", **case) -> Run:
    """The setup for a process of its own: a backbone by name, the fields of :class:`Case` by name."""
    return BACKBONES[backbone](Case(dtype=getattr(torch, dtype), **case))
