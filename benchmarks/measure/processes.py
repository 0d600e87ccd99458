"""Implementations side by side over a growing number of frames, each in a process of its own.

At each frame count every implementation runs once, in turn, and its memory is measured. An implementation stops where
its next count is expected to exceed its share of the time budget, or where it runs out of memory: its process may grow
by so many bytes, beyond which allocations fail there and nowhere else. The others go on.

Then come a warm-up round and others in alternating order. What changes meanwhile is the machine: a neighbour's traffic
on the same memory comes and goes within seconds and slows some implementations more than others. The rounds of a count
are therefore spread over the whole study rather than run in a row, and in a round the implementations take turns part
by part: a frame of a stream, a layer of a clip. Freed memory is kept for the next block in rounds and given back in
first runs: memory is then what an implementation holds, and time is what it computes.

Processes wait passively between parallel sections, and their threads stay on a core each (OMP_WAIT_POLICY,
OMP_PROC_BIND and OMP_PLACES, unless they are set). By chance, threads that spin while another process has their core
make small operations many times slower, and two threads of a process that wake on one core cost it 5 to 10 %.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from .curves import Curve, Point, Study
from .resident import available_memory
from .rounds import QUIET, QUIET_ROUNDS

Outputs = Mapping[str, np.ndarray]
Run = Callable[[int], Iterable[Tensor]]  # frames to outputs, part by part: see Contestant
Progress = Callable[[float, str], None]  # the share that is done, and of what
FIRST_RUNS, WARM_UPS = 0.3, 0.1  # of the progress: about their shares of the time


@dataclass(frozen=True)
class Contestant:
    """An implementation: a setup and its arguments.

    Attributes:
        name: shown in tables and pictures.
        setup: ``"module:function"``; the function, called with ``arguments`` (which go through JSON), returns
            ``run(frames)``, an iterable of tensors whose first axis is frames: one for a clip, one per frame for a
            stream. Empty ones between them are where others may take their turn.
        group: contestants of one group compute the same thing.
    """

    name: str
    setup: str
    arguments: dict
    group: str = ""


@dataclass(frozen=True)
class Limits:
    """What is allowed.

    Attributes:
        budget: seconds for all contestants together, shared equally among those that still run.
        max_bytes: what a contestant's process may grow by.
        repeat_seconds: a count is repeated until a contestant has this long on average, in at most ``max_rounds``.
        min_rounds: repetitions of a count whose calls are too long for that, as far as the budget goes.
        sample_seconds: in a round, calls of a contestant are put together until they last this long.
        threads: of torch; 0 leaves torch's choice.
    """

    budget: float = 60.0
    max_bytes: int = 4 << 30
    repeat_seconds: float = 1.0
    max_rounds: int = 5
    min_rounds: int = 0
    sample_seconds: float = 0.0
    threads: int = 0


class WorkerDied(RuntimeError):
    """A worker ended before it answered."""


class Worker:
    """A fresh process with one contestant; see :mod:`.worker` for what it answers."""

    def __init__(self, contestant: Contestant, limits: Limits, folder: Path):
        self.name = contestant.name
        self.limited = True  # whether the process itself keeps to the memory limit; its first answer says
        file = folder / "".join(c for c in contestant.name if c.isalnum())
        config = {"setup": contestant.setup, "arguments": contestant.arguments, "threads": limits.threads}
        file.with_suffix(".json").write_text(json.dumps(config))
        self._log = file.with_suffix(".log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gate4d.benchmarks.measure.worker", str(file.with_suffix(".json"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={"OMP_WAIT_POLICY": "passive", "OMP_PROC_BIND": "true", "OMP_PLACES": "cores", **os.environ},
        )  # fmt: skip

    def answer(self) -> dict:
        """The next message; raises WorkerDied with what the process left behind."""
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        last = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
        if code < 0:
            why = ", most likely for lack of memory" if -code == signal.SIGKILL else ""
            raise WorkerDied(f"killed by signal {-code}{why}")
        raise WorkerDied(last)

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
    contestants: Sequence[Contestant],
    counts: Sequence[int],
    limits: Limits,
    progress: Progress = lambda share, text: None,
    verify: Callable[[int, Outputs], None] = lambda frames, outputs: None,
) -> Study:
    """Measure every contestant at every count.

    ``progress`` is called with the share that is done and a description before each first run and before each round;
    ``verify`` with the outputs at a count before it is timed further, and raises if they are wrong.

    Raises:
        RuntimeError: a contestant failed for another reason than memory or time, or gave numbers that are not finite.
    """
    curves = [Curve(c.name) for c in contestants]
    study = Study(list(counts), curves)
    with tempfile.TemporaryDirectory(prefix="gate4d-study-") as scratch:
        folder = Path(scratch)
        workers: list[Worker] = []
        try:
            for contestant in contestants:
                workers.append(Worker(contestant, limits, folder))
            for worker in workers:
                try:
                    ready = worker.answer()
                except WorkerDied as e:
                    raise RuntimeError(f"{worker.name} did not start: {e}") from None
                worker.limited = ready["limited"]
                study.memory_method, study.threads = ready["method"], ready["threads"]
            firsts = itertools.count()
            repeated: list[_Repeated] = []
            for n in counts:
                outputs: dict[str, np.ndarray] = {}
                at = _Repeated(n, limits)
                for worker, curve in zip(workers, curves, strict=True):
                    progress(FIRST_RUNS * next(firsts) / len(counts) / len(workers), f"{n} frames, {curve.name}")
                    left = _seconds_left(curve, curves, limits.budget)
                    reply = _advance(worker, curve, n, limits, left, folder, outputs)
                    if reply is not None:
                        at.enter(worker, curve, reply)
                if outputs:
                    study.tokens_per_frame = next(iter(outputs.values())).shape[1]
                    verify(n, outputs)
                    if (difference := _largest_difference(contestants, outputs)) is not None:
                        study.differences[n] = difference
                    repeated.append(at)
            left = limits.budget - sum(c.spent for c in curves)
            study.together = _repeat(repeated, left, available_memory(), progress)
        finally:
            for worker in workers:
                worker.close()
    return study


def _advance(
    worker: Worker,
    curve: Curve,
    frames: int,
    limits: Limits,
    left: float,
    folder: Path,
    outputs: dict[str, np.ndarray],
) -> dict | None:
    """The first run at ``frames``, or note why the curve stops."""
    if curve.stopped:
        return None
    seconds = 2 * extrapolate([(p.frames, p.seconds) for p in curve.points], frames)  # first run and warm-up round
    if seconds > left:
        expected = f"about {seconds:.0f} s expected, {max(left, 0):.0f} s of its budget left"
        curve.stop(frames, "time", f"before {frames} frames: {expected}")
        return None
    peak = extrapolate([(p.frames, p.peak_bytes) for p in curve.points], frames)
    limit = f"limit {limits.max_bytes / 2**30:.3g} GiB"
    if not worker.limited and peak > limits.max_bytes:
        curve.stop(frames, "memory", f"before {frames} frames: about {peak / 2**30:.1f} GiB expected, {limit}")
        return None
    save = folder / "out.npy"
    reply = _ask(worker, curve, frames, {"frames": frames, "max_bytes": limits.max_bytes, "save": str(save)})
    if "died" in reply:
        curve.stop(frames, "memory", f"at {frames} frames: {reply['died']}")
        return None
    if "out_of_memory" in reply or reply["peak_bytes"] > limits.max_bytes:
        curve.stop(frames, "memory", f"at {frames} frames: out of memory, {limit}")
        curve.spent += reply.get("seconds", 0.0)
        return None
    curve.points.append(Point(frames, (reply["seconds"],), reply["peak_bytes"], (reply["latency"],), reply["wait"]))
    curve.spent += reply["seconds"]
    outputs[curve.name] = np.load(save)
    if not np.isfinite(outputs[curve.name]).all():
        raise RuntimeError(f"{curve.name} gave outputs that are not finite at {frames} frames.")
    return reply


def _ask(worker: Worker, curve: Curve, frames: int, request: dict) -> dict:
    """The worker's reply, or ``{"died": why}`` for want of memory; any other failure ends the study."""
    try:
        return worker.ask(**request)
    except WorkerDied as e:
        if "memory" not in str(e):
            raise RuntimeError(f"{curve.name} failed at {frames} frames: {e}") from None
        return {"died": str(e)}


class _Repeated:
    """A frame count, those who ran it, and its rounds."""

    def __init__(self, frames: int, limits: Limits):
        self.frames, self.limits = frames, limits
        self.running: list[tuple[Worker, Curve]] = []
        self.first: dict[str, dict] = {}
        self.warm: dict[str, dict] = {}  # the first run, then the warm-up round
        self.rounds: list[dict[str, dict]] = []

    def enter(self, worker: Worker, curve: Curve, first: dict) -> None:
        """Add who ran it and what its first run was like."""
        self.running.append((worker, curve))
        self.first[curve.name] = self.warm[curve.name] = first

    def calls(self, name: str) -> int:
        """Of a contestant, in a round."""
        return max(1, math.ceil(self.limits.sample_seconds / max(1e-9, self.warm[name]["seconds"])))

    @property
    def seconds(self) -> float:
        """What a round takes."""
        return max(1e-9, sum(self.calls(c.name) * self.warm[c.name]["seconds"] for _, c in self.running))

    @property
    def quiet(self) -> list[dict[str, dict]]:
        """The rounds in which no process had to wait for others."""
        return [r for r in self.rounds if _quiet(r)]

    def wanted(self, left: float) -> int:
        """How many rounds, with ``left`` seconds of the budget."""
        s, affordable = self.limits, int(left / self.seconds)
        short = int(s.repeat_seconds * len(self.running) / self.seconds)
        return min(s.max_rounds, max(short, min(s.min_rounds, affordable)))

    def warm_up(self, available: int, together: bool) -> None:
        """A round of single calls, which counts only if there is no other."""
        self.warm |= self._round({c.name: 1 for _, c in self.running}, available, together)

    def round(self, available: int, together: bool) -> None:
        """One more, in the other order."""
        calls = {c.name: self.calls(c.name) for _, c in self.running}
        if found := self._round(calls, available, together):
            self.rounds.append(found)

    def _round(self, calls: Mapping[str, int], available: int, together: bool) -> dict[str, dict]:
        """``together`` if what the contestants hold fits into memory side by side: then they take turns. Who runs out
        of memory, although the first run fitted, keeps that one's figures and takes no further part."""
        found: dict[str, dict] = {}
        waiting = self.running if len(self.rounds) % 2 == 0 else self.running[::-1]
        begin = True
        while waiting:
            unfinished = []
            for worker, curve in waiting:
                request = {
                    "frames": self.frames, "max_bytes": available, "calls": calls[curve.name], "together": together,
                }  # fmt: skip
                reply = _ask(worker, curve, self.frames, request if begin else {"turn": True})
                if "more" in reply:
                    unfinished.append((worker, curve))
                elif "seconds" in reply:  # else it ran out of memory
                    found[curve.name] = reply
                    curve.spent += reply["seconds"] * calls[curve.name]
            waiting, begin = unfinished, False
        self.running = [(w, c) for w, c in self.running if c.name in found]
        return found

    def finish(self) -> None:
        """The rounds that count become the points: the undisturbed ones if there are enough of them."""
        counted = self.quiet if len(self.quiet) >= QUIET_ROUNDS else self.rounds or [self.warm]
        for _, curve in self.running:
            own = [r[curve.name] for r in counted]
            point = Point(
                self.frames,
                tuple(r["seconds"] for r in own),
                self.first[curve.name]["peak_bytes"],
                tuple(r["latency"] for r in own),
                max((r["wait"] for r in own if r["wait"] is not None), default=None),
            )
            curve.points[[p.frames for p in curve.points].index(self.frames)] = point


def _repeat(repeated: Sequence[_Repeated], left: float, available: int, progress: Progress) -> bool:
    """The rounds of all counts: a warm-up round of each, then the others spread evenly over the time that they take.
    Rounds in which a process had to wait for others are repeated, as many again at most.

    ``left`` is what all contestants have left of the budget, ``available`` the free memory. Returns whether they fit
    into it side by side.
    """
    peaks: dict[str, int] = collections.defaultdict(int)
    for at in repeated:
        for name, reply in at.first.items():
            peaks[name] = max(peaks[name], reply["peak_bytes"])
    together = 3 * sum(peaks.values()) < available  # blocks that are kept have gaps between them
    plan: list[tuple[float, _Repeated]] = []
    rounds: dict[int, int] = {}
    for i, at in enumerate(repeated):
        progress(FIRST_RUNS + WARM_UPS * i / len(repeated), f"{at.frames} frames, warm-up round")
        at.warm_up(available, together)
        left -= at.seconds
    for at in repeated:
        rounds[at.frames] = wanted = at.wanted(left)
        left -= wanted * at.seconds
        plan += [((i + 0.5) / wanted, at) for i in range(wanted)]
    plan.sort(key=lambda entry: entry[0])
    total, spent = sum(at.seconds for _, at in plan), 0.0
    for again in (False, True):
        for _, at in plan:
            if again and len(at.quiet) >= rounds[at.frames]:
                continue
            share = 1.0 if again else FIRST_RUNS + WARM_UPS + (1 - FIRST_RUNS - WARM_UPS) * spent / total
            progress(share, f"{at.frames} frames, rounds")
            spent += at.seconds
            at.round(available, together)
    for at in repeated:
        at.finish()
    return together


def _quiet(replies: Mapping[str, dict]) -> bool:
    """Whether no contestant had to wait for other processes in this round, as far as the system tells."""
    return all(r["wait"] is None or r["wait"] < QUIET for r in replies.values())


def _seconds_left(curve: Curve, curves: Sequence[Curve], budget: float) -> float:
    """What is left of the curve's equal share; a curve that stopped leaves the rest of its share to the others."""
    running = sum(c.stopped is None for c in curves)
    share = (budget - sum(c.spent for c in curves if c.stopped)) / max(1, running)
    return share - curve.spent


def _largest_difference(contestants: Sequence[Contestant], outputs: Outputs) -> float | None:
    found = []
    for group in {c.group for c in contestants}:
        first, *others = [outputs[c.name] for c in contestants if c.group == group and c.name in outputs] or [None]
        found += [relative_difference(o, first) for o in others]
    return max(found, default=None)


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
