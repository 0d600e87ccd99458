"""A small CUT3R-shaped model: a recurrent state that image tokens and state tokens read and write, frame by frame.

It has the steps that CUT3R's loops are made of, under their names, so that ``gate4d.patch`` and the methods TTT3R and
MUT3R drive it as they drive CUT3R. Its memory does not grow with the frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import chained
from ..methods.clips import recurrent_views
from ..methods.rollout import recurrent_steps
from ..nn import CrossAttention, RoPE2D, SelfAttention
from .alternating import CameraHead, DenseHead, Features, LayerScale, PatchEmbed, check_clip
from .matching import Matching

View = dict[str, Any]


class Attention(SelfAttention):
    """Self-attention called as CroCo's, ``attn(x, xpos)``."""

    def forward(self, x: Tensor, xpos: Tensor | None) -> Tensor:
        return super().forward(x, xpos)


class Cross(CrossAttention):
    """Cross-attention called as CroCo's, ``cross_attn(query, key, value, qpos, kpos)``."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, qpos: Tensor | None, kpos: Tensor | None) -> Tensor:
        return super().forward(query, key, value, qpos, kpos)


def mlp(dim: int, ratio: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))


class EncoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int, rope: RoPE2D):
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), mlp(dim, 4)
        self.attn = Attention(dim, heads, rope=rope)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x: Tensor, xpos: Tensor | None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), xpos))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to the other side, MLP; returns ``(x, y)`` with y as it was, like CroCo's."""

    def __init__(self, dim: int, heads: int, rope: RoPE2D | None, ratio: int = 4):
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm_y = (nn.LayerNorm(dim) for _ in range(4))
        self.attn, self.cross_attn = Attention(dim, heads, rope=rope), Cross(dim, heads, rope=rope)
        self.mlp = mlp(dim, ratio)
        self.ls1, self.ls2, self.ls3 = (LayerScale(dim) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor, xpos: Tensor | None, ypos: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x + self.ls1(self.attn(self.norm1(x), xpos))
        seen = self.norm_y(y)
        x = x + self.ls2(self.cross_attn(self.norm2(x), seen, seen, xpos, ypos))
        return x + self.ls3(self.mlp(self.norm3(x))), y


class PoseMemory(nn.Module):
    """Asked for a pose token before a frame, told what it was after it."""

    def __init__(self, dim: int, heads: int, tokens: int):
        super().__init__()
        self.mem = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.write_blocks = nn.ModuleList([DecoderBlock(dim, heads, None, 1)])
        self.read_blocks = nn.ModuleList([DecoderBlock(dim, heads, None, 1)])

    def inquire(self, feature: Tensor, mem: Tensor) -> Tensor:
        return self.read_blocks[0](feature, mem, None, None)[0]

    def update_mem(self, mem: Tensor, feature: Tensor, pose: Tensor) -> Tensor:
        return self.write_blocks[0](mem, feature + pose, None, None)[0]


class RecurrentModel(nn.Module):
    """CUT3R's shape at a thousandth of its work.

    What :class:`~gate4d.models.matching.Matching` compares, and the pose that the frames' motions are added to, are
    part of the memory: behind the tokens of the pose memory come the last pose, then the first image and the last
    three, as patches, so that a reset forgets them too.

    Args:
        dim: features C of a token, at least 192, the values of a patch.
        heads: attention heads.
        encoder, decoder: blocks of the encoder, and of each of the two decoders.
        state: tokens of the state, a square number.
        memory: tokens of the pose memory.
        widths: channels of the maps at a half and a quarter of the image size.
    """

    def __init__(
        self, dim: int = 192, heads: int = 3, encoder: int = 2, decoder: int = 2, state: int = 64, memory: int = 16,
        widths: tuple[int, int] = (32, 64),
    ):  # fmt: skip
        super().__init__()
        widths = (int(widths[0]), int(widths[1]))
        self.patch_embed = PatchEmbed(dim, widths)
        self.patch_size = self.patch_embed.patch_size
        self.values, self.reach, self.memory = 3 * self.patch_size**2, 1 + max(Matching.steps), memory
        if dim < self.values:
            raise ValueError(f"dim must be at least {self.values}, the values of a patch, got {dim}.")
        self.side = round(state**0.5)
        if self.side**2 != state:
            raise ValueError(f"state must be a square number of tokens, got {state}.")
        self.config = {"dim": dim, "heads": heads, "encoder": encoder, "decoder": decoder, "state": state}
        self.config |= {"memory": memory, "widths": list(widths)}
        self.dim, self.widths = dim, widths
        self.matching = Matching(widths, dim)
        rope = RoPE2D()
        self.enc_blocks = nn.ModuleList(EncoderBlock(dim, heads, rope) for _ in range(encoder))
        self.enc_norm, self.decoder_embed = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.register_tokens = nn.Embedding(state, dim)
        self.pose_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pose_retriever = PoseMemory(dim, heads, memory)
        self.dec_blocks = nn.ModuleList(DecoderBlock(dim, heads, rope) for _ in range(decoder))
        self.dec_blocks_state = nn.ModuleList(DecoderBlock(dim, heads, rope) for _ in range(decoder))
        self.dec_norm, self.dec_norm_state = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.camera_head = CameraHead(dim, heads, 0)
        self.depth_head, self.motion_head = DenseHead(dim, widths, 2), DenseHead(dim, widths, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.register_tokens.weight, std=0.02)

    def forward(self, frames: Tensor | Sequence[View]) -> dict[str, Tensor]:
        """Predictions for a clip ``[B, T, 3, H, W]`` in [0, 1], or for a list of CUT3R's views.

        Returns:
            ``pose_enc``, ``depth``, ``depth_conf`` and ``motion`` as of
            :class:`~gate4d.models.alternating.AlternatingModel`, causal by construction.

        Raises:
            ValueError: the images are not a clip, or do not divide into patches.
        """
        if isinstance(frames, Tensor):
            check_clip(frames, self.patch_size)
            return self._clip(frames)
        views = recurrent_views(frames, device=self.pose_token.device)
        found = [prediction for prediction, _ in recurrent_steps(self, views)]
        return {name: torch.cat([f[name] for f in found], dim=1) for name in found[0]}

    def stream(self, frames: Iterable[Any]) -> Iterable[dict[str, Tensor]]:
        """Predictions frame by frame, ``[B, 1, ...]`` each; frames as of
        :func:`gate4d.methods.clips.recurrent_views`, or a clip ``[B, T, 3, H, W]``."""
        clip = frames.unbind(1) if isinstance(frames, Tensor) and frames.dim() == 5 else frames
        with torch.no_grad():
            for prediction, _ in recurrent_steps(self, recurrent_views(clip, device=self.pose_token.device)):
                yield prediction

    def _clip(self, images: Tensor) -> dict[str, Tensor]:
        """The same as the steps below, with all frames in one call where they do not depend on each other."""
        batch, frames = images.shape[:2]
        tokens, pos, maps = self._encode(images.flatten(0, 1))
        moved, *changes = self.matching(images, None, True)
        feats = self._pack(tokens + moved, maps, changes).unflatten(0, (batch, frames))
        (init, state_pos), mem = self._initial_state(batch), self.pose_retriever.mem.expand(batch, -1, -1)
        plain = self.decoder_embed(tokens.unflatten(0, (batch, frames))).mean(2, keepdim=True).unbind(1)
        state, layers, pos = init, [], pos[:1].expand(batch, -1, -1)
        for t, feat in enumerate(feats.unbind(1)):
            pose = self.pose_retriever.inquire(plain[t], mem) if t else self.pose_token.expand(batch, -1, -1)
            at = torch.full_like(pos[:, :1], -1)
            state, dec = self._recurrent_rollout(state, state_pos, feat, pos, pose, at, init)
            mem = self.pose_retriever.update_mem(mem, plain[t], dec[-1][:, :1])
            layers.append(torch.cat((dec[0], dec[-1]), dim=-1))
        return self._predict(torch.stack(layers, dim=1), feats, images.shape[-2:])

    # ---- the steps of CUT3R's loops ------------------------------------------------------------------------------

    def _encode_views(self, views: Sequence[View]) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
        """Shapes, features (of one layer) and positions of views.

        The features of a patch are its token ``[C]``, the maps beneath it, and its pixels.
        """
        feats, positions = [], []
        for view in views:
            image = (view["img"] + 1) / 2
            check_clip(image[:, None], self.patch_size)
            tokens, pos, maps = self._encode(image)
            pixels = F.pixel_unshuffle(image, self.patch_size).flatten(2).mT
            feats.append(torch.cat((self._pack(tokens, maps), pixels), dim=-1))
            positions.append(pos)
        return [view["true_shape"] for view in views], [feats], positions

    def _forward_encoder(self, views: Sequence[View]) -> tuple[Any, Any]:
        shapes, feats, positions = self._encode_views(views)
        batch, patches = feats[-1][0].shape[:2]
        state, state_pos = self._initial_state(batch)
        unseen = torch.full_like(state[:, :1], -1).expand(-1, 1 + self.reach * patches, -1)  # no pixel is below 0
        mem = torch.cat((self.pose_retriever.mem.expand(batch, -1, -1), unseen), dim=1)
        return (feats[-1], positions, shapes), (state.clone(), mem.clone(), state, state_pos, mem)

    def _recurrent_rollout(
        self, state_feat: Tensor, state_pos: Tensor, current_feat: Tensor, current_pos: Tensor, pose_feat: Tensor,
        pose_pos: Tensor, init_state_feat: Tensor, img_mask: Any = None, reset_mask: Any = None, update: Any = None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """State ``[B, S, C]`` and image tokens, pose token first: the new state, and the tokens of every layer."""
        image = torch.cat((pose_feat, self.decoder_embed(current_feat[..., : self.dim])), dim=1)
        pos = torch.cat((pose_pos, current_pos), dim=1)
        state, layers = state_feat, [image]
        for of_state, of_image in zip(self.dec_blocks_state, self.dec_blocks, strict=True):
            state, image = of_state(state, image, state_pos, pos)[0], of_image(image, state, pos, state_pos)[0]
            layers.append(image)
        layers[-1] = self.dec_norm(image)
        return self.dec_norm_state(state), layers

    def _forward_decoder_step(
        self, views: Sequence[View], i: int, feat_i: Tensor, pos_i: Tensor, shape_i: Tensor, init_state_feat: Tensor,
        init_mem: Tensor, state_feat: Tensor, state_pos: Tensor, mem: Tensor,
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
        """One frame: its prediction, and the state and the memory after it."""
        view, (height, width) = views[i], views[i]["img"].shape[-2:]
        poses, last, past = mem.split((self.memory, 1, mem.shape[1] - self.memory - 1), dim=1)
        images = past[..., : self.values].unflatten(1, (self.reach, -1))  # [B, 4, patches, values]: first, last three
        plain, now = self.decoder_embed(feat_i[..., : self.dim]).mean(1, keepdim=True), feat_i[..., -self.values :]
        seen = (images[..., 0] >= 0).all(-1)  # [B, 4]
        feat = self._compared(feat_i[..., : -self.values], now, images, seen, (height, width))
        pose = self.pose_retriever.inquire(plain, poses) if i else self.pose_token.expand(len(feat), -1, -1)
        new, dec = self._recurrent_rollout(
            state_feat, state_pos, feat, pos_i, pose, torch.full_like(pos_i[:, :1], -1), init_state_feat,
            img_mask=view["img_mask"], reset_mask=view["reset"], update=view["update"],
        )  # fmt: skip
        told = self.pose_retriever.update_mem(poses, plain, dec[-1][:, :1])
        first = torch.where(seen[:, :1, None, None], images[:, :1], now[:, None])
        layers = torch.cat((dec[0], dec[-1]), dim=-1)
        out = self._predict(layers[:, None], feat[:, None], (height, width), last[:, 0, :9], seen[:, 0])
        kept = torch.cat((first, images[:, 2:], now[:, None]), dim=1).flatten(1, 2)
        kept = torch.cat([F.pad(x, (0, self.dim - x.shape[-1])) for x in (out["pose_enc"].to(kept.dtype), kept)], dim=1)
        update, reset = (view["img_mask"] & view["update"])[:, None, None], view["reset"][:, None, None]
        state = torch.where(reset, init_state_feat, torch.where(update, new, state_feat))
        new_mem = torch.where(reset, init_mem, torch.where(update, torch.cat((told, kept), dim=1), mem))
        return out, (state, new_mem)

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        side = torch.arange(self.side, device=self.pose_token.device)
        pos = torch.cartesian_prod(side, side).expand(batch, -1, -1)
        return self.register_tokens.weight[None].expand(batch, -1, -1), pos

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Images ``[N, 3, H, W]`` to tokens ``[N, patches, C]``, positions ``[N, patches, 2]`` and maps."""
        x, *maps = self.patch_embed(images)
        y, z = (torch.arange(n // self.patch_size, device=x.device) for n in images.shape[-2:])
        pos = torch.cartesian_prod(y, z).expand(len(x), -1, -1)
        for block in self.enc_blocks:
            x = block(x, pos)
        return self.enc_norm(x), pos, maps

    def _compared(self, feat: Tensor, now: Tensor, past: Tensor, seen: Tensor, size: tuple[int, int]) -> Tensor:
        """Features of a frame with what changed since the images ``past [B, 4, patches, values]``."""
        rows = size[0] // self.patch_size

        def image(patches: Tensor) -> Tensor:  # [..., patches, values] to [..., 3, H, W]
            return F.pixel_shuffle(patches.mT.unflatten(-1, (rows, -1)), self.patch_size)

        moved, *changes = self.matching(image(now)[:, None], image(past), True, seen)
        tokens, maps = feat[..., : self.dim] + moved, self._maps(feat[..., self.dim :], rows)
        return self._pack(tokens, maps, changes)

    def _pack(self, tokens: Tensor, maps: Sequence[Tensor], changes: Sequence[Tensor] = ()) -> Tensor:
        """Tokens and, patch by patch, the maps at a half and a quarter of the size, images' before changes'."""
        pairs = zip(maps, changes, strict=True) if changes else ((m,) for m in maps)
        folded = [F.pixel_unshuffle(torch.cat(p, dim=1), s).flatten(2).mT for p, s in zip(pairs, (4, 2), strict=True)]
        return torch.cat((tokens, *folded), dim=-1)

    def _maps(self, folded: Tensor, rows: int, times: int = 1) -> list[Tensor]:
        """The maps again; ``times`` is 2 where those of the changes are among them."""
        parts = folded.split([times * w * s * s for w, s in zip(self.widths, (4, 2), strict=True)], dim=-1)
        return [F.pixel_shuffle(p.mT.unflatten(2, (rows, -1)), s) for p, s in zip(parts, (4, 2), strict=True)]

    def _predict(
        self, tokens: Tensor, feat: Tensor, size: tuple[int, int], before: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """From the first and last layer's ``tokens [B, T, 1 + P, 2C]`` and the features ``[B, T, P, ...]``; ``before
        [B, 9]`` is the pose before these frames in clips that have ``seen [B]`` any."""
        half, quarter = self._maps(feat[..., self.dim :].flatten(0, 1), size[0] // self.patch_size, 2)
        features = Features(tokens, tokens[:, :, 0, self.dim :], None, half, quarter)
        depth, confidence = self.depth_head(features, 1).unbind(2)
        steps = self.camera_head.steps(features.cameras)
        pose = chained(steps)
        if seen is not None:
            pose = torch.where(seen[:, None, None], chained(steps, before), pose)
        return {
            "pose_enc": pose,
            "depth": depth.clamp(-8, 8).exp()[..., None],
            "depth_conf": 1 + confidence.clamp(max=8).exp(),
            "motion": self.motion_head(features, 1).squeeze(2),
        }
