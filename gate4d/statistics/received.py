"""Attention received: mean and variance per key of the softmax probabilities, tile by tile from lse."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..checks import check_gate, check_over, check_pair, check_scale, check_visible, score_for
from ..gates import MotionGate
from ..kernels.received_attention import op
from ..kernels.received_attention.reference import received_attention as reference
from ..kernels.support import Backend, choose
from ..moments import Moments
from ..visibility import Visibility

_CHUNK = 1 << 22  # probabilities held at a time by the chunked fallback (16 MiB in fp32, a few such buffers)


@torch.no_grad()
def received_attention(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    lse: Tensor,  # [B, H, Nq]
    *,
    over: Collection[str] = ("heads", "queries"),
    gate: MotionGate | None = None,
    visible: Visibility | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Moments:
    """Mean and variance, per key, of the attention it receives, in memory linear in the number of tokens.

    ``p_ij = w_ij exp(s_ij - lse_i)`` is recomputed tile by tile and never stored; with the ``gate`` and ``visible``
    of the attention call that gave ``lse`` it is the weight that ``v_j`` had in ``out_i`` (before the gate's output
    scale), renormalised or not. This is the score by which key-dropping methods (H2O, SnapKV, FastV) rank keys.

    Args:
        q, k: ``[B, H, Nq, D]`` and ``[B, H, Nk, D]``, as given to the attention.
        lse: ``aux.lse`` of :func:`gate4d.gated_attention` on them, ``[B, H, Nq]``.
        over: ``("heads", "queries")``, or ``("queries",)`` for one statistic a head.
        gate, visible, scale: as in the attention call.
        backend: ``"auto"``, ``"cpu"`` (compiled), ``"triton"`` (CUDA; it has not run on a GPU yet), ``"chunked"``
            (torch operations in bounded memory, any device and dtype) or ``"reference"`` (materialises the map).

    Returns:
        :class:`Moments` ``[B, Nk]`` or ``[B, H, Nk]``, at least fp32. The count is that of **all** (head, query)
        pairs: a query that does not see a key, and a row without weight, count with probability 0. Not
        differentiable: it is a statistic, and gradients do not flow through it.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        NotImplementedError: ``"cpu"`` or ``"triton"`` cannot serve the call; the message says why.
    """
    check_pair(q, k)
    axes = check_over(over, ("heads", "queries"))
    if "queries" not in axes:
        raise ValueError(f"over must contain 'queries' (otherwise the result is the map itself), got {over!r}.")
    if not isinstance(lse, Tensor) or lse.shape != q.shape[:3] or lse.device != q.device:
        got = f"{list(lse.shape)} on {lse.device}" if isinstance(lse, Tensor) else type(lse).__name__
        raise ValueError(f"lse must have shape [B, H, Nq] = {list(q.shape[:3])} on {q.device}, got {got}.")
    g = gate or MotionGate()
    if gate is not None:
        check_gate(gate, (q.shape[0], q.shape[2]), (k.shape[0], k.shape[2]), q.device)
    bounds = None if visible is None else check_visible(visible, q, k)
    scale = max(q.shape[3], 1) ** -0.5 if scale is None else check_scale(scale)
    lse = lse.to(torch.promote_types(q.dtype, torch.float32))
    args = (q, k, lse, score_for(g.query_score, q.dtype), score_for(g.key_score, q.dtype), bounds, scale, g.strength)
    request = op.Request(q.device.type, q.dtype, q.shape[3], q.shape[2] > 0, q.device.index)
    if q.device.type != "cpu" and not torch.compiler.is_compiling():
        kind = "" if g.key_score is None else "keys" if g.query_score is None else "pairwise"
        request = request._replace(gate=kind, strength=g.strength if kind else 1.0, masked=bounds is not None)
    mean, m2 = choose(BACKENDS, AUTO_ORDER, backend, request).run(*args)
    moments = Moments(q.shape[2], mean, m2)
    if g.dropped_keys is not None:  # given lse, a dropped key concerns no other key
        mean, m2 = (x.masked_fill(g.dropped_keys[:, None], 0.0) for x in (moments.mean, moments.m2))
        moments = Moments(q.shape[2], mean, m2)
    return moments.pool(1) if "heads" in axes else moments


def _chunked(*args) -> tuple[Tensor, Tensor]:
    """The reference on one head and as many queries at a time as fit the budget, merged."""
    q, k, lse, query_score, key_score, bounds, *settings = args
    step = max(1, _CHUNK // max(k.shape[2], 1))

    def part(b: int, h: int, first: int) -> Moments:
        item, head, rows = slice(b, b + 1), slice(h, h + 1), slice(first, first + step)
        mean, m2 = reference(
            q[item, head, rows], k[item, head], lse[item, head, rows],
            None if query_score is None else query_score[item, rows],
            None if key_score is None else key_score[item],
            None if bounds is None else bounds[item if bounds.shape[0] > 1 else slice(None), :, rows],
            *settings,
        )  # fmt: skip
        return Moments(min(step, q.shape[2] - first), mean, m2)

    shape = (*q.shape[:2], k.shape[2])
    mean, m2 = (torch.zeros(shape, dtype=lse.dtype, device=q.device) for _ in range(2))
    for b in range(shape[0]):
        for h in range(shape[1]):
            head = part(b, h, 0)
            for first in range(step, q.shape[2], step):
                head = head.merge(part(b, h, first))
            mean[b, h], m2[b, h] = head.mean[0, 0], head.m2[0, 0]
    return mean, m2


BACKENDS = {**op.BACKENDS, "chunked": Backend("chunked", lambda r: [], _chunked)}
AUTO_ORDER = (*op.AUTO_ORDER, "chunked")
