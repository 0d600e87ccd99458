"""Moments of attention logits in closed form: no logit is ever computed."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..checks import check_over, check_pair, check_visible
from ..moments import Moments
from ..visibility import Visibility

AXES = ("heads", "queries", "keys")
# Each distinct interval and each run of keys between their ends needs one D x D matrix per head.
MAX_INTERVALS = 2048


def logit_moments(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    *,
    over: Collection[str],
    scale: float | None = None,
    visible: Visibility | None = None,
) -> Moments:
    """Mean and variance of the logits ``s_ij = scale * q_i . k_j`` over visible pairs, in ``O((Nq + Nk) D^2)``.

    Over keys the mean is ``scale q_i . kbar`` and the sum of squared deviations ``scale^2 q_i^T C q_i`` with
    ``C = sum_j (k_j - kbar)(k_j - kbar)^T``; over queries the roles change; the other axes pool these. Keys are
    centred before they are multiplied, and the quadratic form is evaluated in float64, where its cancellation for
    queries nearly orthogonal to the spread of the keys costs no digit of an fp32 result.

    Args:
        q, k: ``[B, H, Nq, D]`` and ``[B, H, Nk, D]``, one floating dtype, any strides.
        over: the axes to reduce, of ``"keys"``, ``"queries"`` and ``"heads"``; at least one of the first two.
            Layers: merge the results.
        scale: ``D ** -0.5`` if None.
        visible: only pairs it allows are counted; at most 2048 distinct intervals (frames give one each).

    Returns:
        :class:`Moments` in fp32 (float64 for float64 inputs) with the reduced axes dropped: ``[B, H, Nq]`` for
        ``over=("keys",)``, ``[B, Nk]`` for ``("heads", "queries")``, ``[B]`` for all three. Entries with nothing
        visible have count, mean and m2 of 0. Differentiable.

    Raises:
        ValueError: ``over`` has no closed form or names an unknown axis, or a shape does not fit.
        NotImplementedError: ``visible`` has too many distinct intervals for the closed form.
    """
    check_pair(q, k)
    axes = check_over(over, AXES)
    if not axes & {"keys", "queries"}:
        raise ValueError(
            f"over={sorted(axes)} leaves one value for each (query, key) pair, which is the map itself; "
            "add 'keys' or 'queries'."
        )
    scale = max(q.shape[3], 1) ** -0.5 if scale is None else float(scale)
    bounds = None if visible is None else check_visible(visible, q, k)
    if not (q.shape[2] and k.shape[2]):
        bounds = None  # checked, and without a pair there is nothing that it could hide
    flip = "keys" not in axes
    if bounds is None:
        moments = _row_moments(*((k, q) if flip else (q, k)), None, scale)
    else:
        items = [slice(None)] if len(bounds) == 1 else [slice(b, b + 1) for b in range(len(q))]
        parts = [
            _row_moments(*((k[i], q[i]) if flip else (q[i], k[i])), _Incidence(rows, k.shape[2], flip), scale)
            for rows, i in zip(bounds, items, strict=True)
        ]
        moments = Moments(*(torch.cat([getattr(p, name) for p in parts]) for name in ("count", "mean", "m2")))
    pooled = [1] * ("heads" in axes) + [2] * ({"keys", "queries"} <= axes)
    # Pooled in float64 too: the spread between heads or queries may be small against their means.
    return moments.pool(pooled).to(torch.promote_types(q.dtype, torch.float32))


def mean_logits(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    *,
    over: Collection[str],
    scale: float | None = None,
) -> Tensor:
    """The mean of :func:`logit_moments` alone, of all pairs, in ``O((Nq + Nk) D)`` and at least fp32.

    Strided q and k are read in place; where they have 16 bits, the one that is not averaged is copied to fp32.
    """
    check_pair(q, k)
    axes = check_over(over, AXES)
    scale = max(q.shape[3], 1) ** -0.5 if scale is None else float(scale)
    work = torch.promote_types(q.dtype, torch.float32)
    if "keys" not in axes:
        q, k = k, q
    mean = scale * k.mean(2, dtype=work)  # [B, H, D]
    if {"keys", "queries"} <= axes:
        logits = (q.mean(2, dtype=work) * mean).sum(-1)  # [B, H]
    else:
        logits = torch.einsum("bhnd,bhd->bhn", q.to(work), mean)  # reads a strided q in place, as @ does not
    return logits.mean(1) if "heads" in axes else logits


class _Incidence:
    """Which groups of rows see which groups of columns: both axes cut where visibility changes.

    Queries with equal intervals form a group; the ends of all intervals cut the keys into segments. ``flip`` exchanges
    rows and columns.
    """

    def __init__(self, bounds: Tensor, num_keys: int, flip: bool):  # bounds [3, Nq]
        start, end, sink = bounds.long().clamp(max=num_keys)
        start = torch.maximum(start, sink)  # what the sinks show already is not counted twice
        empty = end <= start
        rows = torch.stack((start.masked_fill(empty, 0), end.masked_fill(empty, 0), sink))
        intervals, query_group = torch.unique(rows, dim=1, return_inverse=True)  # [3, U], [Nq]
        edges = torch.unique(torch.cat((intervals.flatten(), intervals.new_tensor([0, num_keys]))))
        if max(intervals.shape[1], len(edges) - 1) > MAX_INTERVALS:
            raise NotImplementedError(
                f"visible has {intervals.shape[1]} distinct intervals with {len(edges)} ends; the closed form keeps a "
                f"D x D matrix for each and serves up to {MAX_INTERVALS}. Use intervals that change by frame."
            )
        left = edges[:-1]
        start, end, sink = intervals[..., None]
        seen = (left < sink) | ((left >= start) & (left < end))  # [U, S]
        tokens = torch.arange(num_keys, device=bounds.device)
        key_group = torch.bucketize(tokens, edges, right=True) - 1
        self.rows, self.columns, self.seen = query_group, key_group, seen
        if flip:
            self.rows, self.columns, self.seen = key_group, query_group, seen.T


def _row_moments(
    x: Tensor,  # [B, H, Nx, D], one result for each
    y: Tensor,  # [B, H, Ny, D], reduced over
    incidence: _Incidence | None,
    scale: float,
) -> Moments:  # float64 [B, H, Nx]
    """Head by head, so that the float64 copies stay small."""
    if incidence is None:
        heads = [_head_full(x[:, h].double(), y[:, h].double()) for h in range(x.shape[1])]
        count = torch.tensor(y.shape[2])
    else:
        heads = [_head_grouped(x[:, h].double(), y[:, h].double(), incidence) for h in range(x.shape[1])]
        sizes = torch.bincount(incidence.columns, minlength=incidence.seen.shape[1])
        count = (incidence.seen * sizes).sum(1)[incidence.rows]
    if not heads:
        return Moments.empty(x.shape[:3], torch.float64, x.device)
    mean, m2 = (torch.stack(values, dim=1) for values in zip(*heads, strict=True))
    return Moments(count.to(x.device), scale * mean, scale**2 * m2.clamp_min(0))


def _head_full(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # [B, Nx, D], [B, Ny, D]
    centre = y.mean(1, keepdim=True) if y.shape[1] else y.new_zeros(y.shape[0], 1, y.shape[2])
    y = y - centre
    return (x * centre).sum(-1), _quadratic(x, y.mT @ y)


def _head_grouped(x: Tensor, y: Tensor, incidence: _Incidence) -> tuple[Tensor, Tensor]:
    centre = y.mean(1, keepdim=True) if y.shape[1] else y.new_zeros(y.shape[0], 1, y.shape[2])
    y = y - centre
    members = _groups(incidence.columns, incidence.seen.shape[1])
    size = torch.tensor([len(i) for i in members], dtype=y.dtype, device=y.device)  # [S]
    total = torch.stack([y[:, i].sum(1) for i in members], dim=1)  # [B, S, D]
    gram = torch.stack([y[:, i].mT @ y[:, i] for i in members], dim=1)  # [B, S, D, D]

    seen = incidence.seen.to(y.dtype)  # [U, S]
    count = (seen @ size).clamp_min(1)[:, None]  # [U, 1]
    offset = (seen @ total) / count  # [B, U, D], the group's mean key about the centre
    gram = (seen @ gram.flatten(2)).unflatten(2, gram.shape[2:])
    spread = gram - count[..., None] * offset[..., :, None] * offset[..., None, :]
    alive = incidence.seen.any(1)
    mean, m2 = x.new_zeros(x.shape[:2]), x.new_zeros(x.shape[:2])
    for u, rows in enumerate(_groups(incidence.rows, incidence.seen.shape[0])):
        if len(rows) and alive[u]:
            mean = mean.index_copy(1, rows, (x[:, rows] * (centre + offset[:, u, None])).sum(-1))
            m2 = m2.index_copy(1, rows, _quadratic(x[:, rows], spread[:, u]))
    return mean, m2


def _groups(group: Tensor, count: int) -> list[Tensor]:
    """The indices of each group."""
    sizes = torch.bincount(group, minlength=count).tolist()
    return list(torch.argsort(group, stable=True).split(sizes))


def _quadratic(x: Tensor, matrix: Tensor) -> Tensor:  # [B, N, D], [B, D, D] -> [B, N]
    return ((x @ matrix) * x).sum(-1)
