"""A small VGGT-shaped model: attention inside frames and over the clip in turn, with heads for pose, depth and motion.

Three ways to run it: over the whole clip, causal over frames (what a stream of frames would give, all at once), and as
a stream with a cache. After a stream, or beside the causal tokens in one attention call, MoRe's global camera pass
gives every frame's camera token one look at all frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import chained
from ..nn import FrameKVCache, RoPE2D, SelfAttention
from ..nn.attention import split_qkv
from ..nn.control import AttentionControl, control_of
from ..visibility import TokenLayout, Visibility
from .matching import Matching, remember

REGISTERS = 4


class Attention(SelfAttention):
    """Self-attention called as VGGT's, ``attn(x, pos)``, which is what ``gate4d.patch`` recognises and replaces."""

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return super().forward(x, pos)

    @property
    def active(self) -> AttentionControl:
        """Where gates and observers are set at present: this module's control, or that of a patch on it."""
        return control_of(self)

    def project(self, x: Tensor, pos: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``x [B, N, C]`` to q, k, v ``[B, H, N, D]`` after norm and RoPE."""
        q, k, v = split_qkv(self.qkv(x), self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if pos is None else (*self.rope.pair(q, k, pos, pos), v)

    def select(
        self,
        x: Tensor,  # [B, N, C]
        pos: Tensor | None,  # [B or 1, N, 2]
        *,
        keys: int | None = None,
        visible: Visibility | None = None,
        cache: FrameKVCache | None = None,
    ) -> Tensor:
        """``[B, N, C]``, where only the first ``keys`` tokens are seen, as ``visible`` says or through a cache."""
        q, k, v = self.project(x, pos)
        k, v = k[:, :, :keys], v[:, :, :keys]
        return self.proj(self.active.attend(q, k, v, scale=self.scale, visible=visible, cache=cache))

    def look(self, x: Tensor, pos: Tensor | None, cache: FrameKVCache) -> Tensor:
        """``x [B, N, C]`` attends to what the cache holds, and leaves nothing in it."""
        q, _, _ = self.project(x, pos)
        return self.proj(cache.attend(q, scale=self.scale).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block; ``call`` chooses a method of :class:`Attention`."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool = True, rope: RoPE2D | None = None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, qk_norm=qk_norm, rope=rope)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return self.finish(x, self.attn(self.norm1(x), pos))

    def select(self, x: Tensor, pos: Tensor | None, **call: Any) -> Tensor:
        return self.finish(x, self.attn.select(self.norm1(x), pos, **call))

    def look(self, x: Tensor, pos: Tensor | None, cache: FrameKVCache) -> Tensor:
        return self.finish(x, self.attn.look(self.norm1(x), pos, cache))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.ls1(attended)
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Three strided convolutions, so that a patch of 8 x 8 pixels keeps detail, and the maps on the way."""

    patch_size = 8

    def __init__(self, dim: int, widths: tuple[int, int]):
        super().__init__()
        half, quarter = widths
        self.fine = nn.Conv2d(3, half, 7, 2, 3)
        self.coarse = nn.Conv2d(half, quarter, 3, 2, 1)
        self.mix = nn.Conv2d(quarter, quarter, 3, 1, 1)
        self.patch = nn.Conv2d(quarter, dim, 3, 2, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images ``[N, 3, H, W]`` in [0, 1] to ``[N, patches, C]`` and maps at a half and a quarter of the size."""
        half = F.gelu(self.fine(images * 4 - 2))
        quarter = F.gelu(self.coarse(half))
        quarter = quarter + F.gelu(self.mix(quarter))
        return self.patch(quarter).flatten(2).mT, half, quarter


def widened(x: Tensor) -> Tensor:
    """In fp32 at least, also under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Features(NamedTuple):
    """What the heads read: tokens ``[B, T, P, 2C]``, ``cameras [B, T, C]``, maps ``[B * T, c, h, w]``."""

    tokens: Tensor
    cameras: Tensor
    global_cameras: Tensor | None
    half: Tensor
    quarter: Tensor


class Aggregator(nn.Module):
    """Tokens of a frame: a camera token, four registers, then the patches; the first frame has specials of its own."""

    def __init__(self, dim: int, heads: int, depth: int, widths: tuple[int, int]):
        super().__init__()
        self.depth, self.patch_start_idx = depth, 1 + REGISTERS
        self.patch_embed = PatchEmbed(dim, widths)
        self.patch_size = self.patch_embed.patch_size
        self.matching = Matching(widths, dim)
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, dim) * 0.02)
        self.register_token = nn.Parameter(torch.randn(1, 2, REGISTERS, dim) * 0.02)
        rope = RoPE2D()
        self.frame_blocks = nn.ModuleList(Block(dim, heads, rope=rope) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(dim, heads, rope=rope) for _ in range(depth))
        self.norm = nn.LayerNorm(2 * dim)

    def layout(self, images: Tensor) -> TokenLayout:
        """Token layout of a clip ``[B, T, 3, H, W]``."""
        patches = (images.shape[-2] // self.patch_size) * (images.shape[-1] // self.patch_size)
        return TokenLayout(images.shape[1], self.patch_start_idx + patches, self.patch_start_idx)

    def embed(self, images: Tensor, past: Carried | None = None, causal: bool = False) -> tuple[Tensor, ...]:
        """Tokens ``[B, T, P, C]``, positions ``[1, P, 2]``, maps; ``past`` belongs to a stream and is updated."""
        batch, frames = images.shape[:2]
        patches, half, quarter = self.patch_embed(images.flatten(0, 1))
        before = None if past is None else past.images
        moved, *found = self.matching(images, before, causal)
        rows, columns = (n // self.patch_size for n in images.shape[-2:])
        special = torch.cat((self.camera_token, self.register_token), dim=2)  # [1, 2, 5, C]
        kind = torch.ones(frames, dtype=torch.long, device=images.device)
        if before is None:
            kind[0] = 0
        if past is not None:
            past.images = remember(before, images)
        special = special[:, kind].expand(batch, -1, -1, -1)
        x = torch.cat((special, (patches + moved).unflatten(0, (batch, frames))), dim=2)
        y, z = (torch.arange(n, device=images.device) + 1 for n in (rows, columns))
        pos = F.pad(torch.cartesian_prod(y, z), (0, 0, self.patch_start_idx, 0))[None]
        return x, pos, torch.cat((half, found[0]), dim=1), torch.cat((quarter, found[1]), dim=1)

    def forward(
        self, images: Tensor, *, causal: bool = False, camera_pass: bool = False, past: Carried | None = None
    ) -> Features:
        """Images ``[B, T, 3, H, W]`` in [0, 1]; with ``past``, one frame of a stream.

        A past without caches leaves them to those who set one on the attentions (``gate4d.patch``).
        """
        x, pos, half, quarter = self.embed(images, past, causal or past is not None)
        past = past if isinstance(past, Past) else None
        batch, frames, size, _ = x.shape
        layout = self.layout(images)
        visible, pos_all = None, pos.repeat(1, frames, 1)
        if causal and past is None:
            visible = Visibility.frame_causal(layout)
        if camera_pass:  # the copies come last, see everything, and are seen by nobody
            pos_all = torch.cat((pos_all, pos[:, :1].expand(-1, frames, -1)), dim=1)
            visible = with_global_rows(layout, causal)
        copies = x[:, :, 0] if camera_pass else None
        if past is not None:
            past.cameras.append(x[:, :, 0])
        kept = []
        for i in range(self.depth):
            camera = x[:, :, 0]
            x = self.frame_blocks[i](x.flatten(0, 1), pos).unflatten(0, (batch, frames))
            step = x[:, :, 0] - camera
            if past is not None:
                past.steps[i].append(step)
            x, block = x.flatten(1, 2), self.global_blocks[i]
            if camera_pass:
                x = block.select(torch.cat((x, copies + step), 1), pos_all, keys=frames * size, visible=visible)
                x, copies = x[:, : frames * size], x[:, frames * size :]
            elif past is not None:
                x = block.select(x, pos_all, cache=past.caches[i])
            elif visible is not None:
                x = block.select(x, pos_all, visible=visible)
            else:
                x = block(x, pos_all)
            x = x.unflatten(1, (frames, size))
            if i in (self.depth // 2 - 1, self.depth - 1):
                kept.append(x)
        tokens = self.norm(torch.cat((kept[0], kept[-1]), dim=-1))
        return Features(tokens, x[:, :, 0], copies, half, quarter)

    def camera_pass(self, past: Past) -> Tensor:
        """The copies' tokens ``[B, T, C]`` from what a stream left behind."""
        copies = torch.cat(past.cameras, dim=1)
        pos = torch.zeros((1, copies.shape[1], 2), dtype=torch.long, device=copies.device)
        for i, block in enumerate(self.global_blocks):
            copies = block.look(copies + torch.cat(past.steps[i], dim=1), pos, past.caches[i])
        return copies


def with_global_rows(layout: TokenLayout, causal: bool) -> Visibility:
    """The clip's queries, causal over frames or not, followed by one query a frame that sees every key."""
    tokens = layout.num_tokens

    def everything(queries: int) -> Visibility:
        start = torch.zeros(queries, dtype=torch.int32)
        return Visibility.intervals(start, torch.full_like(start, tokens))

    clip = Visibility.frame_causal(layout) if causal else everything(tokens)
    return clip.with_rows(everything(layout.frames))


class Carried:
    """What a stream keeps of the frames before beside the keys and values of its attentions."""

    def __init__(self) -> None:
        self.images: Tensor | None = None  # see remember()
        self.pose: Tensor | None = None  # of the last frame, as encoded


class Past(Carried):
    """And those: caches of keys and values, and a vector a frame for the camera pass."""

    def __init__(self, depth: int, trunk: int, window: int | None, anchors: int):
        super().__init__()
        self.caches = [FrameKVCache(window, anchors=anchors) for _ in range(depth)]
        self.trunk = [FrameKVCache(window, anchors=anchors) for _ in range(trunk)]
        self.cameras: list[Tensor] = []  # camera tokens as embedded
        self.steps: list[list[Tensor]] = [[] for _ in range(depth)]  # what each frame block added to the camera token


class CameraHead(nn.Module):
    """Attention over the frames' camera tokens, then each frame's motion since the one before, added up to its pose."""

    def __init__(self, dim: int, heads: int, depth: int):
        super().__init__()
        self.trunk_depth = depth
        self.token_norm, self.trunk_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.trunk = nn.ModuleList(Block(dim, heads, qk_norm=False) for _ in range(depth))
        self.pose = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 9))

    def forward(
        self,
        tokens: Tensor,
        causal: bool = False,
        caches: list[FrameKVCache] | None = None,
        past: Carried | None = None,
    ) -> Tensor:
        """Camera tokens ``[B, T, C]`` to ``[B, T, 9]``; a ``past`` knows the pose of the frame before them, and learns
        that of the last."""
        poses = chained(self.steps(tokens, causal, caches), None if past is None else past.pose)
        if past is not None:
            past.pose = poses[:, -1]
        return poses

    def steps(self, tokens: Tensor, causal: bool = False, caches: list[FrameKVCache] | None = None) -> Tensor:
        """What each frame's camera did since the frame before, ``[B, T, 9]``."""
        x = self.token_norm(tokens)
        visible = Visibility.frame_causal(TokenLayout(x.shape[1], 1)) if causal else None
        for i, block in enumerate(self.trunk):
            if caches is not None:
                x = block.select(x, None, cache=caches[i])
            else:
                x = block(x) if visible is None else block.select(x, None, visible=visible)
        raw = widened(self.pose(self.trunk_norm(x)))
        # From frame to frame a camera moves by hundredths of a clip's unit: at full scale the optimiser's steps alone
        # would be larger.
        move, turn, field = raw.split((3, 4, 2), dim=-1)
        quaternion = F.normalize(0.02 * turn + raw.new_tensor((0.0, 0.0, 0.0, 1.0)), dim=-1)
        return torch.cat((0.02 * move, quaternion, torch.pi * torch.sigmoid(field - 0.5)), dim=-1)


class DenseHead(nn.Module):
    """Tokens to pixels in three steps of pixel shuffling, with the maps of the patch embedding beside them."""

    def __init__(self, dim: int, widths: tuple[int, int], outputs: int):
        super().__init__()
        half, quarter = widths
        self.tokens = nn.Linear(2 * dim, 4 * quarter)
        self.coarse_skip = nn.Conv2d(2 * quarter, quarter, 1)
        self.coarse = nn.Conv2d(quarter, quarter, 3, 1, 1)
        self.fine_skip = nn.Conv2d(2 * half, half, 1)
        self.up = nn.Conv2d(quarter, 4 * half, 1)
        self.fine = nn.Conv2d(half, half, 3, 1, 1)
        self.out = nn.Conv2d(half, 4 * outputs, 3, 1, 1)

    def forward(self, features: Features, start: int) -> Tensor:
        """``[B, T, outputs, H, W]``; patches begin at token ``start``."""
        batch, frames = features.tokens.shape[:2]
        rows, columns = (n // 2 for n in features.quarter.shape[-2:])
        x = self.tokens(features.tokens[:, :, start:]).flatten(0, 1).mT.unflatten(2, (rows, columns))
        x = F.gelu(F.pixel_shuffle(x, 2) + self.coarse_skip(features.quarter))
        x = F.gelu(x + self.coarse(x))
        x = F.gelu(F.pixel_shuffle(self.up(x), 2) + self.fine_skip(features.half))
        x = F.gelu(x + self.fine(x))
        return widened(F.pixel_shuffle(self.out(x), 2)).unflatten(0, (batch, frames))


class AlternatingModel(nn.Module):
    """VGGT's shape at a thousandth of its work.

    Args:
        dim: features C of a token; heads have ``dim / heads`` of them.
        heads: attention heads.
        depth: frame blocks, and as many global blocks.
        trunk: blocks of the camera head.
        widths: channels of the maps at a half and a quarter of the image size.
    """

    def __init__(
        self, dim: int = 192, heads: int = 3, depth: int = 4, trunk: int = 2, widths: tuple[int, int] = (32, 64)
    ):
        super().__init__()
        if depth < 2:
            raise ValueError(f"depth must be at least 2, got {depth}.")
        widths = (int(widths[0]), int(widths[1]))
        self.config = {"dim": dim, "heads": heads, "depth": depth, "trunk": trunk, "widths": list(widths)}
        self.aggregator = Aggregator(dim, heads, depth, widths)
        self.camera_head = CameraHead(dim, heads, trunk)
        self.depth_head = DenseHead(dim, widths, 2)
        self.motion_head = DenseHead(dim, widths, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, images: Tensor, causal: bool = False, camera_pass: bool = False, past: Carried | None = None
    ) -> dict[str, Tensor]:
        """Predictions for a clip.

        Args:
            images: ``[B, T, 3, H, W]`` in [0, 1]; H and W are multiples of 8.
            causal: every frame sees itself and earlier frames only, as in :meth:`stream`.
            camera_pass: adds ``"global_pose_enc"``, from copies of the camera tokens that see all frames.
            past: from :meth:`carry`: the images are the next frame of a stream, whose attentions have caches set from
                outside (``gate4d.patch(model, method="more")``).

        Returns:
            ``pose_enc [B, T, 9]`` (see :mod:`gate4d.geometry`), ``depth [B, T, H, W, 1]`` > 0 in units of the
            first frame's mean depth, ``depth_conf [B, T, H, W]`` >= 1, ``motion [B, T, H, W]`` logits (> 0: moving)
            and ``images``.

        Raises:
            ValueError: the images are not a clip, or do not divide into patches.
        """
        check_clip(images, self.aggregator.patch_size)
        features = self.aggregator(images, causal=causal, camera_pass=camera_pass, past=past)
        out = self._dense(features, images)
        out["pose_enc"] = self.camera_head(features.cameras, causal, past=past)
        if camera_pass:
            out["global_pose_enc"] = self.camera_head(features.global_cameras)
        return out

    def carry(self) -> Carried:
        """What a new stream gives to each :meth:`forward`."""
        return Carried()

    def stream(self, frames: Iterable[Tensor], window: int | None = None, anchors: int = 0) -> Stream:
        """Predictions frame by frame, causal: those of ``forward(..., causal=True)`` without a window.

        Args:
            frames: images ``[3, H, W]`` or ``[B, 3, H, W]`` in [0, 1], or a clip ``[B, T, 3, H, W]``.
            window: frames kept, the current one included; None keeps all. ``depth + 1`` vectors of every frame are
                kept whatever the window, for :meth:`Stream.camera_pass` gives a pose for each.
            anchors: leading frames kept beside the window.
        """
        return Stream(self, frames, window, anchors)

    def _dense(self, features: Features, images: Tensor) -> dict[str, Tensor]:
        start = self.aggregator.patch_start_idx
        depth, confidence = self.depth_head(features, start).unbind(2)
        return {
            "depth": depth.clamp(-8, 8).exp()[..., None],
            "depth_conf": 1 + confidence.clamp(max=8).exp(),
            "motion": self.motion_head(features, start).squeeze(2),
            "images": images,
        }


def check_clip(images: Tensor, side: int) -> None:
    """ValueError unless ``images`` are floating point ``[B, T, 3, H, W]`` with sides that ``side`` divides."""
    if images.dim() != 5 or images.shape[2] != 3 or not images.is_floating_point() or not images.numel():
        raise ValueError(f"images must be floating point [B, T, 3, H, W], got {images.dtype} {list(images.shape)}.")
    if images.shape[3] % side or images.shape[4] % side:
        raise ValueError(f"images must have sides that are multiples of {side}, got {list(images.shape)}.")


class Stream(Iterator[dict[str, Tensor]]):
    """Iterates over a stream's predictions, ``[B, 1, ...]`` each as in :meth:`AlternatingModel.forward`.

    Attributes:
        past: the caches.
    """

    def __init__(self, model: AlternatingModel, frames: Iterable[Tensor], window: int | None, anchors: int):
        self.model = model
        clip = isinstance(frames, Tensor) and frames.dim() == 5
        self.frames = iter(frames.unbind(1) if clip else frames)
        self.past = Past(model.aggregator.depth, model.camera_head.trunk_depth, window, anchors)
        self.seen = 0

    @torch.no_grad()
    def __next__(self) -> dict[str, Tensor]:
        image = next(self.frames)
        images = (image[None] if image.dim() == 3 else image)[:, None]
        check_clip(images, self.model.aggregator.patch_size)
        features = self.model.aggregator(images, past=self.past)
        out = self.model._dense(features, images)
        out["pose_enc"] = self.model.camera_head(features.cameras, caches=self.past.trunk, past=self.past)
        self.seen += 1
        return out

    @torch.no_grad()
    def camera_pass(self) -> Tensor:
        """MoRe's global pass: ``pose_enc [B, T, 9]`` of the frames so far, each from one look at all that is cached.

        Raises:
            ValueError: no frame was read yet.
        """
        if not self.seen:
            raise ValueError("camera_pass needs at least 1 frame: iterate over the stream first.")
        aggregator = self.model.aggregator
        return self.model.camera_head(aggregator.camera_pass(self.past))
