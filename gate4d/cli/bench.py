"""``gate4d bench``: measure the targets beside their peers, as a table and as JSON."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from .terminal import terminal

_WIDTH = 80
_COLUMNS = "{:<4}{:<37}{:>11}{:>7}{:>13}{:>8}"


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
        from gate4d.benchmarks.report import documents as report

        if args.what in ("peers", "suite"):
            raise ValueError(f"--against is for targets, systems and sequences, got {args.what!r} (suite: --baseline).")
        report.load(args.against)  # a bad file is said before anything is measured
    if args.markdown is not None:
        return _show(args)
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json must be in an existing folder, got {str(args.json)!r}.")
    commands = {"sequences": _sequences, "peers": _peers, "suite": _suite}
    return commands.get(args.what, _targets)(args)


def _show(args: argparse.Namespace) -> int:
    from gate4d.benchmarks.report import documents as report

    result = report.load(args.markdown)
    if args.against is not None:
        return 0 if _agrees(args, result) else 1
    text = report.markdown(result)
    if args.into is None:
        print(text, end="")
    else:
        report.write_into(args.into, text, report.KINDS[report.kind(result)])
    return 0


def _agrees(args: argparse.Namespace, result: dict) -> bool:
    """Print how far ``result`` is from the file of ``--against``; True without one."""
    from gate4d.benchmarks.report import agreement
    from gate4d.benchmarks.report import documents as report

    if args.against is None:
        return True
    tolerance = agreement.TOLERANCE if args.tolerance is None else args.tolerance
    lines, agree = agreement.compare(result, report.load(args.against), tolerance)
    print("\n" + "\n".join(lines))
    return agree


def _surroundings(args: argparse.Namespace, effort, threads: int) -> dict:
    """Hardware and versions, printed above every result."""
    from gate4d.benchmarks.report import documents as report
    from gate4d.benchmarks.rows import target as rows

    about = report.surroundings(rows.Settings(effort, threads, args.backend), report.command_line())
    for line in report.heading(about):
        print(textwrap.fill(line, _WIDTH, subsequent_indent="    "))
    return about


def _sequences(args: argparse.Namespace) -> int:
    from gate4d.benchmarks.report import documents as report
    from gate4d.benchmarks.report import plots
    from gate4d.benchmarks.sequences import backbone_curves as sequences

    if args.only == "list":
        print("\n".join(f"{s.name:<13}{s.stands_for}" for s in sequences.SEQUENCES.values()))
        return 0
    chosen = _choose(args.only, list(sequences.SEQUENCES))
    plots.pyplot()  # a missing matplotlib is said before anything is measured
    effort = sequences.QUICK if args.quick else sequences.FULL
    if args.memory is not None:
        if not args.memory > 0:
            raise ValueError(f"--memory must be more than 0 (GiB a process), got {args.memory:g}.")
        effort = dataclasses.replace(effort, max_bytes=int(args.memory * 2**30))
    results = Path("benchmarks/results")
    file = args.json or (results if results.is_dir() else Path()) / "sequences-latest.json"
    threads = _threads(args.threads)
    about = _surroundings(args, effort, threads)
    with _progress(sequences.steps(chosen, effort)) as step:
        try:
            lines, complete = sequences.run(chosen, effort, about, threads, file, step)
        except KeyboardInterrupt:
            print("interrupted: nothing was written", file=sys.stderr)
            return 130
    for line in lines:
        print("\n".join(textwrap.wrap(line, _WIDTH, subsequent_indent="    ")) if len(line) > _WIDTH else line)
    print(f"written to {file} and pictures (.png, .svg) beside it")
    return 0 if complete and _agrees(args, report.load(file)) else 1


def _peers(args: argparse.Namespace) -> int:
    from gate4d.benchmarks import registry
    from gate4d.benchmarks.rows import peer_rows as versus
    from gate4d.benchmarks.rows import target as rows

    if args.list:
        print("\n".join(versus.listing()))
        return 0
    if args.frames is not None and args.frames < 1:
        raise ValueError(f"--frames must be at least 1, got {args.frames}.")
    registry.operation(args.operation)
    registry.shape(args.shape or "vggt.global")
    threads = _threads(args.threads)
    effort = rows.QUICK if args.quick else rows.FULL
    about = _surroundings(args, effort, threads)
    with _torch_threads(threads), _memory_limit(), _progress(1) as step:
        settings = rows.Settings(effort, threads, args.backend, lambda text: step(0, text))
        row, costs = versus.measure(args.operation, settings, shape=args.shape, frames=args.frames, dtype=args.dtype)
    lines = versus.table(row, costs)
    print("\n" + "\n".join(part for line in lines for part in textwrap.wrap(line, _WIDTH) or [""]))
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "kind": "peers", "row": row.as_dict(), "costs": costs}) + "\n")
    return 0


def _suite(args: argparse.Namespace) -> int:
    from gate4d.benchmarks.rows import target as rows
    from gate4d.benchmarks.suite import baseline

    tolerance = baseline.TOLERANCE if args.tolerance is None else args.tolerance
    file = args.baseline or (baseline.STORED if baseline.STORED.exists() else None)
    stored = None if file is None else baseline.load(file)
    if args.save is not None and not args.save.absolute().parent.is_dir():
        raise ValueError(f"--save must be in an existing folder, got {str(args.save)!r}.")
    threads = _threads(args.threads)
    about = _surroundings(args, rows.QUICK, threads)
    cases, status = baseline.run_suite(threads, args.only)
    lines, worse = baseline.compare(cases, stored, about, tolerance)
    print("\n" + "\n".join(lines))
    if status or not cases:
        print("the suite failed: see above", file=sys.stderr)
        return 1
    if args.save is not None:
        data = {**about, "kind": "suite", "tolerance": tolerance, "cases": cases}
        args.save.write_text(json.dumps(data, indent=1) + "\n")
        print(f"written to {args.save}")
    return int(worse)


def _targets(args: argparse.Namespace) -> int:
    from gate4d.benchmarks.report import documents as report
    from gate4d.benchmarks.rows import target as rows

    systems = args.what == "systems"
    targets = {name: t for name, t in rows.load_targets().items() if name.startswith("S") == systems}
    if args.only == "list":
        print("\n".join(f"{t.id:<4}{t.what}" for t in targets.values()))
        return 0
    chosen = _choose(args.only, list(targets))
    threads = _threads(args.threads)
    effort = rows.QUICK if args.quick else rows.FULL
    about = _surroundings(args, effort, threads)

    measured: list[rows.Row] = []
    interrupted = False
    with _torch_threads(threads), _memory_limit(), _progress(len(chosen)) as step:
        try:
            for n, name in enumerate(chosen):
                settings = rows.Settings(effort, threads, args.backend, lambda text, n=n: step(n, text))
                settings.report(f"{name}: {targets[name].what}")
                measured += rows.run_target(targets[name], settings)
            step(len(chosen), "done")
        except KeyboardInterrupt:
            interrupted = True
    result = {**about, "rows": [row.as_dict() for row in measured]}
    print("\n".join(table(result)))
    if args.json is not None:
        args.json.write_text(report.to_json(about, measured))
        print(f"written to {args.json}")
    if interrupted:
        print("interrupted: the table ends where the run did", file=sys.stderr)
        return 130
    failed = any(row.error is not None for row in measured)
    return 0 if not failed and _agrees(args, result) else 1


def table(result: dict) -> list[str]:
    """The lines of the table, at most 80 characters each."""
    from gate4d.benchmarks.report import documents as report

    lines = ["", _COLUMNS.format("#", "what", "measured", "+-", "target", "result"), "-" * _WIDTH]
    for row in result["rows"]:
        spread = "" if row["spread"] is None else f"{row['spread']:.{1 if row['unit'] else 3}f}"
        limit = "" if row["target"] is None else f"<= {report.figure(row['target'], row['unit'])}"
        measured = report.figure(row["ratio"], row["unit"])
        cells = (row["id"], textwrap.shorten(row["what"], 36, placeholder=".."), measured, spread, limit)
        lines.append(_COLUMNS.format(*cells, report.verdict(row)).rstrip())
        for detail in report.details(row):
            lines += textwrap.wrap(detail, _WIDTH, initial_indent="      ", subsequent_indent="        ")
    verdicts = [report.verdict(row) for row in result["rows"]]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("pass", "MISS", "FAILED") if v in verdicts)
    without = "no targets to meet" if result["rows"] else "nothing was measured"
    return [*lines, "-" * _WIDTH, counts or without]


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
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted is None:
        return usable
    if wanted < 1:
        raise ValueError(f"--threads must be at least 1, got {wanted}.")
    if wanted > usable:
        print(f"note: {wanted} threads on {usable} usable cores will take turns", file=sys.stderr)
    return wanted


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    """Let an allocation beyond the free memory fail as an error of its row, where Linux would kill the whole run."""
    try:
        import resource

        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        free = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())["MemAvailable"]
        limit = (int(status["VmData"].split()[0]) + int(free.split()[0])) * 1024
        before = resource.getrlimit(resource.RLIMIT_DATA)
    except (ImportError, OSError, KeyError, ValueError):
        yield
        return
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on a terminal with rich; otherwise a line on stderr whenever a new target or variant begins."""
    console = terminal()
    if console is None:
        shown = set()

        def say(done: int, text: str) -> None:
            line = f"[{done + 1 if done < total else total}/{total}] {text}"
            if "round" not in text and line not in shown:
                shown.add(line)
                print(line, file=sys.stderr, flush=True)

        yield say
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=20), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda done, text: bar.update(task, completed=done, description=text[:40])
