"""Which backbones run over growing frame counts, who runs each of them, and with what limits."""

from __future__ import annotations

from dataclasses import dataclass

from ..measure.processes import Limits
from . import backbones

# Seconds a backbone, memory a process, how long short counts are repeated, and how often long ones: the median of
# fewer than five is at the mercy of one that was disturbed.
EFFORTS = {
    "full": Limits(300.0, 2 << 30, 4.0, 31, 5, 0.1),
    "quick": Limits(85.0, 2 << 30, 1.3, 15, 5, 0.1),
}


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

    def counts(self, effort: str) -> tuple[int, ...]:
        """The frame counts of an effort, "quick" or "full"."""
        return self.quick if effort == "quick" else self.full


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


def case_of(contestant: str) -> dict:
    """Fields of :class:`.backbones.Case` for the name of a contestant."""
    method, _, window = contestant.partition(", ")
    return {"method": method, "gated": method != "SDPA", "window": backbones.WINDOW if window else None}
