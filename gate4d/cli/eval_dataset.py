"""``gate4d eval --dataset``: a model, with or without a method, on a data set's folder by the protocol of the field."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gate4d.terminal import progress
from gate4d.terminal import table as lines_of

from . import source
from .theirs import theirs

_DEPTH = {"abs_rel": "AbsRel", "sq_rel": "SqRel", "rmse": "RMSE", "log_rmse": "logRMSE", "delta": "d<1.25"}
_CAMERAS = {"ate": "ATE", "rpe_translation": "RPE t", "rpe_rotation": "RPE r"}
_MASKS = {"jm": "JM", "jr": "JR", "fm": "FM", "fr": "FR", "jm_frames": "JM f", "jr_frames": "JR f"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``--dataset``."""
    group = parser.add_argument_group("a data set instead of rendered clips: see docs/evaluation.md")
    group.add_argument("--dataset", metavar="NAME", help="sintel, tum-dynamics, bonn, kitti, scannet, davis-2016, ...")
    group.add_argument("--root", type=Path, metavar="DIR", help="its folder, as it is distributed")
    group.add_argument("--model", metavar="MODEL", help="as gate4d run takes it: name, file or MODULE:FACTORY")
    group.add_argument("--checkout", metavar="DIR", help="as gate4d run: of the code of an upstream model")
    group.add_argument("--checkpoint", metavar="FILE", help="as gate4d run: weights of an upstream model")
    group.add_argument("--trust", action="store_true", help="as gate4d run: load a model saved whole")
    group.add_argument("--method", metavar="METHOD", help="easi3r, more, mut3r, ttt3r or vggt4d (default: none)")
    group.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the method; repeatable")
    group.add_argument("--predict", choices=("truth",), help="instead of a model: the ground truth, the ideal score")
    group.add_argument(
        "--predictions", type=Path, metavar="DIR",
        help="instead of a model: DIR/SEQUENCE/ with poses.txt, depth/*.npy, masks/*.png",
    )  # fmt: skip
    group.add_argument("--sequences", metavar="A,B", help="these alone (default: those of the protocol)")
    group.add_argument("--start", type=int, help="first frame of each sequence (default: the protocol's)")
    group.add_argument(
        "--stride", type=int, help="every n-th frame (default: the protocol's); --frames: at most so many"
    )
    group.add_argument(
        "--patches", type=int, help="largest number of patches a frame (default 414; shipped models: 80)"
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    group.add_argument("--keep-degenerate", action="store_true", help="count cameras on a line, which the field skips")
    group.add_argument("--resume", action="store_true", help="go on where the file of --json stopped")


def refuse(args: argparse.Namespace) -> None:
    """ValueError if one of these options is given without ``--dataset``, where it would do nothing."""
    names = ("root", "model", "checkout", "checkpoint", "trust", "method", "option", "predict", "predictions")
    names += ("sequences", "start", "stride", "patches", "device", "keep_degenerate", "resume")
    if given := [
        f"--{n.replace('_', '-')}" for n in names if (x := getattr(args, n)) is not None and x is not False and x != []
    ]:
        raise ValueError(f"{', '.join(given)} need{'s' if len(given) == 1 else ''} --dataset NAME.")


def run(args: argparse.Namespace) -> int:
    """Measure sequence by sequence; with ``--json`` what is known is written after each one."""
    from gate4d.benchmarks.report import result_files
    from gate4d.data.datasets import DATASETS, Selection, read_dataset
    from gate4d.evaluation.sequences import measure_sequence, summary

    _check(args)
    if args.dataset not in DATASETS:
        raise ValueError(f"--dataset must be one of {', '.join(DATASETS)}, got {args.dataset!r}.")
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    protocol = DATASETS[args.dataset].protocol
    usual = protocol.selection._asdict()
    selection = Selection(**{n: x if getattr(args, n) is None else getattr(args, n) for n, x in usual.items()})
    only = tuple(args.sequences.split(",")) if args.sequences else ()
    sequences = read_dataset(args.dataset, args.root, selection=selection, only=only)
    setup = {"selection": list(selection), "sequences": args.sequences, "keep_degenerate": args.keep_degenerate} | {
        n: None if getattr(args, n) is None else str(getattr(args, n))
        for n in ("dataset", "model", "checkout", "checkpoint", "method", "option", "predict", "predictions", "patches")
    }
    rows: list[dict[str, Any]] = _before(args.json, setup) if args.resume else []
    done = {row["sequence"] for row in rows}
    try:
        with progress("loading the model" if args.model else "reading") as show:
            predict = _predictor(args)
            for sequence in sequences:
                if sequence.name in done:
                    continue
                show(f"{sequence.name}, {len(sequence)} frames")
                begin = time.perf_counter()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", UserWarning)
                    said = predict(sequence)
                seconds = time.perf_counter() - begin
                row = measure_sequence(sequence, said, protocol, skip_degenerate=not args.keep_degenerate)
                notes = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
                rows.append(row | {"seconds": round(seconds, 3), "notes": notes})
                if args.json is not None:
                    about = {"setup": setup, "rows": rows, "summary": summary(rows, protocol)}
                    result_files.write(args.json, result_files.envelope("dataset", torch.get_num_threads()) | about)
    except KeyboardInterrupt:
        if args.json is None or not rows:
            raise
        print(f"\ninterrupted: {len(rows)} sequences are in {args.json}; the same command with --resume goes on.")
        return 130
    print("\n".join(table(rows, summary(rows, protocol), protocol.alignments)))
    for row in rows:
        print(*(f"note, {row['sequence']}: {note}\n" for note in row["notes"]), sep="", end="")
    print(f"{args.dataset}: {protocol.source}; frames {_frames(selection)}")
    if args.json is not None:
        print(f"written to {args.json}")
    return 0


def table(rows: list[dict], total: dict, alignments: tuple[str, ...]) -> list[str]:
    """Lines: a block for each measure, a row for each sequence, the mean last."""
    lines: list = []
    named = [*((row["sequence"], row) for row in rows), ("mean", total)]
    blocks = [("cameras", "cameras", _CAMERAS, lambda x: x)]
    blocks += [("depth", f"depth, {a.replace('_', ' ')}", _DEPTH, lambda x, a=a: x[a]) for a in alignments]
    for measure, title, columns, of in blocks:
        if total.get(measure) is not None:
            lines += [(title, *columns.values()), None]
            lines += [(name[:30], *_cells(row.get(measure), columns, of)) for name, row in named] + [()]
    out = _block(lines, 5)
    if total.get("masks") is not None:
        import numpy as np

        marks = [("masks", *_MASKS.values()), None]
        for row in rows:
            x = row.get("masks")
            means = []
            for values in () if x is None else (np.array(x["j"]), np.array(x["f"])):
                means += [f"{values.mean():.4f}", f"{(values > 0.5).mean():.4f}"]
            marks.append((row["sequence"][:30], *(means or ["-"] * 4), "", ""))
        marks.append(("mean", *_cells(total["masks"], _MASKS, lambda x: x)))
        out += _block([*marks, ()], 6)
    return out + [f"{m}: of {n} of {len(rows)} sequences" for m, n in total["counted"].items() if n < len(rows)]


def _block(lines: list, columns: int) -> list[str]:
    full = [line if line is None else (*line, *[""] * (1 + columns - len(line))) for line in lines]
    return [line.rstrip() for line in lines_of("<30" + " >8" * columns, full)]


def _cells(x: Any, columns: dict[str, str], of: Callable[[Any], dict]) -> list[str]:
    return ["-"] * len(columns) if x is None else [f"{of(x)[n]:.4f}" for n in columns]


def _frames(selection: Any) -> str:
    most = "" if selection.frames is None else f", at most {selection.frames}"
    return f"from {selection.start}, every {selection.stride}{most}"


def _predictor(args: argparse.Namespace) -> Callable[[Any], Any]:
    """A function from a sequence to what is said about it."""
    from gate4d.evaluation import predict

    if args.predict is not None:
        return predict.truth
    if args.predictions is not None:
        return lambda sequence: predict.from_files(args.predictions / sequence.name, sequence)
    import torch

    from gate4d.models import MODELS, TRAINED_PATCHES

    from .run import method_options

    options = method_options(args) if args.method else {}
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = source.load(args)
    patches = args.patches or (TRAINED_PATCHES if type(model).__name__ in MODELS.values() else 414)

    def said(sequence: Any) -> Any:
        with theirs("the model,", ValueError, TypeError, ImportError, OSError, NotImplementedError):
            return predict.by_model(model, sequence, method=args.method, options=options, max_patches=patches)

    return said


def _before(path: Path, setup: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run of the same kind; none where it wrote no file yet."""
    from gate4d.benchmarks.report import result_files

    if not path.exists():
        return []
    before = result_files.read(path, "dataset")
    if differ := [n for n in setup if before["setup"].get(n) != setup[n]]:
        said = ", ".join(f"{n} {before['setup'].get(n)!r} there and {setup[n]!r} here" for n in differ)
        raise ValueError(f"--resume: {path} is of another run: {said}.")
    return before["rows"]


def _check(args: argparse.Namespace) -> None:
    if args.root is None:
        raise ValueError("--dataset needs --root DIR, the folder of the data set.")
    sources = [n for n in ("model", "predict", "predictions") if getattr(args, n) is not None]
    if len(sources) != 1:
        got = " and ".join(f"--{n}" for n in sources) or "none"
        raise ValueError(f"--dataset needs one of --model, --predict truth and --predictions DIR, got {got}.")
    if (args.method or args.option) and args.model is None:
        raise ValueError("--method and --option need --model.")
    if args.option and not args.method:
        raise ValueError("--option is of the method: it needs --method.")
    if args.align is not None:
        raise ValueError("--align is of rendered clips: with --dataset depth is aligned in each way of its protocol.")
    if args.resume and args.json is None:
        raise ValueError("--resume needs --json FILE, the file of the run that stopped.")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json must be in an existing folder, got {str(args.json)!r}.")
    for name, least in (("start", 0), ("stride", 1), ("frames", 2), ("patches", 1), ("threads", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
