"""``python -m gate4d.benchmarks.gpu``: 20 tests, the GPU targets, tile shapes, the other tests, in slices that resume.

A test that fails is a row with an error, and the measuring goes on. It needs neither nvcc nor a network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..report import documents, result_files
from ..rows.target import TargetRow
from . import attention_works, pipelines, precompile, tuning
from .slices import measured, name_of, run, with_row
from .work import FULL, TINY, Setup, Work

ROOT = Path(__file__).resolve().parents[2]
SMOKE, REST = ("tests/gpu/test_smoke_gpu.py",), ("tests/gpu/test_attention_gpu.py", "tests/gpu/test_norm_rope_gpu.py")
DEFAULT_OUT = ROOT / "benchmarks" / "results" / "gpu.json"


def plan(s: Setup = FULL) -> list[Work]:
    """All measurements, the most wanted first."""
    return [*attention_works.plan(s), *pipelines.plan(s), *tuning.plan(s)]


def run_tests(name: str, paths: Sequence[str], seconds: float) -> TargetRow:
    """A row that says how many tests passed, or which failed; it never raises."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-rfE", *(str(ROOT / p) for p in paths)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(1, seconds))
    except subprocess.TimeoutExpired:
        return TargetRow("T0", name, error=f"not finished within {seconds:.0f} s")
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:] or "no output"]
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    row = TargetRow("T0", name, note=lines[-1].strip("= "))
    if done.returncode:
        row.error = "; ".join([lines[-1].strip("= "), *failed])[:2000]
    return row


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
    parser.add_argument("--skip-tests", action="store_true", help="run no tests")
    parser.add_argument("--list", action="store_true", help="print what would be measured and stop")
    parser.add_argument("--dry-run", action="store_true", help="every path at tiny sizes on the CPU; measures nothing")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes must be positive, got {args.minutes:g}")
    setup = TINY if args.dry_run else FULL
    works = [w for w in plan(setup) if not args.only or w.id.split()[0] in args.only]
    if not works:
        parser.error(f"--only {' '.join(args.only)} names no target; there are G1 to G10, and T1 for tile shapes")
    if args.list:
        print("\n".join(f"{w.id:<36} about {w.seconds:.0f} s" for w in works))
        return 0
    if not torch.cuda.is_available() and not args.dry_run:
        print(
            "there is no CUDA device: these measurements need one (torch.cuda.is_available() is False)", file=sys.stderr
        )
        return 1
    started, seconds = time.monotonic(), 60 * args.minutes

    def left() -> float:
        return seconds - (time.monotonic() - started)

    first, compiled = [], None
    if not args.resume:
        compiled = precompile.start(precompile.processes(), args.dry_run)
    if not args.skip_tests and not args.resume:
        first = [run_tests("tests, 20 first", SMOKE, min(180.0, left()))]
    if compiled is not None:  # nothing is timed beside it
        first.append(compiled(min(90.0, left() / 4)))
    result = run(works, args.out, left() / 60, resume=args.resume, first=first)
    done = not any(w.id not in measured(result) for w in works)
    if not args.skip_tests and done and left() > 30:
        with_row(args.out, run_tests("tests, the rest", REST, left()))
    result = result_files.read(args.out, "gpu")
    result["tuned"] = tuning.tuned(result)
    result_files.write(args.out, result)
    print(table(works, result))
    if any(row["error"] is not None for row in result["rows"]):
        return 1
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
