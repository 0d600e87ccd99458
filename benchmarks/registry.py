"""Attention shapes of the supported models and the operations measured on them; every benchmark takes both from here.

Sizes are those of the public repositories at their default resolution, read from the code and from runs with
random weights. ``source`` names the repository and the module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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

    @property
    def width(self) -> int:
        """Features of a token, ``H * D``."""
        return self.heads * self.head_dim

    def scaled(self, divisor: int) -> AttentionShape:
        """Heads and tokens of a frame divided, head dimension and special tokens kept (at least one of each)."""

        def patches(tokens: int, special: int) -> int:
            return max(1, (tokens - special) // divisor) + special

        tokens = {"queries": patches(self.queries, self.special), "keys": patches(self.keys, self.special)}
        return replace(self, heads=max(1, self.heads // divisor), **tokens)

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


@dataclass(frozen=True)
class Operation:
    """Something that is measured, with the shape it is measured on by default.

    Attributes:
        name: the key in :data:`OPERATIONS`.
        what: one line.
        shape, frames: default size, a name of :data:`SHAPES`.
        gate, visible, window: of :func:`.cases.make_inputs`; ``gate`` None for operations that are no attention call.
        backward: gradients for q, k, v and the motion scores as well.
        targets: the targets that measure it.
    """

    name: str
    what: str
    shape: str
    frames: int
    gate: str | None
    visible: str = "full"
    window: int | None = None
    backward: bool = False
    targets: tuple[str, ...] = ()


OPERATIONS: dict[str, Operation] = {
    o.name: o
    for o in (
        Operation("plain", "attention without a gate", "vggt.global", 4, "none", targets=("C1", "C2")),
        Operation("gated", "pairwise motion gate", "vggt.global", 4, "pairwise", targets=("C1", "C2", "C3", "G2")),
        Operation("keys", "gate on keys alone", "vggt.global", 4, "keys", targets=("G5",)),
        Operation("drop", "30 % of the keys dropped", "vggt.global", 4, "drop", targets=("C5", "G5")),
        Operation("frame_causal", "causal over frames", "vggt.global", 8, "none", "frame_causal", targets=("C6", "G6")),
        Operation("window", "window of two frames", "vggt.global", 8, "none", "frame_causal", 2, targets=("C6",)),
        Operation("backward", "pairwise gate, all gradients", "vggt.global", 4, "pairwise", "full", None, True,
                  ("C4", "G4")),
        Operation("received", "attention received per key", "vggt.global", 4, None, targets=("C9", "G7")),
        Operation("saliency", "VGGT4D's saliency", "vggt.global", 13, None, targets=("C10", "G8")),
        Operation("confidence", "TTT3R's state confidence", "cut3r.state_image", 1, None, targets=("C11", "G10")),
    )
}  # fmt: skip


def operation(name: str) -> Operation:
    """An operation by name.

    Raises:
        ValueError: there is none of that name; lists those there are.
    """
    if name not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {name!r}.")
    return OPERATIONS[name]


def shape(name: str) -> AttentionShape:
    """A shape by name.

    Raises:
        ValueError: there is none of that name; lists those there are.
    """
    if name not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}.")
    return SHAPES[name]
