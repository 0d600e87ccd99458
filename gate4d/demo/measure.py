"""Runs the implementations side by side over a growing number of frames."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from gate4d.demo.stack import IMPLEMENTATIONS


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        strength, window, sinks: of the gate and of the frame-causal visibility.
        model: arguments of :class:`~gate4d.demo.stack.AlternatingStack`.
        budget: seconds for all implementations together, shared equally among those that still run.
        max_bytes: an implementation stops before a count at which its peak memory is expected to be above.
        repeat_seconds: a count is repeated until this long, five times at most; the median counts.
        threads: of torch; 0 leaves torch's choice.
    """

    strength: float = 1.0
    window: int | None = None
    sinks: int = 0
    model: dict = field(default_factory=dict)
    budget: float = 60.0
    max_bytes: int = 4 << 30
    repeat_seconds: float = 1.0
    threads: int = 0


@dataclass(frozen=True)
class Point:
    """One measurement; ``seconds`` is the median of ``runs`` forward passes over the ``frames`` frames."""

    frames: int
    seconds: float
    runs: int
    peak_bytes: int

    @property
    def fps(self) -> float:
        """Frames a second."""
        return self.frames / self.seconds


@dataclass
class Curve:
    """The measurements of one implementation, and why it stopped before the last count, if it did."""

    name: str
    points: list[Point] = field(default_factory=list)
    stopped: str | None = None
    spent: float = 0.0


@dataclass
class Study:
    """All curves; ``differences[n]`` is the largest relative difference of outputs at ``n`` frames (absent where
    fewer than two implementations ran), ``gate_effect`` that between the gated and the un-gated output."""

    counts: list[int]
    tokens_per_frame: int
    curves: list[Curve]
    differences: dict[int, float]
    gate_effect: float
    memory_method: str
    threads: int


class WorkerDied(RuntimeError):
    """A worker ended before it answered."""


class Worker:
    """A fresh process with one implementation."""

    def __init__(self, config: dict, folder: Path):
        name = config["implementation"].replace(" ", "")
        config_file = folder / f"{name}.json"
        config_file.write_text(json.dumps(config))
        self._log = (folder / f"{name}.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gate4d.demo.worker", str(config_file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self.name = config["implementation"]

    def answer(self) -> dict:
        """The next message; raises WorkerDied with what the process left behind."""
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        last = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
        raise WorkerDied(f"killed by signal {-code}, most likely for lack of memory" if code < 0 else last)

    def ask(self, **request) -> dict:
        """Send a request and wait for its answer."""
        with contextlib.suppress(BrokenPipeError):  # answer() says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def measure(
    frames: Tensor,  # [T, H, W, 3] uint8
    motion: Tensor,  # [T, patches] in [0, 1]
    counts: Sequence[int],
    settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS),
) -> Study:
    """Measure every implementation at every count, one after the other at each count.

    ``progress`` is called with a description before each measurement, ``len(counts) * len(implementations)`` times.

    Raises:
        RuntimeError: an implementation failed for another reason than memory or time.
    """
    curves = [Curve(name) for name in implementations]
    study = Study(list(counts), 0, curves, {}, math.nan, "", 0)
    with tempfile.TemporaryDirectory(prefix="gate4d-demo-") as scratch:
        folder = Path(scratch)
        np.savez(folder / "clip.npz", frames=frames.numpy(), motion=motion.numpy())
        config = {**asdict(settings), "clip": str(folder / "clip.npz")}
        workers: list[Worker] = []
        try:
            for name in implementations:
                workers.append(Worker({**config, "implementation": name}, folder))
            for worker in workers:
                try:
                    ready = worker.answer()
                except WorkerDied as e:
                    raise RuntimeError(f"{worker.name} did not start: {e}") from None
                study.memory_method, study.threads = ready["method"], ready["threads"]
            for n in counts:
                outputs = {}
                for worker, curve in zip(workers, curves, strict=True):
                    progress(f"{n} frames, {curve.name}")
                    _advance(worker, curve, n, settings, _seconds_left(curve, curves, settings.budget), folder, outputs)
                if outputs:
                    study.tokens_per_frame = next(iter(outputs.values())).shape[1]
                if n == counts[0] and outputs:
                    study.gate_effect = _gate_effect(workers, curves, n, folder, outputs)
                if len(outputs) > 1:
                    first, *others = outputs.values()
                    study.differences[n] = max(relative_difference(o, first) for o in others)
        finally:
            for worker in workers:
                worker.close()
    return study


def _advance(
    worker: Worker,
    curve: Curve,
    frames: int,
    settings: Settings,
    left: float,
    folder: Path,
    outputs: dict[str, np.ndarray],
) -> None:
    """Add the point at ``frames``, or note why the curve stops."""
    if curve.stopped:
        return
    seconds = extrapolate([(p.frames, p.seconds) for p in curve.points], frames)
    peak = extrapolate([(p.frames, p.peak_bytes) for p in curve.points], frames)
    if seconds > left:
        curve.stopped = (
            f"before {frames} frames: about {seconds:.0f} s expected, {max(left, 0):.0f} s of its budget left"
        )
        return
    if peak > settings.max_bytes:
        curve.stopped = (
            f"before {frames} frames: about {peak / 2**30:.1f} GiB expected, limit {settings.max_bytes / 2**30:.1f} GiB"
        )
        return
    save = folder / "out.npy"
    try:
        reply = worker.ask(frames=frames, strength=settings.strength, save=str(save))
    except WorkerDied as e:
        if "memory" not in str(e):
            raise RuntimeError(f"{curve.name} failed at {frames} frames: {e}") from None
        curve.stopped = f"at {frames} frames: {e}"
        return
    curve.points.append(Point(frames, reply["seconds"], reply["runs"], reply["peak_bytes"]))
    curve.spent += reply["seconds"] * reply["runs"]
    outputs[curve.name] = np.load(save)
    if not np.isfinite(outputs[curve.name]).all():
        raise RuntimeError(f"{curve.name} gave outputs that are not finite at {frames} frames.")


def _seconds_left(curve: Curve, curves: Sequence[Curve], budget: float) -> float:
    """What is left of the curve's equal share; a curve that stopped leaves the rest of its share to the others."""
    running = sum(c.stopped is None for c in curves)
    share = (budget - sum(c.spent for c in curves if c.stopped)) / max(1, running)
    return share - curve.spent


def _gate_effect(
    workers: list[Worker], curves: list[Curve], frames: int, folder: Path, outputs: dict[str, np.ndarray]
) -> float:
    """How much the gate changes the output: without it, agreement would say nothing about the gate."""
    worker = next(w for w, c in zip(reversed(workers), reversed(curves), strict=True) if c.points)
    worker.ask(frames=frames, strength=0.0, save=str(folder / "out.npy"))
    return relative_difference(np.load(folder / "out.npy"), outputs[worker.name])


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value of ``b``."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def extrapolate(points: Sequence[tuple[int, float]], x: int) -> float:
    """Value at ``x`` of the power law through the last two points, its exponent kept in [1, 2]; quadratic from one
    point, 0 from none."""
    if not points:
        return 0.0
    x1, y1 = points[-1]
    exponent = 2.0
    if len(points) > 1 and min(points[-2][1], y1) > 0:
        x0, y0 = points[-2]
        exponent = min(2.0, max(1.0, math.log(y1 / y0) / math.log(x1 / x0)))
    return y1 * (x / x1) ** exponent


def frame_counts(frames: int) -> list[int]:
    """2, 4, 6, 8, 12, 16, 24, 32, ... up to ``frames``, which is the last."""
    steps = [2, 4, 6] + [b for k in range(3, 20) for b in (2**k, 3 * 2 ** (k - 1))]
    return [n for n in steps if n < frames] + [frames]


def available_memory() -> int:
    """Bytes that a process can still take here: the system's figure, or the container's limit if that is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        try:
            available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (ValueError, OSError):
            return 4 << 30
    group = Path("/sys/fs/cgroup")
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # that cache can be dropped
        limit = int((group / "memory.max").read_text())
    except (OSError, ValueError, KeyError):  # no control group, or "max"
        return available
    return max(0, min(available, limit - used))
