"""``gate4d bench sequences``: whole backbones over a growing number of frames, every implementation until it stops."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ..check import WrongResult
from ..measure import processes as study
from ..measure.processes import Contestant, Study
from ..measure.resident import MIB
from ..measure.rounds import QUIET
from ..report import plots
from ..rows.target import one_line
from . import backbones, predictions
from .counted import memory_model


@dataclass(frozen=True)
class Sequence:
    """A backbone and who runs it.

    Attributes:
        name: of :data:`.backbones.BACKBONES`.
        stands_for: the models it is shaped like.
        contestants: methods of :mod:`.backbones`; ", window" bounds the cache.
        shape: the registry's row that gives tokens a frame.
        stream: frames come one by one, so that the latency of the last one is shown beside the speed.
        growth: of time with frames, "quadratic" or "linear".
        quick, full: frame counts.
    """

    name: str
    stands_for: str
    contestants: tuple[str, ...]
    shape: str
    stream: bool
    growth: str
    quick: tuple[int, ...]
    full: tuple[int, ...]

    def counts(self, effort: Effort) -> tuple[int, ...]:
        """The frame counts of an effort."""
        return self.quick if effort.name == "quick" else self.full


SEQUENCES = {
    s.name: s
    for s in (
        Sequence(
            "alternating", "VGGT, Pi3", ("gate4d", "SDPA + mask", "maps", "FlexAttention", "SDPA"), "vggt.global",
            False, "quadratic", (2, 4, 8, 16, 32, 64), (2, 4, 8, 16, 32, 64, 96, 128),
        ),
        Sequence(
            "pairwise", "DUSt3R, MonST3R, Easi3R", ("gate4d", "SDPA + mask", "maps", "SDPA"), "dust3r.encoder",
            False, "linear", (2, 4, 8, 16, 32), (2, 4, 8, 16, 32, 64, 128),
        ),
        Sequence(
            "recurrent", "CUT3R, TTT3R", ("gate4d", "maps", "SDPA"), "cut3r.image",
            True, "linear", (2, 4, 8, 16, 32), (2, 4, 8, 16, 32, 64, 128),
        ),
        Sequence(
            "streaming", "StreamVGGT, STream3R", ("gate4d", "gate4d, window", "SDPA + mask", "maps", "SDPA"),
            "streamvggt.cached", True, "quadratic", (2, 4, 8, 16, 32), (2, 4, 8, 16, 32, 64, 128),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Effort:
    """Seconds a backbone, memory a process, how long short counts are repeated, and how often long ones."""

    name: str
    budget: float
    repeat_seconds: float
    max_rounds: int
    min_rounds: int = 5  # the median of fewer is at the mercy of one that was disturbed
    sample_seconds: float = 0.1
    max_bytes: int = 2 << 30


FULL = Effort("full", 300.0, 4.0, 31)
QUICK = Effort("quick", 85.0, 1.3, 15)


def case_of(contestant: str) -> dict:
    """Fields of :class:`.backbones.Case` for the name of a contestant."""
    method, _, window = contestant.partition(", ")
    return {"method": method, "gated": method != "SDPA", "window": backbones.WINDOW if window else None}


def measure(
    sequence: Sequence, counts: tuple[int, ...], effort: Effort, threads: int, progress: study.Progress
) -> Study:
    """Run a backbone; the outputs at the first count are compared with float64 before anything is timed further.

    Raises:
        WrongResult: a contestant computes something else.
    """
    contestants = [
        Contestant(
            name, "gate4d.benchmarks.sequences.backbones:setup",
            {"backbone": sequence.name, "frames": counts[-1], **case_of(name)}, _group(name),
        )
        for name in sequence.contestants
    ]  # fmt: skip
    limits = study.Settings(
        effort.budget,
        effort.max_bytes,
        effort.repeat_seconds,
        effort.max_rounds,
        effort.min_rounds,
        effort.sample_seconds,
        threads,
    )
    verify = functools.partial(_verify, sequence.name, counts)
    return study.measure(contestants, counts, limits, progress, verify)


def _group(contestant: str) -> str:
    case = case_of(contestant)
    return f"{'gated' if case['gated'] else 'plain'}, {case['window']}"


def _verify(backbone: str, counts: tuple[int, ...], frames: int, outputs: study.Outputs) -> None:
    """At the first count against the maps in float64, which may be missed by twice what the maps in float32 miss it by
    and by rounding steps that add up like a random walk; then against each other, to half of the digits."""
    truths: dict[str, tuple[np.ndarray, float]] = {}
    eps = torch.finfo(torch.float32).eps
    for name, out in outputs.items():
        group = _group(name)
        if frames != counts[0]:
            first = next(o for n, o in outputs.items() if _group(n) == group)
            if (off := study.relative_difference(out, first)) > math.sqrt(eps):
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


# ---- tables, 80 columns wide


def table(name: str, data: dict) -> list[str]:
    """Speed (a stream: milliseconds for the last frame) and memory of every contestant, ratios, what was counted."""
    stream = SEQUENCES[name].stream
    columns = list(data["curves"])
    lines = [f"{name}: shaped like {data['stands_for']}; {data['tokens_per_frame']} tokens a frame"]
    lines.append(" " * 6 + "".join(f"{c.replace('window', 'wind.'):>14}" for c in columns))
    lines.append("frames" + f"{'ms' if stream else 'FPS':>8}{'MiB':>6}" * len(columns))
    for n in data["counts"]:
        cells = []
        for c in columns:
            p = next((p for p in data["curves"][c]["points"] if p["frames"] == n), None)
            shown = p and (f"{p['latency_seconds'] * 1000:.1f}" if stream else f"{p['fps']:.2f}")
            cells.append(f"{shown:>8}{p['peak_bytes'] / MIB:>6.0f}" if p else f"{'-':>8}{'-':>6}")
        lines.append(f"{n:>6}" + "".join(cells))
    return lines + _ends(data)


def _ends(data: dict) -> list[str]:
    """Why curves stopped, the time ratios at the last common count, and how well outputs agree."""
    lines = [f"{c} stopped {curve['stopped']}." for c, curve in data["curves"].items() if curve["stopped"]]
    ratios = [(c, *list(r.items())[-1]) for c, r in data["time_ratios"].items() if r]
    lines += [f"time of gate4d / {c} at {n} frames: {r:.3f}" for c, n, r in ratios]
    waits = [p["wait"] for c in data["curves"].values() for p in c["points"] if p["wait"] is not None]
    if disturbed := sum(w >= QUIET for w in waits):
        lines.append(
            f"DISTURBED: at {disturbed} of {len(waits)} points the process waited for others, up to {max(waits):.0%}"
        )
    if not data.get("together", True):
        lines.append("the processes did not fit into memory side by side: they ran call by call, less comparably")
    worst = max(data["largest_relative_difference"].values(), default=None)
    if worst is not None:
        lines.append(f"outputs that should agree differ by at most {worst:.1e} of the largest")
    return lines


def prediction_table(found: dict[str, dict]) -> list[str]:
    """What 1,000 and 10,000 frames would take: the same stacks here, and VGGT's size on GPUs."""
    lines = ["PREDICTED, not measured: curves through the points above; bytes from shapes"]
    head = "".join(f"{f'{n:,} frames':>24}" for n in predictions.FRAMES)
    lines.append(f"{'':<31}{head[:24]}{head[24:]}")
    for name, data in found.items():
        for contestant, said in data["predicted"].items():
            cells = ""
            for n in predictions.FRAMES:
                at = said["frames"][str(n)]
                cells += f"{_time(at['seconds']):>12}{_size(at['peak_bytes']):>12}"
            lines.append(f"{name:<12}{contestant:<19}{cells}")
    errors = [abs(s["last_point_error"]) for d in found.values() for s in d["predicted"].values()
              if s["last_point_error"] is not None]  # fmt: skip
    if errors:
        lines.append(
            f"the same fit misses the last measured point by {np.median(errors):.0%} in the median, "
            f"{max(errors):.0%} at most"
        )
    return lines


def gpu_table() -> list[str]:
    """The multi-GPU predictions."""
    rate = predictions.ASSUMED_TFLOPS
    lines = [
        "PREDICTED for VGGT's size (24 + 24 blocks, 1041 tokens a frame), bf16, assuming",
        f"{rate:.0f} TFLOP/s a GPU, no time for communication; gate4d has no multi-GPU runner",
        f"{'frames':>8}{'GPUs':>6}{'memory a GPU':>16}{'with a dense mask':>20}{'PFLOP':>10}{'time':>12}",
    ]
    for s in predictions.sharded():
        dense = _size(predictions.vggt_bytes(s.frames, "SDPA + mask")) if s.gpus == 1 else ""
        lines.append(
            f"{s.frames:>8,}{s.gpus:>6}{_size(s.bytes_per_gpu):>16}{dense:>20}"
            f"{s.operations / 1e15:>10,.0f}{_time(s.seconds):>12}"
        )
    return lines


def markdown(result: dict, heading: list[str]) -> str:
    """The results file as the sequences part of BENCHMARKS.md: a table and a picture per backbone, then predictions."""
    lines = [f"- {line}" for line in heading]
    lines.append(f"- memory limit {_size(result['max_bytes'])} a process; {result['effort']} effort")
    for name, data in result["backbones"].items():
        stream, columns = SEQUENCES[name].stream, list(data["curves"])
        unit = "ms for the last frame" if stream else "frames a second"
        lines += ["", f"### {name}: {data['stands_for']}", ""]
        lines += [f"{data['tokens_per_frame']} tokens a frame; {unit}, then peak MiB above the loaded model.", ""]
        lines += ["| frames | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        for n in data["counts"]:
            cells = []
            for c in columns:
                p = next((p for p in data["curves"][c]["points"] if p["frames"] == n), None)
                speed = p and (f"{p['latency_seconds'] * 1000:.1f}" if stream else f"{p['fps']:.2f}")
                cells.append(f"{speed}; {p['peak_bytes'] / MIB:.0f}" if p else "-")
            lines.append(f"| {n} | " + " | ".join(cells) + " |")
        lines += ["", *(f"- {line}" for line in _ends(data))]
        picture = next((p for p in result["pictures"] if p.endswith(f"-{name}")), None)
        if picture:
            lines += ["", f"![{name}](benchmarks/results/{picture}.png)"]
    lines += ["", "### Predicted", "", "```", *prediction_table(result["backbones"]), "", *gpu_table(), "```"]
    picture = next((p for p in result["pictures"] if p.endswith("-predicted")), None)
    if picture:
        lines += ["", f"![predictions](benchmarks/results/{picture}.png)"]
    return "\n".join(lines) + "\n"


def _size(size: float | None) -> str:
    if size is None:
        return "-"
    for unit in ("MiB", "GiB", "TiB"):
        size /= 1024 if unit != "MiB" else MIB
        if size < 1000:
            return f"{size:.3g} {unit}"
    return f"{size:,.0f} TiB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for limit, unit, name in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"


# ---- command


def run(
    chosen: list[str],
    effort: Effort,
    about: dict,
    threads: int,
    json_file: Path,
    step: Callable[[int, str], None],
) -> tuple[list[str], bool]:
    """Measure, write JSON and pictures beside it; returns the lines to print and whether every backbone was measured.

    A backbone that fails is reported and the others go on.
    """
    found: dict[str, tuple[Study, dict]] = {}
    errors: dict[str, str] = {}
    done = 0
    for name in chosen:
        sequence = SEQUENCES[name]
        counts = sequence.counts(effort)
        before, done = done, done + len(counts) * len(sequence.contestants)

        def progress(share: float, text: str, name=name, before=before, size=done - before) -> None:
            step(before + int(share * (size - 1)), f"{name}: {text}")

        try:
            result = measure(sequence, counts, effort, threads, progress)
            step(done - 1, f"{name}: counting bytes")
            found[name] = result, as_dict(sequence, result)
        except Exception as e:  # a broken backbone must not hide the others
            errors[name] = one_line(e)
    data = {n: d for n, (_, d) in found.items()}
    hardware = about["hardware"]
    subtitle = (
        f"{hardware['processor']}, {threads} thread{'s' * (threads > 1)}, fp32, torch {about['versions']['torch']}, "
        f"gate4d {about['versions']['gate4d']} (backend {about['backend']}), "
        f"memory limit {effort.max_bytes / 2**30:g} GiB a process"
    )
    step(done, "drawing")
    pictures = draw(json_file.parent, json_file.stem, found, subtitle, effort.max_bytes)
    sharded = [asdict(s) | {"seconds": s.seconds} for s in predictions.sharded()]
    extra = {"backbones": data, "errors": errors, "pictures": pictures, "predicted_on_gpus": sharded}
    json_file.write_text(json.dumps({**about, "kind": "sequences", "max_bytes": effort.max_bytes, **extra}) + "\n")
    lines = []
    for name in chosen:
        lines += ["", *(table(name, data[name]) if name in data else [f"{name}: FAILED, {errors[name]}"])]
    if data:
        lines += ["", *prediction_table(data)]
    lines += ["", *gpu_table()]
    return lines, not errors


def steps(chosen: list[str], effort: Effort) -> int:
    """Length of the progress bar."""
    return sum(len(s.counts(effort)) * len(s.contestants) for s in (SEQUENCES[n] for n in chosen))
