"""TTT3R's state confidence and MUT3R's motion score."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_pair
from ..functional import gated_attention
from .logits import mean_logits
from .received import received_attention

CUES = ("logit_mean", "received", "entropy")


def state_confidence(
    q: Tensor | Sequence[Tensor],  # [B, H, S, D], or one a layer
    k: Tensor | Sequence[Tensor],  # [B, H, M, D], or one a layer
    *,
    scale: float | None = None,
) -> Tensor:
    """TTT3R's update rate of every state token: ``beta = sigmoid(mean over image keys, heads, layers of s)``.

    The logits ``s = scale * q . k`` are those of the state-to-image cross-attention, all image tokens counted, the
    pose token included. The mean is ``q . mean(k)``: the cost is that of reading q and k once. The new state is
    ``beta * S_new + (1 - beta) * S_old``; on the first frame and after a reset beta is 1.

    Args:
        q: state queries ``[B, H, S, D]``, or a sequence over layers.
        k: image keys ``[B, H, M, D]``, likewise.
        scale: ``D ** -0.5`` if None.

    Returns:
        beta ``[B, S]`` in (0, 1), at least fp32, one set an item of the batch. Differentiable.
    """
    pairs = _layers(q, k)
    logits = [mean_logits(a, b, over=("heads", "keys"), scale=scale) for a, b in pairs]
    return torch.stack(logits).mean(0).sigmoid()


def motion_cue(
    q: Tensor | Sequence[Tensor],  # [B, H, N, D], or one a layer
    k: Tensor | Sequence[Tensor],  # [B, H, N, D], or one a layer
    *,
    cue: str = "logit_mean",
    layers: Sequence[int] | None = None,
    lse: Tensor | Sequence[Tensor] | None = None,
    temperature: float = 1.0,
    scale: float | None = None,
) -> Tensor:
    """MUT3R's motion score of image tokens from decoder self-attention: dynamic tokens attend and are attended weakly.

    The cue is averaged over heads and layers, standardised over the tokens of an item (biased deviation, eps 1e-6),
    turned so that dynamic is high, divided by the temperature and passed through a sigmoid. The paper leaves cue and
    normalisation open (no code is public); the cues are

    - ``"logit_mean"`` (default): the mean over keys of the logits of the token's query, low = dynamic; closed form.
    - ``"received"``: the mean over queries of the probability the token's key receives, low = dynamic.
    - ``"entropy"``: the entropy of the token's attention row, high (dispersed) = dynamic.

    Args:
        q, k: self-attention features ``[B, H, N, D]`` after RoPE, or a sequence over layers.
        cue: one of the three.
        layers: indices into the sequence to use; None for all.
        lse: for ``"received"``, ``aux.lse`` of the attention, one a layer; computed (one more attention pass a layer)
            if None.
        temperature: > 0; larger is softer.
        scale: ``D ** -0.5`` if None.

    Returns:
        score ``[B, N]`` in (0, 1), 1 = dynamic, at least fp32. Differentiable for the logit mean only.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    if cue not in CUES:
        raise ValueError(f"cue must be one of {list(CUES)}, got {cue!r}.")
    if not (isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature!r}.")
    pairs = _layers(q, k)
    lses = [lse] * len(pairs) if lse is None or isinstance(lse, Tensor) else list(lse)
    if len(lses) != len(pairs) or (isinstance(lse, Tensor) and len(pairs) > 1):
        raise ValueError(f"lse must hold one tensor a layer ({len(pairs)}), got {len(lses)}.")
    chosen = range(len(pairs)) if layers is None else layers
    wrong = [n for n in chosen if not 0 <= n < len(pairs)]
    if wrong or not len(chosen):
        raise ValueError(f"layers must be indices in [0, {len(pairs)}), at least one, got {list(chosen)}.")
    raw = torch.stack([raw_cue(*pairs[n], cue, lses[n], scale) for n in chosen]).mean(0)  # [B, N]
    return standardised(raw if cue == "entropy" else -raw, temperature)


def standardised(raw: Tensor, temperature: float = 1.0) -> Tensor:  # [B, N]
    """``sigmoid((x - mean) / (std + 1e-6) / temperature)`` over the tokens of each item."""
    centred = raw - raw.mean(-1, keepdim=True)
    return (centred / (centred.square().mean(-1, keepdim=True).sqrt() + 1e-6) / temperature).sigmoid()


def raw_cue(q: Tensor, k: Tensor, cue: str, lse: Tensor | None, scale: float | None) -> Tensor:
    """The cue ``[B, N]`` of one layer, averaged over heads, before it is turned and normalised."""
    if cue == "logit_mean":
        return mean_logits(q, k, over=("heads", "keys"), scale=scale)
    check_pair(q, k)
    if cue == "entropy":
        narrow = k[..., :1]  # the values do not matter; one column keeps the pass cheap
        _, aux = gated_attention(q, k, narrow, scale=scale, row_stats=("entropy",), return_aux=True)
        assert aux.entropy is not None, "asked for"
        return aux.entropy.mean(1)
    if lse is None:
        lse = gated_attention(q, k, k[..., :1], scale=scale, return_aux=True)[1].lse
    return received_attention(q, k, lse, scale=scale).mean


def _layers(q: Tensor | Sequence[Tensor], k: Tensor | Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    qs, ks = ([x] if isinstance(x, Tensor) else list(x) for x in (q, k))
    if not qs or len(qs) != len(ks):
        raise ValueError(f"q and k must hold as many layers as each other and at least one, got {len(qs)}, {len(ks)}.")
    return list(zip(qs, ks, strict=True))
