"""The trained model on a clip: masks, depth and cameras, with and without the gates, beside the truth where known.

Times are those of the fastest of a few runs: figures of a demonstration, no ratio is taken of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gate4d.data import Clip
from gate4d.evaluation import camera_errors, depth_errors, mask_iou
from gate4d.evaluation.systems import early_masking
from gate4d.geometry import decode_pose, invert

from ..measure.resident import ResidentMeter


@dataclass
class Outcome:
    """One way to run the model.

    Attributes:
        poses: fp64 ``[T, 4, 4]``, camera to world. depth, masks: ``[T, H, W]``.
        seconds, peak_bytes: of the run, the fastest of a few; memory above the loaded model.
        ate, rpe_rotation, abs_rel, iou: against the truth, None where it is not known; ATE in units of the first
            frame's mean depth.
    """

    name: str
    poses: np.ndarray
    depth: np.ndarray
    masks: np.ndarray
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
        skipped = ("poses", "depth", "masks")
        share = float(self.masks.mean())
        return {**{n: x for n, x in asdict(self).items() if n not in skipped}, "fps": self.fps, "dynamic_share": share}


@torch.no_grad()
def reconstruct(model: nn.Module, clip: Clip, repeats: int = 2) -> list[Outcome]:
    """The clip through an alternating model in three ways: all frames at once ("no gates"), again without the keys of
    what moves ("gates"), and frame by frame with a camera pass at the end ("stream", as MoRe).

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
        true = in_units(clip)
        errors = camera_errors(poses, true)
        outcome.ate, outcome.rpe_rotation = errors.ate, errors.rpe_rotation
    if clip.depth is not None:
        outcome.abs_rel = depth_errors(depth, clip.depth).abs_rel
    if clip.masks is not None:
        outcome.iou = mask_iou(motion, clip.masks)
    return outcome


def in_units(clip: Clip) -> np.ndarray:
    """True poses in units of the first frame's mean depth."""
    poses = clip.poses.numpy().copy()
    poses[:, :3, 3] /= float(clip.depth[0].mean())
    return poses
