"""CroCo and its descendants: DUSt3R, MASt3R, MonST3R, Easi3R; CUT3R and TTT3R build on it in ``cut3r.py``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..gates import MotionGate
from ..statistics.logits import mean_logits
from .base import PatchedAttention, Sample


def mean_over_keys(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``mean_j scale q_i . k_j``, ``[B, H, Nq, 1]`` in q's dtype, without a gradient."""
    return mean_logits(q.detach(), k.detach(), over=("keys",), scale=scale)[..., None].to(q.dtype)


def mean_over_queries(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``mean_i scale q_i . k_j``, ``[B, H, 1, Nk]`` in q's dtype, without a gradient."""
    return mean_logits(q.detach(), k.detach(), over=("queries",), scale=scale)[:, :, None].to(q.dtype)


class CrocoSelf(PatchedAttention):
    """``attn(x, xpos)`` of encoders and decoders, ``[B, N, C]`` to ``[B, N, C]``."""

    family = "croco"
    parameters = ("x", "xpos")
    returns_qk = True

    def __call__(self, x: Tensor, xpos: Tensor | None) -> Tensor:
        return self.run(x, xpos)[0]

    def run(self, x: Tensor, xpos: Tensor | None, gate: MotionGate | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.project(x, xpos)
        return self.output(self.attend(q, k, v, scale=self.scale, gate=gate)), q, k

    @staticmethod
    def exercise(call, sample: Sample):
        return [call(sample.x, sample.positions)]


class CrocoCross(PatchedAttention):
    """``cross_attn(query, key, value, qpos, kpos)`` of decoders."""

    family = "croco"
    kind = "cross"
    parameters = ("query", "key", "value", "qpos", "kpos")

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, qpos: Tensor | None, kpos: Tensor | None) -> Tensor:
        return self.run(query, key, value, qpos, kpos)[0]

    def run(self, query, key, value, qpos, kpos, gate: MotionGate | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.project_cross(query, key, value, qpos, kpos)
        return self.output(self.attend(q, k, v, scale=self.scale, gate=gate)), q, k

    @staticmethod
    def exercise(call, sample: Sample):
        kpos = sample.pos_y if sample.has_rope else None
        return [call(sample.x, sample.y, sample.y, sample.positions, kpos)]


class Easi3rSelf(CrocoSelf):
    """Easi3R's self-attention: a mask gates static queries off dynamic keys after the softmax.

    With ``return_attn`` the second result is the mean over queries of the logits, ``[B, H, 1, N]``, where upstream
    returns all of them ``[B, H, N, N]`` and never reads them.
    """

    family = "easi3r"
    parameters = ("x", "xpos", "xmask", "return_attn")

    def __call__(self, x: Tensor, xpos: Tensor | None, xmask: Tensor | None = None, return_attn: bool = False):
        gate = None if xmask is None else _static_to_dynamic(xmask, xmask, x.shape[1], x.shape[1])
        out, q, k = self.run(x, xpos, gate)
        return (out, mean_over_queries(q, k, self.scale)) if return_attn else out

    @staticmethod
    def exercise(call, sample: Sample):
        mask = _mask_like(sample.x)
        out, logits = call(sample.x, sample.positions, xmask=mask, return_attn=True)
        return [out, logits.mean(2, keepdim=True), call(sample.x, sample.positions)]


class Easi3rCross(CrocoCross):
    """Easi3R's cross-attention: returns ``(x, mean over queries of the logits [B, H, 1, Nk])``, always a pair.

    Upstream returns all logits ``[B, H, Nq, Nk]``, of which ``_get_attn_k`` reads that mean: see :class:`Easi3rMaps`.
    """

    family = "easi3r"
    parameters = ("query", "key", "value", "qpos", "kpos", "qmask", "kmask")

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        qpos: Tensor | None,
        kpos: Tensor | None,
        qmask: Tensor | None = None,
        kmask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        gate = None
        if qmask is not None and kmask is not None:
            gate = _static_to_dynamic(qmask, kmask, query.shape[1], key.shape[1])
        out, q, k = self.run(query, key, value, qpos, kpos, gate)
        return out, mean_over_queries(q, k, self.scale)

    @staticmethod
    def exercise(call, sample: Sample):
        positions = (sample.positions, sample.pos_y if sample.has_rope else None)
        plain, logits = call(sample.x, sample.y, sample.y, *positions)
        masks = {"qmask": _mask_like(sample.x), "kmask": _mask_like(sample.y)}
        masked, _ = call(sample.x, sample.y, sample.y, *positions, **masks)
        return [plain, logits.mean(2, keepdim=True), masked]


class Easi3rMaps:
    """Replaces ``model._get_attn_k``: arranges reduced logits as upstream arranges what it reduces from all of them.

    ``attn [L * B, H, 1, Nk]``, layers concatenated along the batch, to ``[B, rows, columns, L * H]`` with the channel
    ``layer * H + head``. For a batch of one this is upstream's result; upstream mixes up the items of larger batches.
    """

    attribute = "_get_attn_k"
    parameters = ("attn", "shape")
    families = ("easi3r",)
    required = True

    def __init__(self, owner: nn.Module | None):
        self.owner = owner

    def __call__(self, attn: Tensor, shape: Tensor) -> Tensor:
        batch = shape.shape[0]
        height, width = shape[0].cpu().tolist()
        maps = attn.mean(2).unflatten(0, (-1, batch))  # [L, B, H, Nk]
        maps = maps.permute(1, 3, 0, 2).flatten(2)  # [B, Nk, L * H]
        return maps.unflatten(1, (height // 16, width // 16))

    @classmethod
    def differs(cls, owner: nn.Module) -> str | None:
        """None if the method of ``owner``'s class reduces full maps to what this makes of their mean, else why not."""
        logits = torch.randn((12, 12, 6, 6), generator=torch.Generator().manual_seed(0), device="cpu")  # layers, heads
        shape = torch.tensor([[32, 48]])
        theirs = type(owner)._get_attn_k(owner, logits, shape)
        ours = cls(None)(logits.mean(2, keepdim=True), shape)
        same = theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-5)
        return None if same else "it does not take the mean over queries, layer by layer and head by head"


def _static_to_dynamic(qmask: Tensor, kmask: Tensor, queries: int, keys: int) -> MotionGate:
    """Masks ``[B, N, 1]``, dynamic above one half, to Easi3R's gate (probabilities zeroed, rows not divided again)."""
    for name, mask, count in (("query mask", qmask, queries), ("key mask", kmask, keys)):
        if mask.dim() != 3 or mask.shape[1:] != (count, 1):
            raise ValueError(f"the {name} must have shape [B, {count}, 1], got {list(mask.shape)}.")
    # Upstream compares queries with < 0.5 and keys with > 0.5: at exactly 0.5 neither side takes part.
    return MotionGate.static_to_dynamic(~(qmask[..., 0] < 0.5), kmask[..., 0] > 0.5)


def _mask_like(x: Tensor) -> Tensor:
    mask = (x[..., :1].float() > 0).float()
    mask[:, 1] = 0.5
    return mask
