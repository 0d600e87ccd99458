"""Measurements in slices of time that resume: each row is written when it is there."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gate4d.terminal import progress

from .. import machine
from ..measure import gpu
from ..report import result_files
from ..rows.target import TargetRow
from .work import Variant, Work


def surroundings() -> dict:
    """The envelope of the results."""
    command = shlex.join(["python", "-m", "gate4d.benchmarks.gpu", *sys.argv[1:]])
    return result_files.envelope("gpu", torch.get_num_threads(), command=command)


def measure(work: Work, timer: Callable[[Variant], float] = gpu.sample) -> list[TargetRow]:
    """Check, then time in turns. A peer that cannot run is recorded with its error; ours failing fails the measurement.

    The row's ratio is that of the first of ours, the default, to the fastest peer; the best of ours is in the note.
    """
    torch.manual_seed(0)
    ours, peers, check = work.build()
    check()
    rounds = gpu.ROUNDS
    if work.repeats is not None:
        timer, rounds = gpu.single, work.repeats
    timed, failed = gpu.compare({**ours, **peers}, optional=peers, rounds=rounds, timer=timer, seconds=work.seconds)
    medians, default = timed.medians(), next(iter(ours))
    against = {name: timed.ratio(default, name).median for name in peers if name in medians}
    id, _, what = work.id.partition(" ")
    row = TargetRow(id, what, None, work.limit, medians=medians, times=timed.times)
    row.peers = {**against, **{name: f"failed, {error}" for name, error in failed.items()}}
    notes = timed.warnings()
    if against:
        fastest, best = (min(names, key=medians.__getitem__) for names in (against, ours))
        row.ratio, row.spread = timed.ratio(default, fastest)
        note = f"{default} / {fastest}"
        if len(ours) > 1:
            note += f"; best of ours: {best}, {timed.ratio(best, fastest).median:.3f}"
        notes = [note, *notes]
    row.note = "; ".join(notes)
    row.clocks = machine.gpu_clocks() if torch.cuda.is_available() else ""
    return [row, *work.extra()]


def with_row(out: Path, row: TargetRow) -> None:
    """Add a row to the results file, in place of the one it repeats."""
    result = result_files.read(out, "gpu")
    result["rows"] = [r for r in result["rows"] if name_of(r) != f"{row.id} {row.what}"] + [row.as_dict()]
    result_files.write(out, result)


def run(
    works: Sequence[Work], out: Path, minutes: float, *, resume: bool,
    measure: Callable[[Work], list[TargetRow]] = measure,
    clock: Callable[[], float] = time.monotonic,
    about: Callable[[], dict] = surroundings,
    first: Sequence[TargetRow] = (),
) -> dict:  # fmt: skip
    """Measure what is not in ``out`` yet and fits the time; the file is written at once, with the rows ``first``, and
    after every measurement.

    A measurement that failed is tried again by the next slice. ``slices`` are the surroundings of each of them.
    """
    now = about()
    before = result_files.read(out, "gpu") if resume and out.exists() else {"rows": [], "slices": []}
    slice = {name: now[name] for name in ("date", "hardware", "versions")}
    result = {**now, "slices": [*before["slices"], slice], "rows": before["rows"]}
    names = {f"{row.id} {row.what}" for row in first}
    result["rows"] = [row for row in result["rows"] if name_of(row) not in names] + [row.as_dict() for row in first]
    out.parent.mkdir(parents=True, exist_ok=True)
    result_files.write(out, result)
    end = clock() + 60 * minutes
    waiting = [w for w in works if w.id not in measured(result)]
    with progress(total=len(waiting)) as show:
        for n, work in enumerate(waiting):
            if clock() + work.seconds > end:
                continue
            show(work.id, done=n)
            try:
                found = measure(work)
            except Exception as e:  # the other measurements are worth having
                id, _, what = work.id.partition(" ")
                found = [TargetRow(id, what, error=f"{type(e).__name__}: {' '.join(str(e).split())[:500]}")]
            result["rows"] = [row for row in result["rows"] if name_of(row) != work.id]
            result["rows"] += [row.as_dict() for row in found]
            result_files.write(out, result)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return result


def name_of(row: dict) -> str:
    """The measurement that a row is of."""
    return f"{row['id']} {row['what']}".rstrip()


def measured(result: dict) -> set[str]:
    """What was measured without an error."""
    return {name_of(row) for row in result["rows"] if row["error"] is None}
