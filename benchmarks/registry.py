"""Attention shapes of the supported models, in one table; every benchmark takes its sizes from here.

Sizes are those of the public repositories at their default resolution, read from the code and from runs with
random weights. ``source`` names the repository and the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gate4d import TokenLayout

Growth = Literal["batch", "tokens", "keys", "none"]


@dataclass(frozen=True)
class AttentionShape:
    """One kind of attention module.

    Attributes:
        name: ``model.module``, the key in :data:`SHAPES`.
        heads, head_dim: ``H`` and ``D``.
        queries, keys: tokens of one frame (or of the state) on either side, special tokens included.
        special: leading special tokens of a frame.
        growth: what grows with the number of frames: ``batch`` (frames side by side), ``tokens`` (all frames attend
            to each other), ``keys`` (one frame of queries, a cache of keys), ``none`` (the same size at every frame).
        modules: how many of these a model runs per forward pass.
        source: repository and module path.
    """

    name: str
    heads: int
    head_dim: int
    queries: int
    keys: int
    special: int
    growth: Growth
    modules: int
    source: str

    def sizes(self, frames: int) -> tuple[int, int, int]:
        """``(B, Nq, Nk)`` for a clip of ``frames``."""
        batch = frames if self.growth == "batch" else 1
        queries = self.queries * (frames if self.growth == "tokens" else 1)
        keys = self.keys * (frames if self.growth in ("tokens", "keys") else 1)
        return batch, queries, keys

    def layout(self, frames: int) -> TokenLayout:
        """The keys' layout, for the shapes in which frames are laid one after the other."""
        return TokenLayout(frames, self.keys, self.special)


_VGGT = "facebookresearch/vggt: aggregator"
_CUT3R = "CUT3R/CUT3R:"
_TABLE = (
    # name, heads, head_dim, queries, keys, special, growth, modules, source
    ("vggt.patch_embed", 16, 64, 1041, 1041, 5, "batch", 24, f"{_VGGT}.patch_embed.blocks.*.attn (DINOv2)"),
    ("vggt.frame", 16, 64, 1041, 1041, 5, "batch", 24, f"{_VGGT}.frame_blocks.*.attn, 518 x 392 pixels"),
    ("vggt.global", 16, 64, 1041, 1041, 5, "tokens", 24, f"{_VGGT}.global_blocks.*.attn, 518 x 392 pixels"),
    ("vggt.camera_head", 16, 128, 1, 1, 0, "tokens", 4, "facebookresearch/vggt: camera_head.trunk.*.attn"),
    ("streamvggt.cached", 16, 64, 1041, 1041, 5, "keys", 24, "wzzheng/StreamVGGT: aggregator.global_blocks, use_cache"),
    ("streamvggt.camera_head", 16, 128, 1, 4, 0, "keys", 4, "wzzheng/StreamVGGT: camera_head, 4 cached keys a frame"),
    ("stream3r.cached", 16, 64, 1041, 1041, 5, "keys", 24, "NIRVANALAN/STream3R: global_blocks, kv_cache"),
    ("pi3.encoder", 16, 64, 1041, 1041, 5, "batch", 24, "yyfz/Pi3: encoder.blocks"),
    ("pi3.frame", 16, 64, 1041, 1041, 5, "batch", 18, "yyfz/Pi3: decoder.*.attn, even blocks"),
    ("pi3.global", 16, 64, 1041, 1041, 5, "tokens", 18, "yyfz/Pi3: decoder.*.attn, odd blocks"),
    ("pi3.heads", 16, 64, 1041, 1041, 5, "batch", 15, "yyfz/Pi3: point_decoder, conf_decoder, camera_decoder .blocks"),
    ("vggt_omega.frame", 16, 64, 593, 593, 17, "batch", 24, "VGGT-Omega: aggregator.frame_blocks"),
    ("vggt_omega.global", 16, 64, 593, 593, 17, "tokens", 19, "VGGT-Omega: aggregator.inter_frame_blocks"),
    ("vggt_omega.special", 16, 64, 17, 17, 17, "tokens", 5, "VGGT-Omega: inter_frame_blocks on special tokens alone"),
    ("dust3r.encoder", 16, 64, 576, 576, 0, "batch", 24, "naver/croco and naver/dust3r: enc_blocks.*.attn, 512 x 288"),
    ("dust3r.decoder", 12, 64, 576, 576, 0, "none", 24, "naver/dust3r: dec_blocks.*.attn and dec_blocks2.*.attn"),
    ("dust3r.cross", 12, 64, 576, 576, 0, "none", 24, "naver/dust3r: dec_blocks.*.cross_attn and dec_blocks2"),
    ("cut3r.encoder", 16, 64, 576, 576, 0, "batch", 24, f"{_CUT3R} enc_blocks.*.attn"),
    ("cut3r.image", 12, 64, 577, 577, 1, "none", 12, f"{_CUT3R} dec_blocks.*.attn"),
    ("cut3r.image_state", 12, 64, 577, 768, 1, "none", 12, f"{_CUT3R} dec_blocks.*.cross_attn, keys are the state"),
    ("cut3r.state", 16, 48, 768, 768, 0, "none", 12, f"{_CUT3R} dec_blocks_state.*.attn"),
    ("cut3r.state_image", 16, 48, 768, 577, 0, "none", 12, f"{_CUT3R} dec_blocks_state.*.cross_attn (TTT3R's cue)"),
    ("cut3r.memory", 12, 128, 256, 1, 0, "none", 2, f"{_CUT3R} pose_retriever.write_blocks (read_blocks: 1 x 256)"),
)
SHAPES: dict[str, AttentionShape] = {row[0]: AttentionShape(*row) for row in _TABLE}
