"""Recognises dense attention masks that are intervals, so that a visibility can take their place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..visibility import Visibility


def recognise(mask: Tensor, queries: int, keys: int) -> Visibility | None:
    """The visibility that a dense mask describes; None if it describes something else.

    Recognised are masks that are the same for every query of a frame, frames of equal size, whose visible keys
    are an interval and a prefix: frame-causal masks, with a window, with anchors. Every entry is compared.

    Args:
        mask: bool (True = visible) or additive (0, and ``-inf`` or the smallest number of its dtype),
            ``[Nq, Nk]``, or of axes that broadcast to it. One with several batch items or heads is not recognised.

    Raises:
        ValueError: the mask does not have the size of this attention, as with a wrong number of frames.
    """
    if mask.dim() < 2:
        return None
    if any(size not in (1, wanted) for size, wanted in zip(mask.shape[-2:], (queries, keys), strict=True)):
        raise ValueError(
            f"attn_mask must have shape [{queries}, {keys}] (queries, keys), got {list(mask.shape)}: "
            "it describes another number of frames or tokens."
        )
    if mask.shape[:-2].numel() != 1 or not queries or not keys:
        return None
    mask = mask.reshape(mask.shape[-2:]).expand(queries, keys)
    frame = int(_visible(mask[:1]).sum())
    if not frame or queries % frame:
        return None
    rows = mask[::frame]  # one row stands for its frame
    visible = _visible(rows)
    if mask.dtype != torch.bool and not bool((visible | (rows <= torch.finfo(mask.dtype).min)).all()):
        return None
    bounds = [_interval(row) for row in visible.cpu()]
    if None in bounds:
        return None
    same = [(mask[t * frame : (t + 1) * frame] == rows[t]).all() for t in range(rows.shape[0])]
    if not bool(torch.stack(same).all()):
        return None
    start, end, sink = torch.tensor(bounds).repeat_interleave(frame, dim=0).T
    return Visibility.intervals(start, end, sink)


def _visible(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.bool else rows == 0


def _interval(row: Tensor) -> tuple[int, int, int] | None:
    """``(start, end, sink_end)`` of a bool row, None if it is more than a prefix and an interval."""
    edges = torch.nn.functional.pad(row.int(), (1, 1)).diff()
    starts, ends = edges.eq(1).nonzero()[:, 0].tolist(), edges.eq(-1).nonzero()[:, 0].tolist()
    if len(starts) == 1:
        return starts[0], ends[0], 0
    if len(starts) == 2 and starts[0] == 0:
        return starts[1], ends[1], ends[0]
    return None
