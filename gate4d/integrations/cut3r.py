"""TTT3R's fork of CUT3R. Plain CUT3R has CroCo's conventions; its encoder's cast to float16 is found by exercise."""

from __future__ import annotations

from torch import Tensor

from .base import Sample
from .croco import CrocoCross, CrocoSelf, mean_over_keys


class Ttt3rSelf(CrocoSelf):
    """``attn(x, xpos, return_attn=False)``; with ``return_attn`` also the mean over keys of the logits.

    The statistic has shape ``[B, H, N, 1]`` where upstream returns all logits ``[B, H, N, N]``.
    """

    family = "ttt3r"
    parameters = ("x", "xpos", "return_attn")

    def __call__(self, x: Tensor, xpos: Tensor | None, return_attn: bool = False):
        out, q, k = self.run(x, xpos)
        return (out, mean_over_keys(q, k, self.scale)) if return_attn else out

    @staticmethod
    def exercise(call, sample: Sample):
        out, logits = call(sample.x, sample.positions, return_attn=True)
        return [out, logits.mean(-1, keepdim=True), call(sample.x, sample.positions)]


class Ttt3rCross(CrocoCross):
    """``cross_attn(query, key, value, qpos, kpos, return_attn=False)``.

    TTT3R takes the mean of the state's cross-attention logits over image tokens (the pose token included), heads
    and layers as the learning rate of a state token. With ``return_attn`` the second result is already averaged
    over keys, ``[B, H, Nq, 1]``, and upstream's rearrangement and mean over the rest give the same number.
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
        return (out, mean_over_keys(q, k, self.scale)) if return_attn else out

    @staticmethod
    def exercise(call, sample: Sample):
        inputs = (sample.x, sample.y, sample.y, sample.positions, sample.pos_y if sample.has_rope else None)
        out, logits = call(*inputs, return_attn=True)
        return [out, logits.mean(-1, keepdim=True), call(*inputs)]
