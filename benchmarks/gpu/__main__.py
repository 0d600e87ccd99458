"""Run the GPU tests, then measure the GPU targets, in slices that resume: ``python -m gate4d.benchmarks.gpu``."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gate4d.terminal import progress

from ..measure import gpu
from ..report import documents, result_files
from ..rows.target import TargetRow
from . import attention_works, pipelines
from .work import FULL, Setup, Variant, Work

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_OUT = ROOT / "benchmarks" / "results" / "gpu.json"


def plan(s: Setup = FULL) -> list[Work]:
    """All measurements, the most wanted first."""
    return [*attention_works.plan(s), *pipelines.plan(s)]


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
    timed, failed = gpu.compare({**ours, **peers}, optional=peers, rounds=rounds, timer=timer)
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
    return [row, *work.extra()]


def run(
    works: Sequence[Work], out: Path, minutes: float, *, resume: bool,
    measure: Callable[[Work], list[TargetRow]] = measure,
    clock: Callable[[], float] = time.monotonic,
    about: Callable[[], dict] = surroundings,
) -> dict:  # fmt: skip
    """Measure what is not in ``out`` yet and fits the time; the file is written after every measurement.

    A measurement that failed is tried again by the next slice. ``slices`` are the surroundings of each of them.
    """
    now = about()
    before = result_files.read(out, "gpu") if resume and out.exists() else {"rows": [], "slices": []}
    slice = {name: now[name] for name in ("date", "hardware", "versions")}
    result = {**now, "slices": [*before["slices"], slice], "rows": before["rows"]}
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
            out.parent.mkdir(parents=True, exist_ok=True)
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


def table(works: Sequence[Work], result: dict) -> str:
    """The rows, and what is not measured yet."""
    found = {name_of(row) for row in result["rows"]}
    missing = [f"not measured yet: {work.id}" for work in works if work.id not in found]
    return "\n".join([*documents.table(result), *missing])


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: everything measured; 3: something is left for ``--resume``; 1: an error; 2: bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m gate4d.benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for this slice (default: 9)")
    parser.add_argument("--resume", action="store_true", help="keep the results in --out and measure the rest")
    parser.add_argument("--only", nargs="+", metavar="G1", help="targets to measure")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="results file")
    parser.add_argument("--skip-tests", action="store_true", help="do not run tests/gpu first")
    parser.add_argument("--list", action="store_true", help="print what would be measured and stop")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes must be positive, got {args.minutes:g}")
    works = [w for w in plan() if not args.only or w.id.split()[0] in args.only]
    if not works:
        parser.error(f"--only {' '.join(args.only)} names no target; there are G1 to G10")
    if args.list:
        print("\n".join(f"{w.id:<36} about {w.seconds:.0f} s" for w in works))
        return 0
    if not torch.cuda.is_available():
        print(
            "there is no CUDA device: these measurements need one (torch.cuda.is_available() is False)", file=sys.stderr
        )
        return 1
    started = time.monotonic()
    if not args.skip_tests and not args.resume:
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "gpu")], check=False)
        if tests.returncode:
            print("the GPU tests fail: nothing is measured", file=sys.stderr)
            return 1
    left = args.minutes - (time.monotonic() - started) / 60
    result = run(works, args.out, left, resume=args.resume)
    print(table(works, result))
    if any(row["error"] is not None for row in result["rows"]):
        return 1
    return 3 if any(w.id not in measured(result) for w in works) else 0


if __name__ == "__main__":
    sys.exit(main())
