"""TTT3R's fork of CUT3R. Plain CUT3R has CroCo's conventions; its encoder's cast to float16 is found by exercise."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Sample
from .croco import CrocoCross, CrocoSelf
from .maps import ReturnsMaps


class Ttt3rSelf(CrocoSelf, ReturnsMaps):
    """``attn(x, xpos, return_attn=False)``; with ``return_attn`` also all logits, see :class:`ReturnsMaps`."""

    family = "ttt3r"
    parameters = ("x", "xpos", "return_attn")

    def __call__(self, x: Tensor, xpos: Tensor | None, return_attn: bool = False):
        out, q, k = self.run(x, xpos)
        return (out, self.map(q, k)) if return_attn else out

    @staticmethod
    def exercise(call, sample: Sample):
        out, logits = call(sample.x, sample.positions, return_attn=True)
        return [out, logits, call(sample.x, sample.positions)]


class Ttt3rCross(CrocoCross, ReturnsMaps):
    """``cross_attn(query, key, value, qpos, kpos, return_attn=False)``.

    TTT3R takes the mean of the state's cross-attention logits over image tokens (the pose token included), heads
    and layers as the learning rate of a state token. Its second result is then already averaged over keys,
    ``[B, H, Nq, 1]``, and upstream's rearrangement and mean over the rest give the same number.
    """

    family = "ttt3r"
    parameters = ("query", "key", "value", "qpos", "kpos", "return_attn")

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        qpos: Tensor | None,
        kpos: Tensor | None,
        return_attn: bool = False,
    ):
        out, q, k = self.run(query, key, value, qpos, kpos)
        return (out, self.map(q, k)) if return_attn else out

    @staticmethod
    def exercise(call, sample: Sample):
        inputs = (sample.x, sample.y, sample.y, sample.positions, sample.pos_y if sample.has_rope else None)
        out, logits = call(*inputs, return_attn=True)
        return [out, logits, call(*inputs)]


class MaskedTtt3rCross(Ttt3rCross):
    """MeMix's ``cross_attn(..., return_attn=False, attn_mask=None)``: a mask ``[B, Nq, Nk]`` is added to the logits."""

    parameters = (*Ttt3rCross.parameters, "attn_mask")

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        qpos: Tensor | None,
        kpos: Tensor | None,
        return_attn: bool = False,
        attn_mask: Tensor | None = None,
    ):
        q, k, v = self.project_cross(query, key, value, qpos, kpos)
        if attn_mask is not None:
            attn_mask = (attn_mask[:, None] if attn_mask.dim() == 3 else attn_mask).to(q.dtype)
        out = self.output(self.masked(q, k, v, attn_mask))
        return (out, self.map(q, k, attn_mask)) if return_attn else out

    @staticmethod
    def exercise(call, sample: Sample):
        inputs = (sample.x, sample.y, sample.y, sample.positions, sample.pos_y if sample.has_rope else None)
        mask = torch.zeros(len(sample.x), sample.x.shape[1], sample.y.shape[1], device=sample.x.device)
        mask[:, 0, ::2] = -3.0
        out, logits = call(*inputs, return_attn=True, attn_mask=mask)
        return [out, logits, call(*inputs, attn_mask=mask), *Ttt3rCross.exercise(call, sample)]
