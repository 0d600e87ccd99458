"""``gate4d eval``: the systems on the evaluation clips, as a table, as JSON and as Markdown."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from gate4d.terminal import markdown_table, progress, wrapped
from gate4d.terminal import table as lines_of

from . import eval_dataset

_HEAD = ("frames", "ATE", "RPE t", "RPE r", "AbsRel", "d<1.25", "IoU", "FPS")
_COLUMNS = "<30 >7 >6 >6 >6 >7 >7 >5 >6"
LEGEND = (
    "ATE, RPE t: camera centres after Sim(3) alignment, % of the first frame's mean depth, clips with a moving camera;",
    "RPE r: degrees; both RPE between neighbouring frames. AbsRel, d<1.25: depth aligned once a clip ({align}), clips "
    "weighted by valid pixels.",
    "IoU: motion masks, all pixels of all clips (other means: --json, --markdown). FPS: whole system, as it ran. Means "
    "over clips.",
)
_MEANS = (
    "JM f, JM s: mean IoU of a frame over all frames, and over each clip's and then over clips; JR: frames above 0.5."
)
_MASKS = {"iou_frames": "JM f", "iou_sequences": "JM s", "iou_recall": "JR"}  # columns of the Markdown table alone
# As ``gate4d.evaluation.depth`` has them, which is imported where it is used.
_ALIGN = ("median", "scale", "scale_and_shift", "least_squares", "metric")
# Clips, frames, clips of the recurrent rows and their frames, as asked for by nothing and by --quick.
_FULL = {"clips": 32, "frames": 16, "long_clips": 4, "lengths": "10,30,100,300"}
_QUICK = {"clips": 3, "frames": 8, "long_clips": 1, "lengths": "10"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--alternating", metavar="WEIGHTS", default="alternating", help="name or file (default: shipped)"
    )
    parser.add_argument("--unforced", metavar="WEIGHTS", help="trained without attention forcing: a file")
    parser.add_argument("--forced", metavar="WEIGHTS", help="trained as --unforced is, but with forcing: a file")
    parser.add_argument("--recurrent", metavar="WEIGHTS", default="recurrent", help="name or file (default: shipped)")
    parser.add_argument(
        "--quick", action="store_true", help="few, short clips: within two minutes; figures for a first look"
    )
    parser.add_argument("--clips", type=int, help="clips of the rows over one clip at once (default 32; --quick 3)")
    parser.add_argument("--frames", type=int, help="frames of these clips (default 16; --quick 8)")
    parser.add_argument("--long-clips", type=int, help="clips of the recurrent rows (default 4; --quick 1)")
    parser.add_argument("--lengths", help="frames of these clips (default 10,30,100,300; --quick 10)")
    parser.add_argument(
        "--align", choices=_ALIGN, help="how depth is aligned, once a clip (default median; not with --dataset)"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(64, 80), metavar=("HEIGHT", "WIDTH"), help="pixels")
    parser.add_argument("--only", metavar="WORD", help="rows whose name holds this word alone")
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures, clip by clip")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="measure nothing: show a results file")
    parser.add_argument("--into", type=Path, metavar="DOC", help="with --markdown: replace the marked table in DOC")
    eval_dataset.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """0 if a row was measured (rows without weights are skipped and say so), 1 if none was."""
    if args.dataset is not None:
        return eval_dataset.run(args)
    eval_dataset.refuse(args)
    if args.markdown is not None:
        from gate4d.benchmarks.report import documents, result_files

        text = markdown(result_files.read(args.markdown, "eval"))
        if args.into is None:
            print(text, end="")
        else:
            documents.write_into(args.into, text, "eval")
        return 0
    if args.into is not None:
        raise ValueError("--into needs --markdown FILE, the results to show.")
    for name, usual in (_QUICK if args.quick else _FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, usual)
    args.align = args.align or "median"
    lengths = _check(args)

    import torch

    from gate4d.benchmarks.report import result_files
    from gate4d.data.procedural import evaluation_clips
    from gate4d.evaluation.study import Row, measure
    from gate4d.evaluation.systems import systems

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows = [s for s in systems() if args.only is None or args.only.lower() in s.name.lower()]
    if not rows:
        raise ValueError(
            f"--only: no row's name holds {args.only!r}; there are {', '.join(s.name for s in systems())}."
        )
    models, missing, about = _models(args, {s.weights for s in rows})
    began, measured = time.perf_counter(), []
    clips = {}  # rendered when the first row needs them
    sizes = dict.fromkeys(("", "alternating", "forced", "unforced"), (args.clips, [args.frames]))
    sizes["recurrent"] = args.long_clips, lengths
    work = sum(sizes[s.weights][0] for s in rows if s.weights in models)
    with progress("rendering the clips", total=work) as show:
        for system in rows:
            count, wanted = sizes[system.weights]
            if system.weights in missing:
                skipped = Row(system.group, system.name, wanted[-1], note=system.note, skipped=missing[system.weights])
                measured.append(skipped)
                continue
            show(system.name)
            if (count, wanted[-1]) not in clips:
                clips[count, wanted[-1]] = list(evaluation_clips(max(wanted), *args.size, count=count))
            model = models[system.weights]
            measured += measure(system, model, clips[count, wanted[-1]], wanted, lambda: show(advance=1), args.align)
    result = result_files.envelope("eval", torch.get_num_threads()) | {
        "seconds": round(time.perf_counter() - began, 1), "size": list(args.size), "clips": args.clips,
        "long_clips": args.long_clips, "align": args.align, "weights": about,
        "rows": [row.as_dict() for row in measured],
    }  # fmt: skip
    print("\n".join(table(result)))
    if args.json is not None:
        result_files.write(args.json, result)
        print(f"written to {args.json}")
    return int(all(row.skipped for row in measured))


def cells(row: dict) -> list[str]:
    """A row's figures as the tables show them."""

    def shown(name: str, digits: int, factor: float = 1) -> str:
        return "-" if row[name] is None else f"{factor * row[name]:.{digits}f}"

    lengths = shown("ate", 2, 100), shown("rpe_translation", 2, 100)
    others = shown("rpe_rotation", 2), shown("abs_rel", 3), shown("delta", 3), shown("iou", 2)
    return [str(row["frames"]), *lengths, *others, shown("fps", 1)]


def _legend(result: dict) -> list[str]:
    align = result.get("align", "median").replace("_", " ")
    return [line.format(align=align) for line in LEGEND]


def table(result: dict) -> list[str]:
    """The lines of the table, at most 80 characters each."""
    rows: list = []
    group, skipped = None, {}
    for row in result["rows"]:
        if row["skipped"]:
            skipped.setdefault(row["skipped"], []).append(row["system"])
            continue
        if row["group"] != group:
            group = row["group"]
            rows += ["", (group[:30], *_HEAD), None]
        rows.append((row["system"], *cells(row)))
    rows += [None, *(line for text in _legend(result) for line in wrapped(text))] if rows else []
    for kind, about in result["weights"].items():
        rows += wrapped(f"{kind} weights: {about['text']}", then="  ")
    rows += wrapped(_unequal(result["weights"]))
    for why, names in skipped.items():
        rows += wrapped(f"skipped, {why}: {', '.join(names)}", then="  ")
    return lines_of(_COLUMNS, rows)


def markdown(result: dict) -> str:
    """The results as Markdown tables, for the documents."""
    height, width = result["size"]
    lines = [
        f"- {result['hardware']['processor']}, {result['threads']} threads; gate4d {result['versions']['gate4d']}, "
        f"torch {result['versions']['torch']}, {result['date'][:10]}",
        f"- {result['clips']} clips of {height}x{width} pixels, {result['long_clips']} for the recurrent rows",
        f"- command: {result['command']}",
        *(f"- {kind} weights: {about['text']}" for kind, about in result["weights"].items()),
    ]
    lines += [f"- {_unequal(result['weights'])}"] if _unequal(result["weights"]) else []
    means = {name: head for name, head in _MASKS.items() if any(row.get(name) is not None for row in result["rows"])}
    heads = (*_HEAD, *means.values())
    for group in dict.fromkeys(row["group"] for row in result["rows"]):
        rows = []
        for row in result["rows"]:
            if row["group"] != group:
                continue
            others = ["-" if row.get(name) is None else f"{row[name]:.2f}" for name in means]
            figures = ["-"] * len(heads) if row["skipped"] else [*cells(row), *others]
            rows.append((row["system"], *figures, row["skipped"] or row["note"]))
        lines += ["", *markdown_table((group, *heads, "note"), rows, "<" + ">" * len(heads) + "<")]
    return "\n".join([*lines, "", *_legend(result), *([_MEANS] if means else [])]) + "\n"


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
