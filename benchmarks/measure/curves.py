"""What :mod:`.processes` finds: points over frame counts, curves of them, and a study of several curves."""

from __future__ import annotations

from dataclasses import dataclass, field

from .ratio import faster_half, separate


@dataclass(frozen=True)
class Point:
    """What one contestant did at one frame count.

    Attributes:
        frames: the count.
        times: seconds a call in each round that counts.
        latencies: seconds of the last frame in each of them; for a clip its seconds divided by its frames.
        peak_bytes: growth of the resident set in the first run.
        wait: largest share of a round that the process's threads waited for other processes; None if unknown.
    """

    frames: int
    times: tuple[float, ...]
    peak_bytes: int
    latencies: tuple[float, ...] = ()
    wait: float | None = None

    @property
    def seconds(self) -> float:
        """Those that count for a ratio: see :func:`.ratio.separate`."""
        return faster_half(self.times)

    @property
    def runs(self) -> int:
        """Rounds that count."""
        return len(self.times)

    @property
    def latency(self) -> float:
        """Seconds of the last frame, taken in the same way."""
        return faster_half(self.latencies) if self.latencies else self.seconds / self.frames

    @property
    def fps(self) -> float:
        """Frames a second over the whole call."""
        return self.frames / self.seconds

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "frames": self.frames, "runs": self.runs, "seconds": self.seconds, "fps": self.fps,
            "latency_seconds": self.latency, "peak_bytes": self.peak_bytes, "wait": self.wait,
            "times": list(self.times),
        }  # fmt: skip


@dataclass
class Curve:
    """The points of one contestant, and why it stopped before the last count, if it did.

    ``ended`` is ``"memory"``, ``"time"`` or None; ``stopped`` the sentence.
    """

    name: str
    points: list[Point] = field(default_factory=list)
    stopped: str | None = None
    ended: str | None = None
    stopped_at: int | None = None
    spent: float = 0.0

    def at(self, frames: int) -> Point | None:
        """The point at a frame count, or None."""
        return next((p for p in self.points if p.frames == frames), None)

    def stop(self, frames: int, why: str, sentence: str) -> None:
        """End the curve before ``frames``."""
        self.stopped_at, self.ended, self.stopped = frames, why, sentence


@dataclass
class Study:
    """All curves; ``differences[n]`` is the largest relative difference of outputs within a group at ``n`` frames
    (absent where no group had two that ran); ``together`` whether all fitted into memory side by side: if not, they did
    not take turns within a round, and each began it with an empty heap."""

    counts: list[int]
    curves: list[Curve]
    differences: dict[int, float] = field(default_factory=dict)
    tokens_per_frame: int = 0
    together: bool = True
    memory_method: str = ""
    threads: int = 0

    def curve(self, name: str) -> Curve:
        """The curve of that name."""
        return next(c for c in self.curves if c.name == name)

    def ratio(self, of: str, to: str, frames: int) -> float | None:
        """``of``'s time / ``to``'s by the rule for separate processes; None where one of them has no point."""
        a, b = self.curve(of).at(frames), self.curve(to).at(frames)
        return None if a is None or b is None else separate(a.times, b.times)
