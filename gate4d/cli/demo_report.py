"""What the demo leaves behind: a table, two pictures and a JSON file, written all at once or not at all."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from gate4d.benchmarks.measure.curves import Study
from gate4d.benchmarks.measure.resident import MIB
from gate4d.benchmarks.report import plots
from gate4d.benchmarks.sequences.trained import Outcome, in_units
from gate4d.data import Clip
from gate4d.evaluation import similarity
from gate4d.methods import export
from gate4d.terminal import table

FILES = ("reconstruction.png", "curves.png", "overlay.png", "figures.json")


def check_folder(out: Path) -> None:
    """Raise unless ``out`` can be written: a new name in an existing folder, or an earlier demo's folder."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: the folder {out.parent} does not exist.")
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"--out: the folder {out.parent} is not writable.")
    if not (out.exists() or out.is_symlink()):
        return
    if out.is_symlink() or not out.is_dir():
        raise FileExistsError(f"--out: {out} exists and is not a folder; give another name.")
    foreign = sorted(p.name for p in out.iterdir() if p.name not in FILES)
    if foreign:
        raise FileExistsError(
            f"--out: {out} holds files that no demo wrote ({', '.join(foreign[:3])}) and is left alone; "
            "give another name."
        )


def written_at_once(out: Path) -> AbstractContextManager[Path]:
    """A folder to write into, which takes the name ``out`` only when everything went well."""
    return export.written_at_once(out, check_folder)


_COLORS = {"truth": "#333333", "no gates": "#c0392b", "gates": "#1a6fb5", "stream": "#2e8b57"}
ABOUT = {
    "no gates": "all frames at once",
    "gates": "again, without the keys of what moves",
    "stream": "MoRe: frame by frame, then the camera pass",
}


def speed_table(study: Study) -> list[str]:
    """Frames a second and peak memory of every implementation, and how far outputs are apart."""
    rows: list = [
        " ".join([f"{'frames':>6} {'tokens':>6}", *(f"{c.name:^18}" for c in study.curves), f"{'max diff':>9}"]),
        ("", "", *("FPS", "peak MiB") * len(study.curves)),
    ]
    for n in study.counts:
        cells: list = [n, n * study.tokens_per_frame]
        for point in (curve.at(n) for curve in study.curves):
            cells += ("-", "-") if point is None else (f"{point.fps:.2f}", f"{point.peak_bytes / MIB:.0f}")
        difference = study.differences.get(n)
        rows.append((*cells, "-" if difference is None else f"{difference:.1e}"))
    return table(">6 >7" + " >8 >11" * len(study.curves) + " >10", rows)


def trained_table(outcomes: list[Outcome]) -> list[str]:
    """The figures in at most 80 columns."""
    known = outcomes[0].ate is not None
    rows = [("", *(("ATE %", "RPE deg", "AbsRel", "IoU") if known else ("",)), "dynamic", "FPS", "peak MiB")]
    for o in outcomes:
        errors = (ABOUT[o.name],)
        if known:
            errors = f"{100 * o.ate:.2f}", f"{o.rpe_rotation:.2f}", f"{o.abs_rel:.3f}", f"{o.iou:.2f}"
        speed = f"{o.masks.mean():.1%}", f"{o.fps:.1f}", f"{o.peak_bytes / MIB:.0f}"
        rows.append((o.name, *errors, *speed))
    return table("<9 " + (">7 >9 >8 >6" if known else "<42") + " >9 >7 >10", rows)


def draw_trained(path: Path, clip: Clip, outcomes: list[Outcome], columns: int = 6) -> None:
    """Frames, masks, depth and, below, the cameras' path from above."""
    plt = plots.pyplot()
    plain = outcomes[0]
    frames, height, width, _ = clip.frames.shape
    shown = np.unique(np.linspace(0, frames - 1, min(columns, frames)).round().astype(int))
    images = clip.frames.numpy()
    rows = [("frame", lambda t: (images[t], {}))]
    if clip.masks is not None:
        rows.append(("true motion", lambda t: (tint(images[t], clip.masks[t].numpy().astype(np.float32)), {})))
    rows.append(("motion found", lambda t: (tint(images[t], plain.masks[t].astype(np.float32)), {})))
    inverse = 1 / plain.depth
    if clip.depth is not None:
        true = np.median(clip.depth) / np.median(plain.depth) / clip.depth.numpy()  # in the model's unit
        rows.append(("true depth", lambda t: (true[t], colors)))
    low, high = np.quantile(inverse if clip.depth is None else true, (0.01, 0.99))
    colors = {"cmap": "magma", "vmin": low, "vmax": high}
    rows.append(("depth found", lambda t: (inverse[t], colors)))

    strip = 2.1 * len(rows) * height / width * len(shown) / 6
    fig = plt.figure(figsize=(13, strip + 4.6), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(strip, 4.2))
    axes = top.subplots(len(rows), len(shown), squeeze=False)
    for r, (label, picture) in enumerate(rows):
        for c, t in enumerate(shown):
            image, style = picture(t)
            axes[r, c].imshow(image, interpolation="nearest", **style)
            axes[r, c].set(xticks=[], yticks=[])
            axes[r, c].spines[:].set_visible(False)
            if r == 0:
                axes[r, c].set_title(f"frame {t}", fontsize=10)
        axes[r, 0].set_ylabel(label, fontsize=10)
    above, bars = bottom.subplots(1, 2, width_ratios=(1, 1))
    _draw_paths(above, clip, outcomes)
    _draw_speed(bars, outcomes)
    fig.suptitle(f"{clip.name}: the trained model, {frames} frames of {width}x{height}", fontsize=12)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _draw_paths(axes, clip: Clip, outcomes: list[Outcome]) -> None:
    reference = outcomes[0].poses[:, :3, 3] if clip.poses is None else None
    if reference is None:
        true = in_units(clip)
        reference = (np.linalg.inv(true[0]) @ true)[:, :3, 3]
        axes.plot(*reference[:, [0, 2]].T, "o-", color=_COLORS["truth"], lw=2.5, ms=4, label="truth")
    for o in outcomes:
        points = o.poses[:, :3, 3] if o is outcomes[0] and clip.poses is None else None
        points = similarity(o.poses[:, :3, 3], reference).points(o.poses[:, :3, 3]) if points is None else points
        label = o.name if o.ate is None else f"{o.name}, ATE {100 * o.ate:.2f} %"
        axes.plot(*points[:, [0, 2]].T, "o-", color=_COLORS[o.name], lw=1.5, ms=3, label=label)
    axes.set(title="camera from above, aligned", xlabel="right", ylabel="forward", aspect="equal", adjustable="datalim")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)


def _draw_speed(axes, outcomes: list[Outcome]) -> None:
    axes.barh([o.name for o in outcomes], [o.fps for o in outcomes], color=[_COLORS[o.name] for o in outcomes])
    for i, o in enumerate(outcomes):
        text = f" {o.fps:.0f} FPS, {o.peak_bytes / MIB:.0f} MiB: {ABOUT[o.name]}"
        axes.annotate(text, (0, i + 0.5), va="center", fontsize=9)
    axes.set(title="frames per second, peak memory above the model", ylim=(len(outcomes) - 0.3, -0.5))


def figures(study: Study, gate_effect: float, clip: Clip, about: dict) -> dict:
    """Everything measured, as plain data; ``about`` is the envelope and what else was chosen."""
    curves = {c.name: {"stopped": c.stopped, "points": [p.as_dict() for p in c.points]} for c in study.curves}
    return {
        **about,
        "clip": {
            "name": clip.name,
            "size": list(clip.frames.shape[1:3]),
            "frames": len(clip.frames),
            "tokens_per_frame": study.tokens_per_frame,
        },
        "memory_method": study.memory_method,
        "curves": curves,
        "largest_relative_difference": {str(n): d for n, d in study.differences.items()},
        "relative_difference_without_gate": gate_effect,
    }


def draw_curves(path: Path, study: Study, subtitle: str) -> None:
    """Frames a second and peak memory against the number of frames."""
    plots.draw(path, study, f"Motion-gated, frame-causal attention\n{subtitle}", panels=("speed", "memory"))


def draw_overlay(path: Path, clip: Clip, motion: torch.Tensor, patch: int, cue: str, columns: int = 5) -> None:
    """A strip of frames; below, the motion scores ``[T, patches]`` that the gate receives laid over them."""
    plt = plots.pyplot()
    frames, height, width, _ = clip.frames.shape
    shown = np.unique(np.linspace(0, frames - 1, min(columns, frames)).round().astype(int))
    rows = [("frame", lambda t: clip.frames[t].numpy())]
    if clip.masks is not None:
        rows.append(("true mask", lambda t: tint(clip.frames[t].numpy(), clip.masks[t].numpy().astype(np.float32))))
    grid = motion.unflatten(1, (height // patch, width // patch))
    scores = grid.repeat_interleave(patch, 1).repeat_interleave(patch, 2).numpy()
    rows.append(("score per patch", lambda t: tint(clip.frames[t].numpy(), scores[t])))
    size = (2.6 * len(shown) + 0.3, 2.6 * len(rows) * height / width + 0.8)
    fig, axes = plt.subplots(len(rows), len(shown), figsize=size, layout="constrained", squeeze=False)
    for r, (label, picture) in enumerate(rows):
        for c, t in enumerate(shown):
            axes[r, c].imshow(picture(t))
            axes[r, c].set(xticks=[], yticks=[])
            axes[r, c].spines[:].set_visible(False)
            if r == 0:
                axes[r, c].set_title(f"frame {t}", fontsize=10)
        axes[r, 0].set_ylabel(label, fontsize=10)
    fig.suptitle(f"{clip.name}: motion score = {cue} (red = dynamic)", fontsize=11)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def tint(image: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Blend ``image [H, W, 3]`` towards red by ``score [H, W]``, and its static parts towards grey."""
    gray = image.mean(-1, keepdims=True)
    calm = 0.35 * image + 0.65 * (0.75 * gray + 40)
    hot = 0.45 * image + 0.55 * np.array([235.0, 30.0, 40.0])
    return np.clip(calm + (hot - calm) * score[..., None], 0, 255).astype(np.uint8)
