"""VGGT and its copies (FastVGGT through the generic adapter, VGGT4D), Pi3, VGGT-Omega."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gates import MotionGate
from ..nn.attention import split_qkv
from ..nn.rope import rotate_last
from .base import PatchedAttention, Sample


class VggtSelf(PatchedAttention):
    """``attn(x, pos=None)`` of frame blocks, global blocks and the camera head."""

    family = "vggt"
    parameters = ("x", "pos")

    def __call__(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x, pos)
        return self.output(self.attend(q, k, v, scale=self.scale))

    @staticmethod
    def exercise(call, sample: Sample):
        return [call(sample.x, pos=sample.positions)]


class DinoSelf(PatchedAttention):
    """``attn(x, attn_bias=None)`` and ``attn(x, attn_bias=None, pos=None)``: DINOv2 inside VGGT and Pi3."""

    family = "dino"
    parameters = ("x", "attn_bias")

    def __call__(self, x: Tensor, attn_bias: None = None, pos: None = None) -> Tensor:
        if attn_bias is not None or pos is not None:
            raise ValueError("attn_bias and pos must be None: upstream serves nested tensors only through xFormers.")
        q, k, v = self.project(x, None)
        return self.output(self.attend(q, k, v, scale=self.scale))

    @staticmethod
    def exercise(call, sample: Sample):
        return [call(sample.x)]


class VggtDinoSelf(DinoSelf):
    """``attn(x, attn_bias=None, pos=None)``."""

    parameters = ("x", "attn_bias", "pos")


class Vggt4dSelf(PatchedAttention):
    """VGGT4D's attention: keys and values of dynamic patches are dropped in layers 0 to 4; returns ``(x, q, k)``.

    ``dyn_masks`` is bool ``[B, frames, patches]``, True = dynamic; the special tokens of a frame are never dropped.
    This is the authors' own fork, which gates by itself; :mod:`gate4d.methods.vggt4d` has the two passes on plain VGGT.
    """

    family = "vggt4d"
    parameters = ("x", "pos", "is_frame_attn", "layer_id", "dyn_masks")
    returns_qk = True
    masked_layers = range(5)
    special_tokens = 5

    def __call__(
        self,
        x: Tensor,
        pos: Tensor | None = None,
        is_frame_attn: bool = True,
        layer_id: int = 0,
        dyn_masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.project(x, pos)
        gate = None
        if dyn_masks is not None and layer_id in self.masked_layers:
            gate = self.drop(dyn_masks, is_frame_attn, x)
        return self.output(self.attend(q, k, v, scale=self.scale, gate=gate)), q, k

    def drop(self, masks: Tensor, per_frame: bool, x: Tensor) -> MotionGate:
        batch, tokens, _ = x.shape
        if masks.dim() != 3:
            raise ValueError(f"dyn_masks must have shape [B, frames, patches], got {list(masks.shape)}.")
        dropped = masks.new_zeros((*masks.shape[:2], self.special_tokens + masks.shape[2]))
        dropped[..., self.special_tokens :] = masks
        dropped = dropped.flatten(0, 1) if per_frame else dropped.flatten(1)
        if dropped.shape != (batch, tokens):
            raise ValueError(
                f"dyn_masks {list(masks.shape)} [B, frames, patches] describes {list(dropped.shape)} [batch, tokens] "
                f"of this {'frame' if per_frame else 'global'} attention, but x has {[batch, tokens]}: "
                "wrong number of frames or patches."
            )
        return MotionGate.drop_keys(dropped.bool())

    @staticmethod
    def exercise(call, sample: Sample):
        out, q, k = call(sample.x, pos=sample.positions, layer_id=9)
        return [out, q, k]


class Pi3Self(PatchedAttention):
    """Pi3's ``attn(x, attn_bias=None, xpos=None)``: ``attn_bias`` is ignored, as upstream does.

    q and k are cast to the dtype of v after their norms and rotated in it. Upstream pins SDPA backends, which
    means the slow one on a CPU and an error where flash attention cannot serve a bf16 call; here the choice is free.
    """

    family = "pi3"
    parameters = ("x", "attn_bias", "xpos")
    casts = True

    def __call__(self, x: Tensor, attn_bias: Tensor | None = None, xpos: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x, xpos)
        return self.output(self.attend(q, k, v, scale=self.scale))

    @staticmethod
    def exercise(call, sample: Sample):
        return [call(sample.x, xpos=sample.positions)]


class OmegaSelf(PatchedAttention):
    """VGGT-Omega (DINOv3): its blocks call ``forward_list``, which shares ``compute_attention(qkv, attn_bias, rope)``.

    ``qkv`` comes with the masked key bias already applied; ``rope`` is ``(sin, cos)`` or None; the special tokens in
    front are not rotated. Returns ``[B, N, C]`` before ``proj``.
    """

    family = "vggt-omega"
    attribute = "compute_attention"
    parameters = ("qkv", "attn_bias", "rope")

    def __call__(self, qkv: Tensor, attn_bias: None = None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if attn_bias is not None:
            raise ValueError("attn_bias must be None, as upstream asserts.")
        module = self.module
        q, k, v = split_qkv(qkv, module.num_heads)
        if getattr(module, "q_norm", None) is not None:
            q, k = module.q_norm(q), module.k_norm(k)
        if rope is not None:
            sin, cos = rope
            q, k = rotate_last(q, sin, cos), rotate_last(k, sin, cos)
        return self.attend(q, k, v, scale=self.scale)

    @staticmethod
    def exercise(call, sample: Sample):
        qkv = torch.cat((sample.x, sample.x.roll(1, 1), sample.x.flip(1)), dim=-1)
        angles = sample.pos[0, 3:, :1] * (1.0 + torch.arange(sample.head_dim // 2, device=qkv.device))
        angles = angles.repeat(1, 2)  # pairs (i, i + D/2) share an angle
        return [call(qkv), call(qkv, rope=(angles.sin(), angles.cos()))]
