"""The demo's stack under the three implementations, side by side over a growing number of frames."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..measure import processes as study
from ..measure.processes import Settings as Limits
from ..measure.processes import available_memory, frame_counts
from .stack import IMPLEMENTATIONS, AlternatingStack

__all__ = ["IMPLEMENTATIONS", "Limits", "Settings", "available_memory", "frame_counts", "measure", "setup"]


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        strength, window, sinks: of the gate and of the frame-causal visibility.
        model: arguments of :class:`~gate4d.demo.stack.AlternatingStack`.
        limits: time, memory and threads.
    """

    strength: float = 1.0
    window: int | None = None
    sinks: int = 0
    model: dict = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)


def setup(
    implementation: str, clip: str, model: dict, strength: float, window: int | None, sinks: int
) -> Callable[[int], Iterable[Tensor]]:
    """The stack on the first frames of a clip (``frames`` and ``motion`` in an npz file), for :mod:`.study`."""
    attend = IMPLEMENTATIONS[implementation]
    data = np.load(clip)
    frames, motion = torch.from_numpy(data["frames"]), torch.from_numpy(data["motion"])
    stack = AlternatingStack(**model).eval()

    def run(n: int) -> Iterable[Tensor]:
        yield stack(frames[:n], motion[:n], attend, strength=strength, window=window, sinks=sinks)

    return run


def measure(
    frames: Tensor,  # [T, H, W, 3] uint8
    motion: Tensor,  # [T, patches] in [0, 1]
    counts: Sequence[int],
    settings: Settings,
    progress: study.Progress = lambda share, text: None,
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS),
) -> tuple[study.Study, float]:
    """Measure every implementation at every count; see :func:`gate4d.benchmarks.study.measure`.

    Returns the study, and the relative difference between the gated and the un-gated output at the first count:
    without it, agreement would say nothing about the gate.
    """
    effect = math.nan
    with tempfile.TemporaryDirectory(prefix="gate4d-demo-") as scratch:
        clip = Path(scratch) / "clip.npz"
        np.savez(clip, frames=frames.numpy(), motion=motion.numpy())
        case = {
            "clip": str(clip), "model": settings.model, "strength": settings.strength, "window": settings.window,
            "sinks": settings.sinks,
        }  # fmt: skip
        contestants = [
            study.Contestant(name, "gate4d.benchmarks.sequences.clip_stack:setup", {"implementation": name, **case})
            for name in implementations
        ]

        def verify(n: int, outputs: study.Outputs) -> None:
            nonlocal effect
            if n == counts[0]:
                with torch.inference_mode():
                    run = setup("SDPA + mask", **{**case, "strength": 0.0})
                    plain = torch.cat(list(run(n))).numpy()
                effect = study.relative_difference(plain, next(reversed(outputs.values())))

        return study.measure(contestants, counts, settings.limits, progress, verify), effect
