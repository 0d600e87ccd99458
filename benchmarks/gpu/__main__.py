"""Run the GPU tests, then measure the GPU targets, in slices that resume: ``python -m gate4d.benchmarks.gpu``."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from .works import Step, Work, plan

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_OUT = ROOT / "benchmarks" / "results" / "gpu.json"
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"


def surroundings() -> dict:
    """Device, versions and clocks."""
    about = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    for module in ("triton", "flash_attn"):
        try:
            about[module] = __import__(module).__version__
        except ImportError:
            about[module] = None
    if torch.cuda.is_available():
        about["device"] = torch.cuda.get_device_name()
        about["nvidia_smi"] = clocks()
    return about


def clocks() -> str:
    """One line of nvidia-smi, or why there is none."""
    try:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as e:
        return f"not available: {e}"


def time_step(step: Step) -> list[float]:
    """Milliseconds of every repetition, by CUDA events, the cache flushed between them."""
    import triton.testing

    return triton.testing.do_bench(step, warmup=50, rep=300, return_mode="all")


def time_few(step: Step, repeats: int) -> list[float]:
    """Milliseconds of ``repeats`` runs of a long step, which the check has already warmed."""
    if not torch.cuda.is_available():  # a dry run
        return [_seconds(step) * 1e3 for _ in range(repeats)]
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def _seconds(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def measure(work: Work, timer: Callable[[Step], list[float]] = time_step) -> dict:
    """Check, then time. A peer that cannot run is recorded with its error; ours failing fails the measurement."""
    torch.manual_seed(0)
    ours, peers, check = work.build()
    check()
    if work.repeats is not None:
        timer = partial(time_few, repeats=work.repeats)
    times: dict[str, list[float]] = {name: timer(step) for name, step in ours.items()}
    failed: dict[str, str] = {}
    for name, step in peers.items():
        try:
            times[name] = timer(step)
        except (RuntimeError, ValueError, TypeError) as e:
            failed[name] = " ".join(str(e).split())[:300]
    medians = {name: statistics.median(t) for name, t in times.items()}
    best = min((n for n in peers if n in medians), key=medians.__getitem__, default=None)
    ratio = None if best is None else min(medians[n] for n in ours) / medians[best]
    spreads = {n: (max(t) - min(t)) / medians[n] for n, t in times.items()}
    return {
        "id": work.id, "limit": work.limit, "ratio": ratio, "best_peer": best, "median_ms": medians,
        "relative_range": spreads, "times_ms": times, "failed_peers": failed, **work.extra(),
    }  # fmt: skip


def run(
    works: Sequence[Work], out: Path, minutes: float, *, resume: bool,
    measure: Callable[[Work], dict] = measure,
    clock: Callable[[], float] = time.monotonic, about: Callable[[], dict] = surroundings,
) -> dict:  # fmt: skip
    """Measure what is not in ``out`` yet and fits the time; the file is written after every measurement.

    A measurement that failed is tried again by the next slice.
    """
    result = json.loads(out.read_text()) if resume and out.exists() else {"surroundings": [], "rows": {}, "errors": {}}
    result["surroundings"].append(about())
    end = clock() + 60 * minutes
    waiting = [w for w in works if w.id not in result["rows"]]
    for work in waiting:
        if clock() + work.seconds > end:
            continue
        try:
            result["rows"][work.id] = measure(work)
            result["errors"].pop(work.id, None)
        except Exception as e:  # the other measurements are worth having
            result["errors"][work.id] = f"{type(e).__name__}: {' '.join(str(e).split())[:500]}"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return result


def table(works: Sequence[Work], result: dict) -> str:
    """A line a measurement."""
    lines = [f"{'measurement':<36} {'ratio':>7} {'target':>7}  {'ours':>9} ms  against"]
    for work in works:
        row, error = result["rows"].get(work.id), result["errors"].get(work.id)
        if row is None:
            lines.append(f"{work.id:<36} {'FAILED: ' + error if error else 'not measured yet'}")
            continue
        ours = next(iter(row["median_ms"].values()))
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        limit = "" if row["limit"] is None else f"{row['limit']:.2f}"
        lines.append(f"{work.id:<36} {ratio:>7} {limit:>7}  {ours:>9.3f} ms  {row['best_peer']}")
    return "\n".join(lines)


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
    if result["errors"]:
        return 1
    return 3 if any(w.id not in result["rows"] for w in works) else 0


if __name__ == "__main__":
    sys.exit(main())
