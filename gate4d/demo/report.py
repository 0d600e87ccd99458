"""What the demo leaves behind: a table, two pictures and a JSON file, written all at once or not at all."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from gate4d.benchmarks import plots
from gate4d.benchmarks.study import Study
from gate4d.data import Clip
from gate4d.methods import export

FILES = ("reconstruction.png", "curves.png", "overlay.png", "figures.json")
_MIB = 2**20


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


def table(study: Study) -> str:
    """The figures in at most 80 columns."""
    head = [f"{'frames':>6} {'tokens':>6}"] + [f"{c.name:^18}" for c in study.curves] + [f"{'max diff':>9}"]
    units = [" " * 13] + [f"{'FPS':>7} {'peak MiB':>10}" for _ in study.curves] + [" " * 9]
    lines = [" ".join(head), " ".join(units)]
    for n in study.counts:
        row = [f"{n:>6} {n * study.tokens_per_frame:>6}"]
        for curve in study.curves:
            point = next((p for p in curve.points if p.frames == n), None)
            row.append(f"{point.fps:>7.2f} {point.peak_bytes / _MIB:>10.0f}" if point else f"{'-':>7} {'-':>10}")
        difference = study.differences.get(n)
        row.append(f"{'-':>9}" if difference is None else f"{difference:>9.1e}")
        lines.append(" ".join(row))
    return "\n".join(line.rstrip() for line in lines)


def figures(study: Study, gate_effect: float, clip: Clip, context: dict) -> dict:
    """Everything measured, as plain data; ``context`` adds hardware, versions, the command and so on."""
    curves = {c.name: {"stopped": c.stopped, "points": [p.as_dict() for p in c.points]} for c in study.curves}
    return {
        **context,
        "clip": {
            "name": clip.name,
            "size": list(clip.frames.shape[1:3]),
            "frames": len(clip.frames),
            "tokens_per_frame": study.tokens_per_frame,
        },
        "memory_method": study.memory_method,
        "threads": study.threads,
        "curves": curves,
        "largest_relative_difference": {str(n): d for n, d in study.differences.items()},
        "relative_difference_without_gate": gate_effect,
    }


def write_json(path: Path, data: dict) -> None:
    """Indented JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n")


def draw_curves(path: Path, study: Study, subtitle: str) -> None:
    """Frames a second and peak memory against the number of frames."""
    plots.draw(path, study, f"Motion-gated, frame-causal attention\n{subtitle}", panels=("speed", "memory"))


def draw_overlay(path: Path, clip: Clip, motion: torch.Tensor, patch: int, cue: str, columns: int = 5) -> None:
    """A strip of frames; below, the motion scores ``[T, patches]`` that the gate receives laid over them."""
    plt = plots.pyplot()
    frames, height, width, _ = clip.frames.shape
    shown = np.unique(np.linspace(0, frames - 1, min(columns, frames)).round().astype(int))
    rows = [("frame", lambda t: clip.frames[t].numpy())]
    if clip.motion is not None:
        rows.append(("true mask", lambda t: tint(clip.frames[t].numpy(), clip.motion[t].numpy().astype(np.float32))))
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
