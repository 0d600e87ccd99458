"""``gate4d eval``: the systems on the evaluation clips, as a table, as JSON and as Markdown."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .terminal import terminal

_WIDTH = 80
_HEAD = ("frames", "ATE", "RPE t", "RPE r", "AbsRel", "d<1.25", "IoU", "FPS")
_COLUMNS = "{:<30}{:>7}{:>6}{:>6}{:>6}{:>7}{:>7}{:>5}{:>6}"
SCHEMA = 1
LEGEND = (
    "ATE, RPE t: camera centres after Sim(3) alignment, % of the first frame's mean depth, clips with a moving camera;",
    "RPE r: degrees; both RPE between neighbouring frames. AbsRel, d<1.25: depth scaled by the clip's median.",
    "IoU: motion masks, all pixels of all clips. FPS: whole system, as it ran. Means over clips.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--alternating", metavar="WEIGHTS", default="alternating", help="name or file (default: shipped)"
    )
    parser.add_argument("--unforced", metavar="WEIGHTS", help="trained without attention forcing: a file")
    parser.add_argument("--forced", metavar="WEIGHTS", help="trained as --unforced is, but with forcing: a file")
    parser.add_argument("--recurrent", metavar="WEIGHTS", default="recurrent", help="name or file (default: shipped)")
    parser.add_argument("--clips", type=int, default=32, help="clips of the rows over one clip at once (default 32)")
    parser.add_argument("--frames", type=int, default=16, help="frames of these clips (default 16)")
    parser.add_argument("--long-clips", type=int, default=4, help="clips of the recurrent rows (default 4)")
    parser.add_argument("--lengths", default="10,30,100,300", help="frames of these clips (default 10,30,100,300)")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 80), metavar=("HEIGHT", "WIDTH"), help="pixels")
    parser.add_argument("--only", metavar="WORD", help="rows whose name holds this word alone")
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures, clip by clip")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="measure nothing: show a results file")
    parser.add_argument("--into", type=Path, metavar="DOC", help="with --markdown: replace the marked table in DOC")


def run(args: argparse.Namespace) -> int:
    """0 if a row was measured (rows without weights are skipped and say so), 1 if none was."""
    if args.markdown is not None:
        from gate4d.benchmarks.report import write_into

        text = markdown(load(args.markdown))
        if args.into is None:
            print(text, end="")
        else:
            write_into(args.into, text, "eval")
        return 0
    if args.into is not None:
        raise ValueError("--into needs --markdown FILE, the results to show.")
    lengths = _check(args)

    import torch

    from gate4d.cli.info import collect
    from gate4d.data.procedural import evaluation_clips
    from gate4d.evaluation.study import Row, measure
    from gate4d.evaluation.systems import systems
    from gate4d.methods.export import save_text

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows = [s for s in systems() if args.only is None or args.only.lower() in s.name.lower()]
    if not rows:
        raise ValueError(
            f"--only: no row's name holds {args.only!r}; there are {', '.join(s.name for s in systems())}."
        )
    models, missing, about = _models(args, {s.weights for s in rows})
    began, results = time.perf_counter(), []
    clips = {}  # rendered when the first row needs them
    sizes = dict.fromkeys(("", "alternating", "forced", "unforced"), (args.clips, [args.frames]))
    sizes["recurrent"] = args.long_clips, lengths
    work = sum(sizes[s.weights][0] for s in rows if s.weights in models)
    with _progress(work) as step:
        for system in rows:
            count, wanted = sizes[system.weights]
            if system.weights in missing:
                skipped = Row(system.group, system.name, wanted[-1], note=system.note, skipped=missing[system.weights])
                results.append(skipped)
                continue
            step(f"{system.name}", 0)
            if (count, wanted[-1]) not in clips:
                clips[count, wanted[-1]] = list(evaluation_clips(max(wanted), *args.size, count=count))
            model = models[system.weights]
            results += measure(system, model, clips[count, wanted[-1]], wanted, lambda: step("", 1))
    facts = collect()
    result = {
        "schema": SCHEMA, "kind": "gate4d eval", "command": shlex.join(["gate4d", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1), "threads": torch.get_num_threads(), **facts["versions"],
        "processor": facts["machine"]["processor"], "size": list(args.size), "clips": args.clips,
        "long_clips": args.long_clips, "weights": about, "rows": [row.as_dict() for row in results],
    }  # fmt: skip
    print("\n".join(table(result)))
    if args.json is not None:
        save_text(args.json, json.dumps(result, indent=1) + "\n")
        print(f"written to {args.json}")
    return int(all(row.skipped for row in results))


def load(path: Path) -> dict:
    """Read a results file.

    Raises:
        ValueError: it is not one, or one of another schema.
    """
    from gate4d.benchmarks.report import read

    return read(path, "gate4d eval", SCHEMA, lambda result: result.get("kind") == "gate4d eval")


def cells(row: dict) -> list[str]:
    """A row's figures as the tables show them."""

    def shown(name: str, digits: int, factor: float = 1) -> str:
        return "-" if row[name] is None else f"{factor * row[name]:.{digits}f}"

    lengths = shown("ate", 2, 100), shown("rpe_translation", 2, 100)
    others = shown("rpe_rotation", 2), shown("abs_rel", 3), shown("delta", 3), shown("iou", 2)
    return [str(row["frames"]), *lengths, *others, shown("fps", 1)]


def table(result: dict) -> list[str]:
    """The lines of the table, at most 80 characters each."""
    lines, group, skipped = [], None, {}
    for row in result["rows"]:
        if row["skipped"]:
            skipped.setdefault(row["skipped"], []).append(row["system"])
            continue
        if row["group"] != group:
            group = row["group"]
            lines += ["", _COLUMNS.format(group[:30], *_HEAD), "-" * _WIDTH]
        lines.append(_COLUMNS.format(row["system"], *cells(row)))
    lines += ["-" * _WIDTH] if lines else []
    for text in LEGEND if lines else ():
        lines += textwrap.wrap(text, _WIDTH)
    for kind, about in result["weights"].items():
        lines += textwrap.wrap(f"{kind} weights: {about['text']}", _WIDTH, subsequent_indent="  ")
    lines += textwrap.wrap(_unequal(result["weights"]), _WIDTH)
    for why, names in skipped.items():
        lines += textwrap.wrap(f"skipped, {why}: {', '.join(names)}", _WIDTH, subsequent_indent="  ")
    return lines


def markdown(result: dict) -> str:
    """The results as Markdown tables, for the documents."""
    height, width = result["size"]
    lines = [
        f"- {result['processor']}, {result['threads']} threads; gate4d {result['gate4d']}, torch {result['torch']}, "
        f"{result['date'][:10]}",
        f"- {result['clips']} clips of {height}x{width} pixels, {result['long_clips']} for the recurrent rows",
        f"- command: {result['command']}",
        *(f"- {kind} weights: {about['text']}" for kind, about in result["weights"].items()),
    ]
    lines += [f"- {_unequal(result['weights'])}"] if _unequal(result["weights"]) else []
    group = None
    for row in result["rows"]:
        if row["group"] != group:
            group = row["group"]
            lines += ["", f"| {group} | {' | '.join(_HEAD)} | |", "|---|" + "---:|" * len(_HEAD) + "---|"]
        values = ["-"] * len(_HEAD) if row["skipped"] else cells(row)
        lines.append(f"| {row['system']} | {' | '.join(values)} | {row['skipped'] or row['note']} |")
    return "\n".join([*lines, "", *LEGEND]) + "\n"


def _unequal(weights: dict) -> str:
    """Says so if the two trainings that are to differ in one thing differ in another."""
    forced = "forced" if "forced" in weights else "alternating"
    steps = [weights.get(kind, {}).get("step") for kind in (forced, "unforced")]
    if None in steps or steps[0] == steps[1]:
        return ""
    return f"Forced and unforced weights are of {steps[0]} and {steps[1]} steps: their rows cannot be compared."


def _models(args: argparse.Namespace, needed: set[str]) -> tuple[dict, dict[str, str], dict[str, dict]]:
    """Models by kind of weights, why others are missing, and what the files say about their training."""
    from gate4d.models import load as load_model
    from gate4d.models import metadata

    models, missing, about = {"": None}, {}, {}
    families = dict.fromkeys(("alternating", "forced", "unforced"), "aggregator") | {"recurrent": "dec_blocks_state"}
    for kind in families:
        if kind not in needed:
            continue
        source = getattr(args, kind)
        if source is None:
            missing[kind] = f"--{kind} names no weights"
            continue
        try:
            models[kind] = load_model(source)
        except FileNotFoundError:
            if source != kind:  # named by the user: an error, not a row to skip
                raise
            missing[kind] = f"no weights are shipped under the name {kind!r}"
            continue
        said = metadata(source)
        text = ", ".join(f"{n} {said[n]}" for n in ("step", "seed", "command") if n in said)
        about[kind] = {"step": said.get("step"), "text": text or "nothing noted"}
    for kind, family in families.items():
        if kind in models and not hasattr(models[kind], family):
            raise ValueError(f"--{kind}: {getattr(args, kind)} holds {type(models[kind]).__name__}, another model.")
    return models, missing, about


def _check(args: argparse.Namespace) -> list[int]:
    """The lengths."""
    for name, least in (("clips", 1), ("frames", 4), ("long_clips", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}.")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}.")
    if min(args.size) < 16 or any(side % 8 for side in args.size):
        raise ValueError(f"--size must be two multiples of 8, at least 16, got {args.size[0]} {args.size[1]}.")
    words = args.lengths.split(",")
    if not all(w.strip().isdecimal() and int(w) >= 2 for w in words):
        raise ValueError(f"--lengths must be frame counts >= 2 such as 10,30, got {args.lengths!r}.")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json must be in an existing folder, got {str(args.json)!r}.")
    return sorted({int(w) for w in words})


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on a terminal with rich, else a line on stderr for every row; called with (row or nothing, clips done)."""
    console = terminal()
    if console is None:
        yield lambda text, done: print(text, file=sys.stderr, flush=True) if text else None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("rendering the clips", total=total)
        yield lambda text, done: bar.update(task, advance=done, **({"description": text} if text else {}))
