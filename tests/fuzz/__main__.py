"""``make fuzz MINUTES=30``: random cases against the oracle, under every instruction set that this machine has.

Every case follows from its number: ``--seed N --cases 1`` runs it again. Workers are processes of their own, since the
library chooses its kernels once and since a case that crashes must not end the run. Returns 1 after a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ISAS = ("avx512_bf16", "avx512", "avx2", "portable")
BACKENDS = ("cpu", "cpu", "cpu", "cpu", "reference")
_KINDS = 6  # different failures that a worker shrinks before it only counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="for all instruction sets together (default 1)")
    parser.add_argument("--cases", type=int, help="cases of each instruction set, instead of minutes")
    parser.add_argument("--seed", type=int, help="number of the first case (default: from the clock)")
    parser.add_argument("--isa", choices=ISAS, help="only this instruction set")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.minutes <= 0 or (args.cases is not None and args.cases < 1) or (args.seed or 0) < 0:
        parser.error("--minutes and --cases must be positive, --seed must not be negative")
    if args.worker is not None:
        return worker(args.worker, args.seed, args.cases, args.minutes)
    first = int(time.time()) % 10**8 * 100 if args.seed is None else args.seed
    sets = [args.isa] if args.isa else available()
    print(f"fuzz: instruction sets {', '.join(sets)}; first case --seed {first}", flush=True)
    reports = []
    for isa in sets:
        reports.append(r := parent(isa, first, args.cases, args.minutes / len(sets)))
        print(f"{isa}: {r['cases']} cases in {r['seconds']:.0f} s, {r['failures']} failures", flush=True)
    failures = sum(r["failures"] for r in reports)
    ratios: dict[str, float] = {}
    for r in reports:
        ratios = {name: max(r["ratios"].get(name, 0), ratios.get(name, 0)) for name in {**ratios, **r["ratios"]}}
    shares = ", ".join(f"{name} {share:.2g}" for name, share in sorted(ratios.items()))
    print(f"largest share of the allowed distance: {shares}")
    print(f"fuzz: {sum(r['cases'] for r in reports)} cases, {failures} failures")
    return int(failures > 0)


def available() -> list[str]:
    """The instruction sets whose kernels run here."""
    code = "import torch, gate4d; print(torch.ops.gate4d.cpu_isa())"
    chosen = []
    for isa in ISAS:
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"GATE4D_CPU_ISA": isa}, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"fuzz: the compiled kernels are missing or do not load:\n{done.stderr[-800:]}")
        if done.stdout.split()[-1] not in chosen:
            chosen.append(done.stdout.split()[-1])
    return chosen


def parent(isa: str, first: int, cases: int | None, minutes: float) -> dict:
    """Workers of one instruction set until its time or its cases are used up: a new one after each crash."""
    total = {"cases": 0, "seconds": 0.0, "failures": 0, "ratios": {}}
    end = time.monotonic() + 60 * minutes
    while (cases is None or total["cases"] < cases) and (cases is not None or time.monotonic() < end):
        with tempfile.TemporaryDirectory() as folder:
            journal = Path(folder) / "journal"
            left = [] if cases is None else ["--cases", str(cases - total["cases"])]
            command = [sys.executable, "-m", __package__, "--worker", str(journal), "--seed", str(first), *left]
            command += ["--minutes", str(max((end - time.monotonic()) / 60, 1e-3))]
            done = subprocess.run(command, env=os.environ | {"GATE4D_CPU_ISA": isa})
            if not journal.exists():
                raise SystemExit(f"fuzz: a worker ended with status {done.returncode} before its first case.")
            report = json.loads(journal.read_text())
            for name in ("cases", "seconds", "failures"):
                total[name] += report[name]
            for name, share in report["ratios"].items():
                total["ratios"][name] = max(share, total["ratios"].get(name, 0.0))
            if report["done"]:
                return total
            if done.returncode in (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT, -signal.SIGHUP):
                name = signal.Signals(-done.returncode).name
                raise SystemExit(
                    f"fuzz: {name} ended the worker at case {report['seed']} under {isa}: somebody sent it, or memory "
                    "ran out. This is no result."
                )
            total["failures"] += 1
            total["cases"] += 1
            crashed(isa, report["seed"], done.returncode)
            first = report["seed"] + 1
    return total


def crashed(isa: str, seed: int, status: int) -> None:
    """Shrinks a case that ends its process and prints it; each trial is a process."""
    from .cases import Case, random_case
    from .shrink import shrink, snippet

    def fails(case: Case) -> bool:
        code = f"from {__package__}.cases import Case\nfrom {__package__}.check import check\n"
        code += f"try:\n check({case.code()})\nexcept Exception:\n pass"
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"GATE4D_CPU_ISA": isa}, capture_output=True
        )
        return done.returncode not in (0, 1)

    case = random_case(seed, BACKENDS)
    print(f"\nCRASH of case {seed} under {isa}, status {status}")
    if fails(case):
        case = shrink(case, fails, seconds=180)
    print(snippet(case, isa, "the process ends"), flush=True)


def worker(journal: Path, first: int, cases: int | None, minutes: float) -> int:
    """Runs cases in this process; ``journal`` names the one that runs, so that a crash can be told."""
    import torch

    from .cases import random_case
    from .check import Failure, check
    from .shrink import shrink, snippet

    isa, begin = torch.ops.gate4d.cpu_isa(), time.monotonic()
    report = {"seed": first, "cases": 0, "seconds": 0.0, "failures": 0, "ratios": {}, "done": False}
    kinds: set[str] = set()

    def note() -> None:
        report["seconds"] = time.monotonic() - begin
        partial = journal.with_suffix(".new")
        partial.write_text(json.dumps(report))
        partial.replace(journal)

    while report["cases"] != cases and (cases is not None or time.monotonic() - begin < 60 * minutes):
        report["seed"] = first + report["cases"]
        note()
        case = random_case(report["seed"], BACKENDS)
        try:
            check(case, ratios=report["ratios"])
        except Exception as error:
            report["failures"] += 1
            kind = error.kind if isinstance(error, Failure) else f"{type(error).__name__}: {str(error)[:60]}"
            if (kind, case.backend) not in kinds and len(kinds) < _KINDS:
                kinds.add((kind, case.backend))
                smallest = shrink(case, lambda c, kind=kind: _kind(c) == kind, seconds=60)
                print(f"\nFAILURE of case {report['seed']} under {isa}: {error}\n{case.code()}\nshrunk:")
                print(snippet(smallest, isa, kind), flush=True)
        report["cases"] += 1
    report["done"] = True
    note()
    return 0


def _kind(case) -> str | None:
    """How a case fails; None if it does not."""
    from .check import Failure, check

    try:
        check(case)
    except Failure as error:
        return error.kind
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:60]}"
    return None


if __name__ == "__main__":
    sys.exit(main())
