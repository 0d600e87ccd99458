"""Compiles what the measurements need in several processes, while the first tests run; Triton shares its cache."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from ..rows.target import TargetRow
from . import attention_works, tuning
from .work import Setup

# Token counts are divided by it: little work, and the same multiples of 16, by which Triton tells kernels apart.
UNIT = 16


def share(s: Setup, number: int, of: int) -> int:
    """Run every variant of a share of the measurements once; how many ran. One that fails is no concern of this."""
    works = [*attention_works.plan(s), *tuning.plan(s)]
    ran = 0
    for work in works[number::of]:
        try:
            ours, peers, _ = work.build()
        except Exception:
            continue
        tiles = peers if work.id.startswith("T1") else {}
        for step in [*ours.values(), *tiles.values()]:
            try:
                step()
                ran += 1
            except Exception:
                continue
    return ran


def start(processes: int, dry: bool) -> Callable[[float], TargetRow]:
    """Begin; the result waits so many seconds at most, ends what is left, and says what came of it."""
    command = [sys.executable, "-m", "gate4d.benchmarks.gpu.precompile", *(["dry"] if dry else [])]
    begin = time.monotonic()
    running = [
        subprocess.Popen([*command, f"{n}/{processes}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for n in range(processes)
    ]

    def wait(seconds: float) -> TargetRow:
        end, ended = time.monotonic() + max(0.0, seconds), 0
        for process in running:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                ended += 1
        failed = sum(p.returncode != 0 for p in running) - ended
        took = time.monotonic() - begin
        note = f"{processes} processes, {took:.0f} s; {ended} ended early, {failed} failed"
        return TargetRow("T0", "compiled ahead", note=note)

    return wait


def processes() -> int:
    """Half of the cores, at most 8: each of them holds a CUDA context."""
    return max(1, min(8, (os.cpu_count() or 2) // 2))


if __name__ == "__main__":
    from .work import FULL, TINY

    *dry, part = sys.argv[1:]
    number, of = map(int, part.split("/"))
    share(TINY if dry else replace(FULL, unit=UNIT), number, of)
