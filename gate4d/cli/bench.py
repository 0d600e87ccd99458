"""``gate4d bench``: measure the targets beside their peers, as a table and as JSON."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from gate4d.terminal import WIDTH, progress, wrapped

WHAT = {
    "targets": "every performance target beside its peers (default)",
    "systems": "what each of the five systems adds to its plain backbone (S1 to S6)",
    "sequences": "whole backbones over growing frame counts: speed, latency, memory, pictures, predictions",
    "peers": "one operation at one model's shape, every implementation that can run, and why the others cannot",
    "suite": "pytest-benchmark levels operation, module, system; ratios compared with the stored baseline",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``gate4d bench``."""
    parser.add_argument("what", nargs="?", default="targets", metavar="WHAT", help=_listed(WHAT))
    parser.add_argument("--only", metavar="A,B", help="these targets, backbones or suite cases (as in pytest -k)")
    parser.add_argument("--quick", action="store_true", help="fewer heads, repetitions and frame counts")
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads (default: every usable core)")
    parser.add_argument("--backend", default="auto", help="implementation of gate4d to measure (default: auto)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write results and surroundings; pictures beside"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="measure nothing: show a results file")
    parser.add_argument("--into", type=Path, metavar="DOC", help="with --markdown: replace the marked part of DOC")
    parser.add_argument("--against", type=Path, metavar="FILE", help="how far ratios are from those of a results file")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="sequences: what a process may grow by (default: 2)"
    )
    parser.add_argument("--operation", default="gated", help="peers: which operation (default: gated)")
    parser.add_argument("--shape", help="peers: a shape of the registry (default: the operation's own)")
    parser.add_argument("--frames", type=int, help="peers: frames (default: the operation's own)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="peers: dtype")
    parser.add_argument("--list", action="store_true", help="peers: measure nothing, list operations, shapes, peers")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="suite: stored ratios (default: the committed)")
    parser.add_argument("--tolerance", type=float, help="of ratios (default: suite 0.15, --against 0.10)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="suite: store this run's ratios as a baseline")


def _listed(what: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in what.items())


def run(args: argparse.Namespace) -> int:
    """0 if everything was measured (a missed target is a result), 1 if a row failed, a ratio regressed or ratios are
    apart, 130 if interrupted."""
    if args.what not in WHAT:
        raise ValueError(f"WHAT must be one of {', '.join(WHAT)}, got {args.what!r}.")
    if args.into is not None and args.markdown is None:
        raise ValueError("--into needs --markdown FILE, the results to show.")
    if args.tolerance is not None and not args.tolerance >= 0:
        raise ValueError(f"--tolerance must be 0 or more (0.15 allows 15 %), got {args.tolerance:g}.")
    if args.against is not None:
        if args.what in ("peers", "suite"):
            raise ValueError(f"--against is for targets, systems and sequences, got {args.what!r} (suite: --baseline).")
        _read(args.against)  # a bad file is said before anything is measured
    if args.markdown is not None:
        return _show(args)
    for name in ("json", "save"):
        file = getattr(args, name)
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"--{name} must be in an existing folder, got {str(file)!r}.")
    commands = {"sequences": _sequences, "peers": _peers, "suite": _suite}
    return commands.get(args.what, _targets)(args)


def _read(path: Path) -> dict:
    from gate4d.benchmarks.report import result_files

    return result_files.read(path, "targets", "systems", "sequences")


def _show(args: argparse.Namespace) -> int:
    from gate4d.benchmarks.report import documents, sequence_tables

    result = _read(args.markdown)
    if args.against is not None:
        return 0 if _agrees(args, result) else 1
    shown = sequence_tables if result["kind"] == "sequences" else documents
    text = shown.markdown(result)
    if args.into is None:
        print(text, end="")
    else:
        documents.write_into(args.into, text, result["kind"])
    return 0


def _agrees(args: argparse.Namespace, result: dict) -> bool:
    """Print how far ``result`` is from the file of ``--against``; True without one."""
    from gate4d.benchmarks.report import agreement

    if args.against is None:
        return True
    tolerance = agreement.TOLERANCE if args.tolerance is None else args.tolerance
    lines, agree = agreement.compare(result, _read(args.against), tolerance)
    print("\n" + "\n".join(lines))
    return agree


def _about(args: argparse.Namespace, threads: int, effort: str | None = None) -> dict:
    """The envelope of the results, whose heading is printed above them."""
    from gate4d.benchmarks.report import documents, result_files

    about = result_files.envelope(args.what, threads)
    about |= {"effort": effort or _effort(args), **result_files.served_by(args.backend)}
    for line in documents.heading(about):
        print("\n".join(wrapped(line, then="    ")))
    return about


def _effort(args: argparse.Namespace) -> str:
    return "quick" if args.quick else "full"


def _finish(args: argparse.Namespace, result: dict, file: Path | None, *, note: str = "") -> None:
    from gate4d.benchmarks.report import result_files

    if file is not None:
        result_files.write(file, result)
        print(f"written to {file}{note}")


def _sequences(args: argparse.Namespace) -> int:
    from gate4d.benchmarks.report import plots, sequence_tables
    from gate4d.benchmarks.sequences import backbone_curves
    from gate4d.benchmarks.sequences.contestants import EFFORTS, SEQUENCES

    if args.only == "list":
        print("\n".join(f"{s.name:<13}{s.stands_for}" for s in SEQUENCES.values()))
        return 0
    chosen = _choose(args.only, list(SEQUENCES))
    plots.pyplot()  # a missing matplotlib is said before anything is measured
    threads = _threads(args.threads)
    limits = dataclasses.replace(EFFORTS[_effort(args)], threads=threads)
    if args.memory is not None:
        if not args.memory > 0:
            raise ValueError(f"--memory must be more than 0 (GiB a process), got {args.memory:g}.")
        limits = dataclasses.replace(limits, max_bytes=int(args.memory * 2**30))
    folder = Path("benchmarks/results")
    file = args.json or (folder if folder.is_dir() else Path()) / "sequences-latest.json"
    about = _about(args, threads)
    try:
        with progress(total=backbone_curves.steps(chosen, about["effort"])) as show:
            result = backbone_curves.run(chosen, about, limits, file.with_suffix(""), show)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    for line in sequence_tables.lines(result, chosen):
        print("\n".join(wrapped(line, then="    ")) if len(line) > WIDTH else line)
    _finish(args, result, file, note=" and pictures (.png, .svg) beside it")
    return 0 if not result["errors"] and _agrees(args, result) else 1


def _peers(args: argparse.Namespace) -> int:
    from gate4d.benchmarks import registry
    from gate4d.benchmarks.rows import peer_rows, target

    if args.list:
        print("\n".join(peer_rows.listing()))
        return 0
    if args.frames is not None and args.frames < 1:
        raise ValueError(f"--frames must be at least 1, got {args.frames}.")
    registry.operation(args.operation)
    registry.shape(args.shape or "vggt.global")
    threads = _threads(args.threads)
    about = _about(args, threads)
    with _measuring(threads, 1) as show:
        effort = target.QUICK if args.quick else target.FULL
        conditions = target.Conditions(effort, threads, args.backend, lambda text: show(text, passing="round" in text))
        options = {"shape": args.shape, "frames": args.frames, "dtype": args.dtype}
        row, costs = peer_rows.measure(args.operation, conditions, **options)
    print("\n" + "\n".join(peer_rows.table(row, costs)))
    _finish(args, {**about, "rows": [row.as_dict()], "costs": costs}, args.json)
    return 0


def _suite(args: argparse.Namespace) -> int:
    from gate4d.benchmarks.suite import baseline

    tolerance = baseline.TOLERANCE if args.tolerance is None else args.tolerance
    file = args.baseline or (baseline.STORED if baseline.STORED.exists() else None)
    stored = None if file is None else baseline.load(file)
    threads = _threads(args.threads)
    about = _about(args, threads, effort="quick")
    cases, status = baseline.run_suite(threads, args.only)
    lines, worse = baseline.compare(cases, stored, about, tolerance)
    print("\n" + "\n".join(lines))
    if status or not cases:
        print("the suite failed: see above", file=sys.stderr)
        return 1
    _finish(args, {**about, "tolerance": tolerance, "cases": cases}, args.save)
    return int(worse)


def _targets(args: argparse.Namespace) -> int:
    from gate4d.benchmarks.report import documents
    from gate4d.benchmarks.rows import catalogue, target

    systems = args.what == "systems"
    targets = {name: t for name, t in catalogue.load_targets().items() if name.startswith("S") == systems}
    if args.only == "list":
        print("\n".join(f"{t.id:<4}{t.what}" for t in targets.values()))
        return 0
    chosen = _choose(args.only, list(targets))
    threads = _threads(args.threads)
    about = _about(args, threads)
    effort = target.QUICK if args.quick else target.FULL
    measured: list[target.TargetRow] = []
    interrupted = False
    with _measuring(threads, len(chosen)) as show:
        try:
            for n, name in enumerate(chosen):
                report = lambda text, n=n: show(text, done=n, passing="round" in text)  # noqa: E731
                report(f"{name}: {targets[name].what}")
                conditions = target.Conditions(effort, threads, args.backend, report)
                measured += catalogue.run_target(targets[name], conditions)
        except KeyboardInterrupt:
            interrupted = True
    result = {**about, "rows": [row.as_dict() for row in measured]}
    print("\n".join(documents.table(result)))
    _finish(args, result, args.json)
    if interrupted:
        print("interrupted: the table ends where the run did", file=sys.stderr)
        return 130
    failed = any(row.error is not None for row in measured)
    return 0 if not failed and _agrees(args, result) else 1


def _choose(only: str | None, known: list[str]) -> list[str]:
    if only is None:
        return known
    names = {name.lower(): name for name in known}
    wanted = [names.get(name.strip().lower(), name.strip()) for name in only.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError(f"--only must be names out of {', '.join(known)}, got {', '.join(unknown) or repr(only)}.")
    return [name for name in known if name in wanted]


def _threads(wanted: int | None) -> int:
    from gate4d.benchmarks.machine import usable_cores

    usable = usable_cores()
    if wanted is None:
        return usable
    if wanted < 1:
        raise ValueError(f"--threads must be at least 1, got {wanted}.")
    if wanted > usable:
        print(f"note: {wanted} threads on {usable} usable cores will take turns", file=sys.stderr)
    return wanted


@contextlib.contextmanager
def _measuring(threads: int, total: int) -> Iterator[Callable[..., None]]:
    """torch's threads set, the progress shown, and an allocation beyond the free memory an error of its row, where
    Linux would kill the whole run."""
    import torch

    from gate4d.benchmarks.measure.resident import GrowthLimit, available_memory

    before, limit = torch.get_num_threads(), GrowthLimit()
    torch.set_num_threads(threads)
    limit.set(available_memory())
    try:
        with progress(total=total) as show:
            yield show
    finally:
        limit.lift()
        torch.set_num_threads(before)
