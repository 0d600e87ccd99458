"""The demo's stack under three implementations of gated attention, over a growing number of a clip's frames."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gate4d import MotionGate, Visibility, gated_attention

from ..measure import processes
from ..measure.curves import Study
from ..models import AlternatingStack, Attend, Implementation


def gate4d_attention(motion: Tensor, visible: Visibility, strength: float) -> Attend:
    """The gate applied on the fly: nothing of size N x N exists with the compiled backends."""
    gate = MotionGate.pairwise(motion, strength=strength)
    return lambda q, k, v: gated_attention(q, k, v, gate=gate, visible=visible)


def dense_bias(motion: Tensor, visible: Visibility, strength: float) -> Tensor:
    """The gate and the visibility as the papers write them, an additive bias ``[B, 1, N, N]``.

    ``strength * log(1 - (1 - g_i) g_j)`` where visible, ``-inf`` elsewhere; ``motion`` is ``[B, N]``.
    """
    weight = 1 - (1 - motion)[:, :, None] * motion[:, None, :]  # [B, N, N]
    bias = torch.xlogy(strength, weight)  # 0, not NaN, for strength 0 at a weight of 0
    if visible.bounds is not None:
        tokens = motion.shape[1]
        bias.masked_fill_(~visible.dense(tokens, tokens), -torch.inf)
    return bias[:, None]


def masked_sdpa(motion: Tensor, visible: Visibility, strength: float) -> Attend:
    """``F.scaled_dot_product_attention`` with the dense bias."""
    bias = dense_bias(motion, visible, strength)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def materialised(motion: Tensor, visible: Visibility, strength: float) -> Attend:
    """The attention maps of all heads ``[B, H, N, N]`` in memory, as code that reads attention maps has them."""
    bias = dense_bias(motion, visible, strength)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return torch.softmax(logits.add_(bias), dim=-1) @ v

    return attend


IMPLEMENTATIONS: dict[str, Implementation] = {
    "maps": materialised,
    "SDPA + mask": masked_sdpa,
    "gate4d": gate4d_attention,
}


@dataclass(frozen=True)
class StackCase:
    """What is run.

    Attributes:
        strength, window, sinks: of the gate and of the frame-causal visibility.
        model: arguments of :class:`~gate4d.benchmarks.models.AlternatingStack`.
    """

    strength: float = 1.0
    window: int | None = None
    sinks: int = 0
    model: dict = field(default_factory=dict)


def setup(
    implementation: str, clip: str, model: dict, strength: float, window: int | None, sinks: int
) -> Callable[[int], Iterable[Tensor]]:
    """The stack on the first frames of a clip (``frames`` and ``motion`` in an npz file), for a process of its own."""
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
    case: StackCase,
    limits: processes.Limits,
    progress: processes.Progress = lambda share, text: None,
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS),
) -> tuple[Study, float]:
    """Measure every implementation at every count; see :func:`.processes.measure`.

    Returns the study, and the relative difference between the gated and the un-gated output at the first count:
    without it, agreement would say nothing about the gate.
    """
    effect = math.nan
    with tempfile.TemporaryDirectory(prefix="gate4d-demo-") as scratch:
        clip = Path(scratch) / "clip.npz"
        np.savez(clip, frames=frames.numpy(), motion=motion.numpy())
        arguments = {"clip": str(clip), **vars(case)}
        contestants = [
            processes.Contestant(name, f"{__name__}:setup", {"implementation": name, **arguments})
            for name in implementations
        ]

        def verify(n: int, outputs: processes.Outputs) -> None:
            nonlocal effect
            if n == counts[0]:
                with torch.inference_mode():
                    run = setup("SDPA + mask", **{**arguments, "strength": 0.0})
                    plain = torch.cat(list(run(n))).numpy()
                effect = processes.relative_difference(plain, next(reversed(outputs.values())))

        return processes.measure(contestants, counts, limits, progress, verify), effect


# Motion scores for the gate.


def pool_to_patches(scores: Tensor, patch: int) -> Tensor:
    """Mean of pixel scores ``[T, H, W]`` over each patch: ``[T, patches]``, row-major."""
    return F.avg_pool2d(scores.float()[:, None], patch).flatten(1)


def frame_difference(frames: Tensor, patch: int) -> Tensor:
    """A cheap motion cue for clips without a true mask: ``[T, patches]`` in [0, 1] from frames ``[T, H, W, 3]``.

    The smaller of the mean absolute differences to the previous and to the next frame, scaled so that the median
    patch of a frame gets 0 and the 98th percentile 1. It answers to camera motion, shadows and flicker as well.
    """
    gray = frames.float().mean(-1)
    step = pool_to_patches((gray[1:] - gray[:-1]).abs(), patch)  # [T - 1, patches]
    change = torch.minimum(torch.cat((step[:1], step)), torch.cat((step, step[-1:])))
    low, high = change.quantile(0.5, 1, keepdim=True), change.quantile(0.98, 1, keepdim=True)
    return ((change - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
