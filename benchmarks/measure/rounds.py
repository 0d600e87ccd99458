"""Side-by-side timing: the variants take turns in one process, so that whatever disturbs one disturbs all.

Ratios are paired (see :mod:`.ratio`). Every second round runs in reverse order, so that no variant always follows the
same one.

Load by other processes does not cancel: work that is split evenly among threads waits for the slowest of them, work
that is handed out piece by piece does not. Each round therefore records how long this process's threads stood in the
scheduler's queue (``/proc/self/task/*/schedstat``, Linux), rounds in which they had to wait are repeated as long as
time allows, and only undisturbed rounds count where there are enough of them. Nor does the scheduler's choice of cores
cancel: a worker thread that wakes on the calling thread's core waits for it. While rounds are timed that core is kept
for the calling thread (Linux).
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .ratio import Ratio, paired, paired_difference

WARM_UP_ROUNDS = 2
QUIET = 0.05  # share of its threads' time that a round may wait for other processes
QUIET_ROUNDS = 3  # fewer undisturbed rounds than these say too little


@dataclass(frozen=True)
class Comparison:
    """Raw seconds per call of each variant, one entry a round; entry ``i`` of all variants belongs together.

    ``waits`` is, per round, the share of its threads' time that this process stood in the scheduler's queue because
    others ran; empty where the system does not tell.
    """

    times: dict[str, list[float]]
    waits: list[float] = field(default_factory=list)

    @property
    def disturbed(self) -> bool:
        """True if there were too few quiet rounds, so that all had to be used."""
        return bool(self.waits) and sum(map(_quiet, self.waits)) < QUIET_ROUNDS

    def used(self, name: str) -> list[float]:
        """The seconds of the rounds that count."""
        if not self.waits or self.disturbed:
            return self.times[name]
        return [t for t, wait in zip(self.times[name], self.waits, strict=True) if _quiet(wait)]

    def only(self, *names: str) -> Comparison:
        """The same rounds with fewer variants."""
        return Comparison({name: self.times[name] for name in names}, self.waits)

    def median(self, name: str) -> float:
        """Median seconds per call."""
        return statistics.median(self.used(name))

    def medians(self) -> dict[str, float]:
        """Median seconds per call of every variant."""
        return {name: self.median(name) for name in self.times}

    def ratio(self, of: str, to: str) -> Ratio:
        """``of / to``, round by round."""
        return paired(self.used(of), self.used(to))

    def difference(self, of: str, to: str) -> Ratio:
        """``of - to`` in seconds, round by round."""
        return paired_difference(self.used(of), self.used(to))

    def warnings(self) -> list[str]:
        """What makes these figures less trustworthy."""
        if self.disturbed:
            return [f"DISTURBED: threads waited {statistics.median(self.waits):.0%} of the time for other processes"]
        drifts = {name: _drift(self.used(name)) for name in self.times}
        return [f"{name} drifted by {d - 1:+.0%} over the run" for name, d in drifts.items() if not 0.9 < d < 1.1]


def compare(
    variants: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    threads: int,
    min_rounds: int = 5,
    max_rounds: int = 31,
    calls: int = 1,
    sample_seconds: float = 0.0,
    on_round: Callable[[int], None] = lambda n: None,
) -> Comparison:
    """Time ``variants`` in turns for ``seconds`` and at least ``min_rounds``; at most ``max_rounds`` quiet ones.

    All are warmed first. On a busy machine it goes on for up to three times ``seconds`` to find ``min_rounds`` quiet
    rounds. ``calls`` of a variant make one sample, more of those that then last less than ``sample_seconds``, whose
    single calls vary by chance; ``threads`` is what torch uses.
    """
    if not variants:
        raise ValueError("variants must hold at least one callable.")
    warm = [{name: _sample(step, calls) for name, step in variants.items()} for _ in range(WARM_UP_ROUNDS)][-1]
    sampled = {name: max(calls, math.ceil(sample_seconds / seconds)) for name, seconds in warm.items()}
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    waits: list[float] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        with own_core(threads):
            started = time.perf_counter()
            for n in itertools.count():
                elapsed, quiet = time.perf_counter() - started, sum(map(_quiet, waits)) if waits else n
                if quiet >= max_rounds or (n >= min_rounds and elapsed > seconds * (1 if quiet >= min_rounds else 3)):
                    break
                waited_before, begin = waited(), time.perf_counter()
                for name in names if n % 2 == 0 else reversed(names):
                    times[name].append(_sample(variants[name], sampled[name]))
                if waited_before is not None:
                    waits.append(max(0.0, waited() - waited_before) / (time.perf_counter() - begin) / threads)
                on_round(n + 1)
    finally:
        if collecting:
            gc.enable()
    return Comparison(times, waits)


@contextlib.contextmanager
def own_core(threads: int) -> Iterator[None]:
    """Keep the calling thread on a core of its own, away from this process's other threads, if there are as many cores
    as ``threads``; nothing where the system has no such call. What starts meanwhile starts on that core."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    before: dict[int, set[int]] = {}
    try:
        if len(cores) >= max(2, threads):
            for task in _tasks():
                with contextlib.suppress(OSError):  # it has ended
                    before[task] = os.sched_getaffinity(task)
                    os.sched_setaffinity(task, cores[:1] if task == threading.get_native_id() else cores[1:])
        yield
    finally:
        for task in _tasks() if before else ():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(task, before.get(task, cores))


def _tasks() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return []


def _sample(step: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        step()  # the result is dropped at once: memory is taken and given back within the call's own time
    return (time.perf_counter() - begin) / calls


def _drift(times: list[float]) -> float:
    third = len(times) // 3
    return statistics.median(times[-third:]) / statistics.median(times[:third]) if third else 1.0


def _quiet(wait: float) -> bool:
    return wait < QUIET


def waited() -> float | None:
    """Seconds that this process's threads were ready to run and did not, since they began."""
    waits = []
    for task in _tasks():
        with contextlib.suppress(OSError):  # it has ended, or the kernel does not count
            waits.append(int(Path(f"/proc/self/task/{task}/schedstat").read_text().split()[1]))
    return sum(waits) / 1e9 if waits else None
