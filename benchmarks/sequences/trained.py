"""The trained model on a clip: masks, depth and cameras, with and without the gates, beside the truth where known."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gate4d.data import Clip
from gate4d.evaluation import camera_errors, depth_errors, mask_iou, similarity
from gate4d.evaluation.systems import early_masking
from gate4d.geometry import decode_pose, invert

from ..measure.resident import ResidentMeter
from ..report import plots

_COLORS = {"truth": "#333333", "no gates": "#c0392b", "gates": "#1a6fb5", "stream": "#2e8b57"}
ABOUT = {
    "no gates": "all frames at once",
    "gates": "again, without the keys of what moves",
    "stream": "MoRe: frame by frame, then the camera pass",
}


@dataclass
class Outcome:
    """One way to run the model.

    Attributes:
        poses: fp64 ``[T, 4, 4]``, camera to world. depth, motion: ``[T, H, W]``.
        seconds, peak_bytes: of the run, the fastest of a few; memory above the loaded model.
        ate, rpe_rotation, abs_rel, iou: against the truth, None where it is not known; ATE in units of the first
            frame's mean depth.
    """

    name: str
    poses: np.ndarray
    depth: np.ndarray
    motion: np.ndarray
    seconds: float
    peak_bytes: int
    ate: float | None = None
    rpe_rotation: float | None = None
    abs_rel: float | None = None
    iou: float | None = None

    @property
    def fps(self) -> float:
        """Frames a second."""
        return len(self.depth) / self.seconds

    def figures(self) -> dict:
        """Plain data, without the arrays."""
        skipped = ("poses", "depth", "motion")
        share = float(self.motion.mean())
        return {**{n: x for n, x in asdict(self).items() if n not in skipped}, "fps": self.fps, "dynamic_share": share}


@torch.no_grad()
def reconstruct(model: nn.Module, clip: Clip, repeats: int = 2) -> list[Outcome]:
    """The clip through an alternating model in three ways: see ``ABOUT``.

    The gates drop what the run without them found to move, so "gates" stands for two runs. Masks and depth are those
    of the first run, cameras those of the second.
    """
    whole = (clip.frames.permute(0, 3, 1, 2).float() / 255)[None]

    def gated(images: Tensor) -> dict[str, Tensor]:
        out = model(images)
        return {**out, "pose_enc": early_masking(model, images, out["motion"][0] > 0)["pose_enc"]}

    def stream(images: Tensor) -> dict[str, Tensor]:
        running = model.stream(images)
        steps = list(running)
        out = {name: torch.cat([s[name] for s in steps], dim=1) for name in ("depth", "motion")}
        return {**out, "pose_enc": running.camera_pass()}

    ways: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {"no gates": model, "gates": gated, "stream": stream}
    return [_measured(name, way, whole, clip, repeats) for name, way in ways.items()]


def _measured(
    name: str, way: Callable[[Tensor], dict[str, Tensor]], images: Tensor, clip: Clip, repeats: int
) -> Outcome:
    way(images[:, :2])  # warm-up
    meter, seconds = ResidentMeter(), []
    meter.start()
    for _ in range(repeats):
        begin = time.perf_counter()
        out = way(images)
        seconds.append(time.perf_counter() - begin)
    size = out["depth"].shape[2:4]
    poses = invert(decode_pose(out["pose_enc"][0].double(), *size)[0]).numpy()
    motion, depth = (out["motion"][0] > 0).numpy(), out["depth"][0, ..., 0].float().numpy()
    outcome = Outcome(name, poses, depth, motion, min(seconds), meter.growth())
    if clip.poses is not None:
        true = _in_units(clip)
        errors = camera_errors(poses, true)
        outcome.ate, outcome.rpe_rotation = errors.ate, errors.rpe_rotation
    if clip.depth is not None:
        outcome.abs_rel = depth_errors(depth, clip.depth).abs_rel
    if clip.motion is not None:
        outcome.iou = mask_iou(motion, clip.motion)
    return outcome


def _in_units(clip: Clip) -> np.ndarray:
    """True poses in units of the first frame's mean depth."""
    poses = clip.poses.numpy().copy()
    poses[:, :3, 3] /= float(clip.depth[0].mean())
    return poses


def table(outcomes: list[Outcome]) -> str:
    """The figures in at most 80 columns."""
    known = outcomes[0].ate is not None
    head = f"{'':<9}{'':<42}" if not known else f"{'':<9}{'ATE %':>7}{'RPE deg':>9}{'AbsRel':>8}{'IoU':>6}"
    lines = [f"{head}{'dynamic':>9}{'FPS':>7}{'peak MiB':>10}"]
    for o in outcomes:
        row = f"{o.name:<9}{ABOUT[o.name]:<42}"
        if known:
            row = f"{o.name:<9}{100 * o.ate:>7.2f}{o.rpe_rotation:>9.2f}{o.abs_rel:>8.3f}{o.iou:>6.2f}"
        lines.append(f"{row}{o.motion.mean():>8.1%} {o.fps:>6.1f}{o.peak_bytes / 2**20:>10.0f}")
    return "\n".join(lines)


def draw(path: Path, clip: Clip, outcomes: list[Outcome], columns: int = 6) -> None:
    """Frames, masks, depth and, below, the cameras' path from above."""
    from gate4d.cli.demo_report import tint

    plt = plots.pyplot()
    plain = outcomes[0]
    frames, height, width, _ = clip.frames.shape
    shown = np.unique(np.linspace(0, frames - 1, min(columns, frames)).round().astype(int))
    images = clip.frames.numpy()
    rows = [("frame", lambda t: (images[t], {}))]
    if clip.motion is not None:
        rows.append(("true motion", lambda t: (tint(images[t], clip.motion[t].numpy().astype(np.float32)), {})))
    rows.append(("motion found", lambda t: (tint(images[t], plain.motion[t].astype(np.float32)), {})))
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
        true = _in_units(clip)
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
        text = f" {o.fps:.0f} FPS, {o.peak_bytes / 2**20:.0f} MiB: {ABOUT[o.name]}"
        axes.annotate(text, (0, i + 0.5), va="center", fontsize=9)
    axes.set(title="frames per second, peak memory above the model", ylim=(len(outcomes) - 0.3, -0.5))
