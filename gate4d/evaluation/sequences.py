"""The measures of a data set's protocol: of each sequence as plain data, and of all of them as one row."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data.datasets import Protocol, Sequence
from .cameras import camera_errors
from .depth import DepthErrors, depth_errors, mean_depth_errors
from .masks import frame_boundaries, frame_ious, scores_of_frames
from .predict import Said

_CAMERAS = ("ate", "rpe_translation", "rpe_rotation")


def measure_sequence(
    sequence: Sequence, said: Said, protocol: Protocol, *, skip_degenerate: bool = True
) -> dict[str, Any]:
    """What was said against the ground truth, as plain data: ``cameras``, ``depth`` by alignment, J and F of ``masks``.

    A measure is None where the sequence has no ground truth, or nothing was said. Depth is scaled to the true maps'
    size by cubic, masks by nearest interpolation; frames without a true pose, map or mask do not count.

    Args:
        skip_degenerate: cameras are None where :func:`~gate4d.evaluation.is_degenerate`, as the field skips them.

    Raises:
        ValueError: what was said does not fit the sequence or is not finite; names the sequence.
    """
    row: dict[str, Any] = {"sequence": sequence.name, "frames": len(sequence)}
    try:
        for measure in protocol.measures:
            x = {"cameras": said.poses, "depth": said.depth, "masks": said.masks}[measure]
            row[measure] = None
            if x is None or not sequence.has(measure):
                continue
            if len(x) != len(sequence):
                raise ValueError(f"{measure} of {len(x)} frames were predicted, there are {len(sequence)}.")
            if measure == "cameras":
                row[measure] = _cameras(sequence, x, skip_degenerate)
            else:
                row[measure] = _depth(sequence, x, protocol) if measure == "depth" else _masks(sequence, x)
    except ValueError as e:
        raise ValueError(f"sequence {sequence.name}: {e}") from None
    return row


def summary(rows: Rows[dict[str, Any]], protocol: Protocol) -> dict[str, Any]:
    """One row of all sequences; a measure that no sequence has is None.

    Cameras: means over the sequences. Depth: means weighted by valid pixels. Masks: both averages of
    :class:`~gate4d.evaluation.VideoScores`. ``counted`` says of how many sequences each is.
    """
    known = {m: [row[m] for row in rows if row.get(m) is not None] for m in protocol.measures}
    result: dict[str, Any] = {"counted": {m: len(x) for m, x in known.items()}}
    for measure, found in known.items():
        if not found:
            result[measure] = None
        elif measure == "cameras":
            result[measure] = {n: float(np.mean([x[n] for x in found])) for n in _CAMERAS}
        elif measure == "depth":
            result[measure] = {
                align: mean_depth_errors([DepthErrors(**x[align]) for x in found])._asdict()
                | ({} if len(found) == 1 else {"scale": None, "shift": None})
                for align in protocol.alignments
            }
        else:
            result[measure] = scores_of_frames(
                [np.array(x["j"]) for x in found], [np.array(x["f"]) for x in found]
            )._asdict()
    return result


def _cameras(sequence: Sequence, poses: np.ndarray, skip_degenerate: bool) -> dict[str, float] | None:
    true = np.asarray(sequence.poses)
    known = np.isfinite(true).all((1, 2))
    if known.sum() < 2:
        return None
    errors = camera_errors(poses[known], true[known], skip_degenerate=skip_degenerate)
    return None if np.isnan(errors.ate) else errors._asdict() | {"poses": int(known.sum())}


def _depth(sequence: Sequence, maps: list[np.ndarray], protocol: Protocol) -> dict[str, Any] | None:
    """Valid pixels alone are kept, frame by frame: of laser scans they are few."""
    predicted, true = [], []
    for n, said in enumerate(maps):
        depth = sequence.depth(n)
        if depth is None:
            continue
        valid = (depth > 0) & np.isfinite(depth)
        predicted.append(_scaled(said, depth.shape, "bicubic")[valid])
        true.append(depth[valid])
    if not true or not sum(x.size for x in true):
        return None
    p, q = np.concatenate(predicted), np.concatenate(true)
    limits = {"max_depth": protocol.max_depth, "clip_max": protocol.clip_max}
    return {align: depth_errors(p, q, align=align, **limits)._asdict() for align in protocol.alignments}  # type: ignore[arg-type]


def _masks(sequence: Sequence, masks: list[np.ndarray]) -> dict[str, list[float]] | None:
    pairs = [(said, true) for n, said in enumerate(masks) if (true := sequence.mask(n)) is not None]
    j, f = [], []
    for said, true in pairs:
        mask = _scaled(said.astype(np.float64), true.shape, "nearest-exact")[None] > 0.5
        j.append(float(frame_ious(mask, true[None])[0]))
        f.append(float(frame_boundaries(mask, true[None])[0]))
    return {"j": j, "f": f} if pairs else None


def _scaled(x: np.ndarray, size: tuple[int, ...], mode: str) -> np.ndarray:
    if x.shape == size:
        return x
    found = torch.from_numpy(np.ascontiguousarray(x, np.float64))[None, None]
    return F.interpolate(found, size=size, mode=mode)[0, 0].numpy()
