"""``gate4d bench``: measure the targets beside their peers, as a table and as JSON."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

_WIDTH = 80
_COLUMNS = "{:<4}{:<37}{:>11}{:>7}{:>13}{:>8}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``gate4d bench``."""
    parser.add_argument("--only", metavar="C1,C5", help="measure these targets alone (default: all; `list` shows them)")
    parser.add_argument(
        "--systems", action="store_true", help="measure the five systems' extra work instead (S1 to S6)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer heads, repetitions and lengths; under two minutes")
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads (default: every usable core)")
    parser.add_argument("--backend", default="auto", help="implementation of gate4d to measure (default: auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write results, raw times and surroundings")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="measure nothing: show a results file")
    parser.add_argument("--into", type=Path, metavar="DOC", help="with --markdown: replace the marked table in DOC")


def run(args: argparse.Namespace) -> int:
    """0 if every row was measured (a missed target is a result), 1 if one failed, 130 if interrupted."""
    from gate4d.benchmarks import report, rows

    if args.markdown is not None:
        text = report.markdown(report.load(args.markdown))
        if args.into is None:
            print(text, end="")
        else:
            report.write_into(args.into, text, "gate4d bench --systems" if args.systems else "gate4d bench")
        return 0
    if args.into is not None:
        raise ValueError("--into needs --markdown FILE, the results to show.")

    targets = {name: t for name, t in rows.load_targets().items() if name.startswith("S") == args.systems}
    if args.only == "list":
        print("\n".join(f"{t.id:<4}{t.what}" for t in targets.values()))
        return 0
    chosen = _choose(args.only, list(targets))
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json must be in an existing folder, got {str(args.json)!r}.")
    threads = _threads(args.threads)
    effort = rows.QUICK if args.quick else rows.FULL
    about = report.surroundings(rows.Settings(effort, threads, args.backend), report.command_line())
    for line in report.heading(about):
        print(textwrap.fill(line, _WIDTH, subsequent_indent="    "))

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
    return int(any(row.error is not None for row in measured))


def table(result: dict) -> list[str]:
    """The lines of the table, at most 80 characters each."""
    from gate4d.benchmarks import report

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
    wanted = [name.strip().upper() for name in only.split(",") if name.strip()]
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
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        console = None
    else:
        console = Console(stderr=True)
    if console is None or not console.is_terminal:
        shown = set()

        def say(done: int, text: str) -> None:
            line = f"[{done + 1 if done < total else total}/{total}] {text}"
            if "round" not in text and line not in shown:
                shown.add(line)
                print(line, file=sys.stderr, flush=True)

        yield say
        return
    columns = (BarColumn(bar_width=20), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda done, text: bar.update(task, completed=done, description=text[:40])
