"""Attention shapes of the supported models and the operations measured on them; every benchmark takes both from here.

Sizes are those of the public repositories, read from their code, for landscape frames as their loaders leave them.
Pi3's loader fits frames into 255,000 pixels, for which VGGT's size stands. ``source`` names the repository, the file
and the module.
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
        modules: how many of these a model has.
        source: repository, file and module; what else the size rests on.
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


_VGGT = "facebookresearch/vggt: vggt/"
_OMEGA = "facebookresearch/vggt-omega: vggt_omega/models/"
_STREAMVGGT = "wzzheng/StreamVGGT: src/streamvggt/"
_STREAM3R = "NIRVANALAN/STream3R: stream3r/models/components/"
_PI3 = "yyfz/Pi3: pi3/models/"
_DUST3R = "naver/dust3r: dust3r/model.py and README.md,"
_CUT3R = "CUT3R/CUT3R: src/dust3r/model.py and config/dpt_512_vary_4_64.yaml,"
_TABLE = (
    # name, heads, head_dim, queries, keys, special, growth, modules, source
    ("vggt.patch_embed", 16, 64, 1041, 1041, 5, "batch", 24,
     f"{_VGGT}layers/vision_transformer.py (DINOv2 ViT-L/14 with 4 registers), 518 x 392 pixels"),
    ("vggt.frame", 16, 64, 1041, 1041, 5, "batch", 24, f"{_VGGT}models/aggregator.py, frame_blocks.*.attn"),
    ("vggt.global", 16, 64, 1041, 1041, 5, "tokens", 24, f"{_VGGT}models/aggregator.py, global_blocks.*.attn"),
    ("vggt.camera_head", 16, 128, 1, 1, 0, "tokens", 4, f"{_VGGT}heads/camera_head.py, trunk.*.attn, run four times"),
    ("streamvggt.cached", 16, 64, 1041, 1041, 5, "keys", 24,
     f"{_STREAMVGGT}models/aggregator.py, global_blocks.*.attn with use_cache"),
    ("streamvggt.camera_head", 16, 128, 1, 4, 0, "keys", 4,
     f"{_STREAMVGGT}heads/camera_head.py, trunk.*.attn, run four times, each of which adds a key to the one cache"),
    ("stream3r.cached", 16, 64, 1041, 1041, 5, "keys", 24,
     f"{_STREAM3R}aggregator/streamaggregator.py, global_blocks.*.attn with kv_cache"),
    ("stream3r.camera_head", 16, 128, 1, 1, 0, "keys", 4,
     f"{_STREAM3R}heads/camera_head.py, trunk.*.attn, run four times, each with a cache of its own"),
    ("pi3.encoder", 16, 64, 1041, 1041, 5, "batch", 24, f"{_PI3}pi3.py, encoder.blocks (dinov2_vitl14_reg)"),
    ("pi3.frame", 16, 64, 1041, 1041, 5, "batch", 18, f"{_PI3}pi3.py, decoder.*.attn of even blocks"),
    ("pi3.global", 16, 64, 1041, 1041, 5, "tokens", 18, f"{_PI3}pi3.py, decoder.*.attn of odd blocks"),
    ("pi3.heads", 16, 64, 1041, 1041, 5, "batch", 15,
     f"{_PI3}layers/transformer_head.py, blocks of point_decoder, conf_decoder and camera_decoder"),
    ("vggt_omega.patch_embed", 16, 64, 1019, 1019, 5, "batch", 24,
     f"{_OMEGA}layers/vision_transformer.py (class token and 4 storage tokens), 624 x 416 pixels"),
    ("vggt_omega.frame", 16, 64, 1031, 1031, 17, "batch", 24, f"{_OMEGA}aggregator.py, frame_blocks.*.attn"),
    ("vggt_omega.global", 16, 64, 1031, 1031, 17, "tokens", 19,
     f"{_OMEGA}aggregator.py, inter_frame_blocks.*.attn of the type 'global'"),
    ("vggt_omega.special", 16, 64, 17, 17, 17, "tokens", 5,
     f"{_OMEGA}aggregator.py, inter_frame_blocks.*.attn of the type 'register': special tokens alone"),
    ("vggt_omega.camera_head", 16, 128, 17, 17, 17, "tokens", 4,
     f"{_OMEGA}heads/camera_head.py, trunk.*.attn over the special tokens of all frames, run once"),
    ("dust3r.encoder", 16, 64, 576, 576, 0, "batch", 24, f"{_DUST3R} enc_blocks.*.attn, 512 x 288 pixels"),
    ("dust3r.decoder", 12, 64, 576, 576, 0, "none", 24, f"{_DUST3R} dec_blocks.*.attn and dec_blocks2.*.attn"),
    ("dust3r.cross", 12, 64, 576, 576, 0, "none", 24, f"{_DUST3R} dec_blocks.*.cross_attn, dec_blocks2.*.cross_attn"),
    ("cut3r.encoder", 16, 64, 576, 576, 0, "batch", 24, f"{_CUT3R} enc_blocks.*.attn, 512 x 288 pixels"),
    ("cut3r.image", 12, 64, 577, 577, 1, "none", 12, f"{_CUT3R} dec_blocks.*.attn"),
    ("cut3r.image_state", 12, 64, 577, 768, 1, "none", 12, f"{_CUT3R} dec_blocks.*.cross_attn, keys are the state"),
    ("cut3r.state", 16, 48, 768, 768, 0, "none", 12, f"{_CUT3R} dec_blocks_state.*.attn"),
    ("cut3r.state_image", 16, 48, 768, 577, 0, "none", 12, f"{_CUT3R} dec_blocks_state.*.cross_attn (TTT3R's cue)"),
    ("cut3r.memory", 12, 128, 256, 1, 0, "none", 2,
     f"{_CUT3R} pose_retriever.write_blocks.*.cross_attn (read_blocks: 1 x 256)"),
)  # fmt: skip
SHAPES: dict[str, AttentionShape] = {row[0]: AttentionShape(*row) for row in _TABLE}


@dataclass(frozen=True)
class Operation:
    """Something that is measured, with the shape it is measured on by default.

    Attributes:
        name: the key in :data:`OPERATIONS`.
        what: one line.
        shape, frames: default size, a name of :data:`SHAPES`.
        gate, visible, window: of :func:`.inputs.make_inputs`; ``gate`` None for operations that are no attention call.
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
