"""``gate4d bench sequences``: whole backbones over a growing number of frames, every implementation until it stops."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ..check import WrongResult
from ..measure import processes
from ..measure.curves import Study
from ..measure.processes import Contestant, Limits
from ..report import plots
from ..rows.target import one_line
from . import backbones, predictions
from .contestants import SEQUENCES, Sequence, case_of
from .counted import memory_model


def measure(sequence: Sequence, counts: tuple[int, ...], limits: Limits, progress: processes.Progress) -> Study:
    """Run a backbone; the outputs at the first count are compared with float64 before anything is timed further.

    Raises:
        WrongResult: a contestant computes something else.
    """
    contestants = [
        Contestant(
            name, f"{backbones.__name__}:setup",
            {"backbone": sequence.name, "frames": counts[-1], **case_of(name)}, _group(name),
        )
        for name in sequence.contestants
    ]  # fmt: skip
    verify = functools.partial(_verify, sequence.name, counts)
    return processes.measure(contestants, counts, limits, progress, verify)


def _group(contestant: str) -> str:
    case = case_of(contestant)
    return f"{'gated' if case['gated'] else 'plain'}, {case['window']}"


def _verify(backbone: str, counts: tuple[int, ...], frames: int, outputs: processes.Outputs) -> None:
    """At the first count against the maps in float64, which may be missed by twice what the maps in float32 miss it by
    and by rounding steps that add up like a random walk; then against each other, to half of the digits."""
    truths: dict[str, tuple[np.ndarray, float]] = {}
    eps = torch.finfo(torch.float32).eps
    for name, out in outputs.items():
        group = _group(name)
        if frames != counts[0]:
            first = next(o for n, o in outputs.items() if _group(n) == group)
            if (off := processes.relative_difference(out, first)) > math.sqrt(eps):
                raise WrongResult(
                    f"{backbone}, {name}: outputs at {frames} frames differ by {off:.1e} from the others."
                )
            continue
        if group not in truths:
            case = case_of(name)
            exact, single = (_maps(backbone, frames, counts[-1], case, d) for d in ("float64", "float32"))
            truths[group] = exact, np.abs(single - exact).max()
        truth, yardstick = truths[group]
        off = np.abs(out - truth).max()
        tokens = truth.shape[0] * truth.shape[1]
        allowed = 2 * yardstick + eps * np.abs(truth).max() * math.sqrt(tokens)
        if not off <= allowed:
            raise WrongResult(f"{backbone}, {name}: outputs are off by {off:.1e}, allowed are {allowed:.1e}.")


def _maps(backbone: str, frames: int, drawn: int, case: dict, dtype: str) -> np.ndarray:
    """On the first of ``drawn`` random frames, as the contestants draw them."""
    with torch.inference_mode():
        run = backbones.setup(backbone, dtype, **{**case, "method": "maps", "frames": drawn})
        return torch.cat(list(run(frames))).double().numpy()


def as_dict(sequence: Sequence, result: Study) -> dict:
    """A backbone's part of the results file: measured curves, counted memory, predictions."""
    counted, predicted = {}, {}
    for curve in result.curves:
        case = case_of(curve.name)
        model = memory_model(sequence.name, **case) if case["method"] != "FlexAttention" else None
        if model is not None:
            counted[curve.name] = [[n, model(n)] for n in result.counts]
        points = [(p.frames, p.seconds) for p in curve.points]
        growth = "linear" if case["window"] else sequence.growth
        time = predictions.TimeModel.fit(points, growth)
        predicted[curve.name] = {
            "time_model": None if time is None else asdict(time),
            "last_point_error": predictions.last_point_error(points, growth),
            "frames": {
                str(n): {
                    "seconds": None if time is None else time.seconds(n),
                    "peak_bytes": None if model is None else model(n),
                }
                for n in predictions.FRAMES
            },
        }
    return {
        "stands_for": sequence.stands_for,
        "shape": sequence.shape,
        "scale": backbones.Case("gate4d").scale,
        "tokens_per_frame": result.tokens_per_frame,
        "together": result.together,
        "counts": result.counts,
        "memory_method": result.memory_method,
        "curves": {
            c.name: {"stopped": c.stopped, "ended": c.ended, "points": [p.as_dict() for p in c.points]}
            for c in result.curves
        },
        "largest_relative_difference": {str(n): d for n, d in result.differences.items()},
        "time_ratios": {
            c.name: {str(n): r for n in result.counts if (r := result.ratio("gate4d", c.name, n)) is not None}
            for c in result.curves
            if c.name != "gate4d"
        },
        "counted_bytes": counted,
        "predicted": predicted,
    }


def draw(folder: Path, stem: str, found: dict[str, tuple[Study, dict]], subtitle: str, limit: int) -> list[str]:
    """A picture per backbone, and one of the predictions; returns the stems of the files."""
    names = []
    for name, (result, data) in found.items():
        sequence = SEQUENCES[name]
        title = f"{name} backbone, shaped like {sequence.stands_for} (random weights)\n{subtitle}"
        counted = {c: [tuple(p) for p in points] for c, points in data["counted_bytes"].items()}
        label = None if sequence.stream else "ms a frame"
        names.append(f"{stem}-{name}")
        plots.draw(folder / names[-1], result, title, counted=counted, limit=limit, latency_label=label)
    if "alternating" in found:
        names.append(f"{stem}-predicted")
        plots.draw_predictions(folder / names[-1])
    return names


def run(chosen: list[str], about: dict, limits: Limits, picture: Path, show: Callable[..., None]) -> dict:
    """Measure and draw; a backbone that fails is among the ``errors`` and the others go on.

    Args:
        chosen: names out of :data:`.contestants.SEQUENCES`.
        about: the envelope of the results, with ``effort``, ``threads`` and ``backend``.
        picture: where the pictures go; their names begin with its last part.
        show: called with a text and ``done``, out of :func:`steps`.

    Returns:
        The results, contents included.
    """
    found: dict[str, tuple[Study, dict]] = {}
    errors: dict[str, str] = {}
    done = 0
    for name in chosen:
        sequence = SEQUENCES[name]
        counts = sequence.counts(about["effort"])
        before, done = done, done + len(counts) * len(sequence.contestants)

        def progress(share: float, text: str, name=name, before=before, size=done - before) -> None:
            show(f"{name}: {text}", done=before + int(share * (size - 1)), passing=text.endswith("rounds"))

        try:
            result = measure(sequence, counts, limits, progress)
            show(f"{name}: counting bytes", done=done - 1)
            found[name] = result, as_dict(sequence, result)
        except Exception as e:  # a broken backbone must not hide the others
            errors[name] = one_line(e)
    hardware, versions, threads = about["hardware"], about["versions"], limits.threads
    subtitle = (
        f"{hardware['processor']}, {threads} thread{'s' * (threads > 1)}, fp32, torch {versions['torch']}, "
        f"gate4d {versions['gate4d']} (backend {about['backend']}), "
        f"memory limit {limits.max_bytes / 2**30:g} GiB a process"
    )
    show("drawing", done=done)
    pictures = draw(picture.parent, picture.name, found, subtitle, limits.max_bytes)
    sharded = [asdict(s) | {"seconds": s.seconds} for s in predictions.sharded()]
    return {
        **about, "max_bytes": limits.max_bytes, "backbones": {n: d for n, (_, d) in found.items()}, "errors": errors,
        "pictures": pictures, "predicted_on_gpus": sharded,
    }  # fmt: skip


def steps(chosen: list[str], effort: str) -> int:
    """Length of the progress bar."""
    return sum(len(s.counts(effort)) * len(s.contestants) for s in (SEQUENCES[n] for n in chosen))
