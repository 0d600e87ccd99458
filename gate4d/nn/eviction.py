"""Which tokens leave a cache that has a budget: the rules of published systems, and how layers share a budget.

Of Evict3R no code was read: its score is restated from the paper's description. How it divides a budget among layers is
not here; nor is OVGGT's rule, which needs the output of the block's MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Candidates(NamedTuple):
    """The tokens that may leave, oldest first, and what is known of them.

    Attributes:
        k, v: ``[B, H, n, D]`` and ``[B, H, n, Dv]`` as stored.
        q: ``[B, H, Nq, D]``, the queries of the newest frame.
        received: ``[B, n]`` fp32, attention received, the mean over the frames that saw the token, in units of an equal
            share; None unless the policy asks for it.
        tokens_per_frame: P.
    """

    k: Tensor
    v: Tensor
    q: Tensor
    received: Tensor | None
    tokens_per_frame: int


Score = Callable[[Candidates], Tensor]


@dataclass(frozen=True)
class Policy:
    """How a :class:`gate4d.nn.TokenKVCache` chooses.

    Attributes:
        score: :class:`Candidates` to ``[B, H, n]``, where every head keeps tokens of its own, or ``[B, 1, n]``; those
            with the largest stay.
        anchors: leading frames that never leave, unless the cache is told otherwise.
        before: the newest frame's queries look at what is left, its own tokens included; else at everything, and tokens
            leave afterwards.
        newest: whether the newest frame stays.
        received: whether the score needs attention received, which costs about half of an attention call.
        whole_frames: whether all tokens of a frame leave together.
        by_diversity: whether layers whose keys differ more get more of the budget; see :class:`LayerBudgets`.
    """

    score: Score
    anchors: int = 1
    before: bool = False
    newest: bool = False
    received: bool = False
    whole_frames: bool = False
    by_diversity: bool = False


def similarity_to_mean(k: Tensor) -> Tensor:
    """Inner product of each normalised key with their mean, ``[B, H, n]`` of ``k [B, H, n, D]``, in the dtype of k."""
    k = F.normalize(k, dim=-1)
    return (k * k.mean(2, keepdim=True)).sum(-1)


def diversity(c: Candidates) -> Tensor:
    """InfiniteVGGT (its ``Attention.eviction``): keys that are least like the mean key stay, head by head."""
    return -similarity_to_mean(c.k)


def pooled_query(c: Candidates, special: int = 5, pool: int = 16) -> Tensor:
    """XStreamVGGT (its ``_prune_fast_vggt_protected``): logits, averaged over heads, of queries pooled by 16.

    The five special tokens count as a pool each, and so does what is left over. The mean over pools of a product is the
    product with the mean pool, so that one vector stands for all of them.
    """
    q = c.q
    rest = q[:, :, special:]
    whole = rest.shape[2] // pool * pool
    if rest.shape[2] > 1:
        pools = rest[:, :, :whole].unflatten(2, (whole // pool, pool)).mean(3)
        over = [rest[:, :, whole:].mean(2, keepdim=True)] if rest.shape[2] > whole else []
        q = torch.cat([q[:, :, :special], pools, *over], 2)
    return (c.k.mean(1) @ q.mean(1).mean(1)[..., None]).mT


def attention_received(c: Candidates) -> Tensor:
    """Evict3R (arXiv 2509.17650): attention received so far, made comparable over rows of different length and tokens
    that different numbers of frames have seen; the mean over heads, so that all heads keep the same tokens."""
    assert c.received is not None
    return c.received[:, None]


def recency(c: Candidates) -> Tensor:
    """The newest tokens stay: a sliding window."""
    return torch.arange(c.k.shape[2], device=c.k.device).expand(c.k.shape[0], 1, -1)


def frame_received(c: Candidates) -> Tensor:
    """Attention received by a frame, the mean over its tokens."""
    assert c.received is not None
    frames = c.received.unflatten(1, (-1, c.tokens_per_frame)).mean(2)
    return frames.repeat_interleave(c.tokens_per_frame, 1)[:, None]


POLICIES = {
    "infinite": Policy(diversity, before=True, by_diversity=True),
    "xstream": Policy(pooled_query, newest=True),
    "evict3r": Policy(attention_received, received=True),
    "frame": Policy(frame_received, newest=True, received=True, whole_frames=True),
    "window": Policy(recency, anchors=0),
}


def policy_of(policy: str | Policy | Score) -> Policy:
    """The policy of a name, or of a score of one's own.

    Raises:
        ValueError: there is no policy of that name.
        TypeError: it is neither a name nor callable.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {sorted(POLICIES)} or a function, got {policy!r}.")
        return POLICIES[policy]
    if not callable(policy):
        raise TypeError(f"policy must be one of {sorted(POLICIES)} or a function, got {type(policy).__name__}.")
    return Policy(policy)


class LayerBudgets:
    """A budget that the caches of a model's layers share: as much each, or more where keys differ more.

    InfiniteVGGT (its ``_calculate_dynamic_budgets``): shares are the softmax over layers of ``2 (1 - s)``, where s is a
    layer's mean similarity of keys to their mean at the last frame at which tokens left, 0 before.

    Args:
        budget: tokens a head, on average over the layers.
        by_diversity: False for the same budget in each layer.
    """

    def __init__(self, budget: int, *, by_diversity: bool = False):
        self.budget = budget
        self.by_diversity = by_diversity
        self._similarity: list[Tensor] = []
        self._shares: list[int] = []
        self._last = -1  # who asked last

    def join(self) -> int:
        """A new layer's number."""
        self._similarity.append(torch.zeros(()))
        self._shares = []
        return len(self._similarity) - 1

    def of(self, layer: int) -> int:
        """The layer's budget in tokens. Layers ask in their order, and those of one frame get shares of one moment."""
        if not self.by_diversity:
            return self.budget
        if layer <= self._last or not self._shares:
            device = self._similarity[0].device
            known = torch.stack([s.to(device) for s in self._similarity]).cpu()
            total = self.budget * len(self._similarity)
            self._shares = (torch.softmax((1.0 - known) / 0.5, 0) * total).int().tolist()
        self._last = layer
        return self._shares[layer]

    def note(self, layer: int, similarity: Tensor) -> None:
        """The mean similarity of a layer's keys, a scalar that stays on its device until shares are made."""
        self._similarity[layer] = similarity.float()
