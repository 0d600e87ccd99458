"""``gate4d bench suite``: run the files beside this one and compare its ratios with stored ones.

Times differ from machine to machine and are never compared. A ratio of gate4d's time to a peer's of the same run
regresses when it exceeds the stored one by more than the tolerance, its own spread taken off.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gate4d.terminal import table

from ..report import result_files

TOLERANCE = 0.15
FOLDER = Path(__file__).parents[1]
STORED = FOLDER / "results" / "baseline.json"


def run_suite(threads: int, only: str | None = None) -> tuple[dict[str, dict], int]:
    """``{case: {"ratio", "spread", "seconds", "peer_seconds", "rounds"}}`` and pytest's exit status.

    Raises:
        ImportError: pytest or pytest-benchmark is missing; names the extra.
    """
    try:
        import pytest_benchmark  # noqa: F401
    except ImportError:
        raise ImportError("the suite needs pytest and pytest-benchmark: pip install 'gate4d[bench]'.") from None
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "benchmark.json"
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(FOLDER),
            f"--benchmark-json={file}", "--benchmark-columns=median,iqr,rounds", "--benchmark-disable-gc",
            str(FOLDER / "suite"), *(["-k", only] if only else []),
        ]  # fmt: skip
        code = "import sys, torch, pytest; torch.set_num_threads(int(sys.argv[1])); sys.exit(pytest.main(sys.argv[2:]))"
        done = subprocess.run([sys.executable, "-c", code, str(threads), *command[3:]], check=False)
        data = json.loads(file.read_text()) if file.exists() and file.stat().st_size else {"benchmarks": []}
    found = {b["name"].removeprefix("test_"): {**b["extra_info"], "seconds": b["stats"]["median"]}
             for b in data["benchmarks"] if "ratio" in b["extra_info"]}  # fmt: skip
    return found, done.returncode


def load(path: Path) -> dict:
    """A stored baseline.

    Raises:
        ValueError: the file is not one.
    """
    what = "a baseline of `gate4d bench suite --save`"
    stored = result_files.read(path, "suite")
    # All that compare() reads: what is wrong is said before the suite has run for minutes.
    for place, kind in _READ.items():
        value: Any = stored
        for key in place:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise ValueError(f"{path} is not {what}: {'.'.join(place)} must be a {kind.__name__}, got {value!r:.60}.")
    for name, case in stored["cases"].items():
        ratio = case.get("ratio") if isinstance(case, dict) else None
        if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 < ratio < math.inf:
            raise ValueError(f"{path} is not {what}: the ratio of {name} must be a number > 0, got {ratio!r:.60}.")
    return stored


_READ = {
    ("cases",): dict,
    ("date",): str,
    ("versions", "gate4d"): str,
    ("hardware", "processor"): str,
    ("hardware", "capability"): str,
}


def regressed(now: dict, before: dict, tolerance: float) -> bool:
    """Whether a ratio grew beyond the tolerance, by more than it varied in this run."""
    return now["ratio"] - now["spread"] > before["ratio"] * (1 + tolerance)


def compare(cases: dict[str, dict], stored: dict | None, about: dict, tolerance: float) -> tuple[list[str], bool]:
    """Lines of at most 80 columns, and whether anything regressed."""
    before = stored["cases"] if stored else {}
    rows: list = []
    if stored:
        here, there = about["hardware"], stored["hardware"]
        rows.append(f"baseline of {stored['date'][:10]}, gate4d {stored['versions']['gate4d']}; ratios alone count")
        if (here["processor"], here["capability"]) != (there["processor"], there["capability"]):
            other = f"{there['processor']}, {there['capability']}"
            rows.append(f"note: it is from other hardware ({other}): compare with care")
    rows.append(("gate4d / peer", "ratio", "+-", "stored", "  verdict"))
    worse = False
    for name, now in cases.items():
        then = before.get(name)
        verdict = "new" if then is None else "ok"
        if then is not None and regressed(now, then, tolerance):
            verdict, worse = f"REGRESSED by {now['ratio'] / then['ratio'] - 1:.0%}", True
        old = "" if then is None else f"{then['ratio']:.3f}"
        rows.append((name[:38], f"{now['ratio']:.3f}", f"{now['spread']:.3f}", old, f"  {verdict}"))
    gone = sorted(set(before) - set(cases))
    return table("<38 >9 >8 >9 <16", [*rows, *(f"not run: {name}" for name in gone)]), worse
