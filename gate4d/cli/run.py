"""``gate4d run METHOD``: a method on a clip with a model of yours or one that is shipped; files and a summary."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import math
import resource
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gate4d.terminal import Show, progress

from . import source
from .theirs import theirs

EPILOG = f"""\
{source.EPILOG}
--out appears when everything is written; a run that fails or is interrupted leaves nothing behind. Methods that stream
(more, mut3r, ttt3r) read frame by frame: beside the clip itself and its masks, four bytes a pixel, memory does not grow
with the frames. Of the points a regular sample is kept, four million at most before the uncertain ones are left out.
--option keep=NAME,... says which entries of the predictions mut3r and ttt3r keep: camera_pose alone writes no points.

Frames are scaled down until they just cover the largest grid of whole patches of the model, at most --patches of them,
and cropped to it around the middle.
"""


AT_ONCE = 24  # frames that are read unasked where memory grows with them
# Packages that a method asks for when its passes are through: said before they begin.
_NEEDED = {"mut3r": ("skimage",), "easi3r": ("skimage", "sklearn"), "vggt4d": ("skimage", "sklearn", "scipy")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("method", metavar="METHOD", help="easi3r, more, mut3r, ttt3r or vggt4d: see docs/methods.md")
    source.add_arguments(parser)
    parser.add_argument(
        "--frames", required=True, metavar="CLIP", help="video file, folder of images, or rendered:SEED"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="output folder, new or empty")
    parser.add_argument(
        "--max-frames", type=int, help="read at most so many frames (default all; 24 where a method sees them at once)"
    )
    parser.add_argument("--start", type=int, default=0, help="pass over so many frames of CLIP first (default 0)")
    parser.add_argument("--stride", type=int, default=1, help="take every n-th frame of CLIP (default 1)")
    parser.add_argument(
        "--fps", type=float, default=30.0,
        help="frames a second of a CLIP that has no times of its own, for poses.txt (default 30)",
    )  # fmt: skip
    parser.add_argument(
        "--patches", type=int, help="largest number of patches a frame (default 414; shipped models: as trained, 80)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--amp", choices=("bf16", "fp16"), help="run the model under autocast in this type")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the method, such as window=8; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    """Load the model, patch it, run the method, write what it found, print the summary."""
    _check(args)
    import gate4d
    from gate4d.methods.clips import patch_size
    from gate4d.methods.export import written_at_once
    from gate4d.methods.results import run_and_collect
    from gate4d.models import MODELS, TRAINED_PATCHES

    options = method_options(args)
    with (
        written_at_once(args.out) as folder,  # whether it can be written to shows before the work is done
        warnings.catch_warnings(record=True) as caught,
        progress("loading the model") as show,
    ):
        warnings.simplefilter("always", UserWarning)
        model = source.load(args)
        with gate4d.patch(model, method=args.method, **options) as handle:  # refuses before the clip is read
            show("reading the clip")
            if args.patches is None:
                args.patches = TRAINED_PATCHES if type(model).__name__ in MODELS.values() else 414
            clip = _clip(args, patch_size(model), handle.method.streams)
            count, height, width, _ = clip.frames.shape
            show(f"running {args.method}", total=count, done=0)
            streams, begin = handle.method.streams, time.perf_counter()
            if args.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats(args.device)
            images: Any = (frame.to(args.device).permute(2, 0, 1).float() / 255 for frame in clip.frames)
            if not streams:
                images = clip.frames.to(args.device).permute(0, 3, 1, 2).float() / 255
            with (
                _autocast(args),
                theirs("the model, while the method ran it,", ValueError, TypeError, ImportError, OSError),
            ):
                tracked = _counted(images, show) if streams else images
                found = run_and_collect(handle.method, tracked, (height, width), count)
            seconds, peak = time.perf_counter() - begin, _peak_bytes(args.device)
            show("writing files", done=count)
            written = found.save(folder, clip.frames, times=_times(clip, args))
        figures = _figures(args, clip, found, seconds, peak, caught)
        written.append(folder / "summary.json")
        written[-1].write_text(json.dumps(figures, indent=2) + "\n")
    _print(figures, [args.out / path.relative_to(folder) for path in written])
    return 0


def _times(clip, args: argparse.Namespace) -> list[float]:
    """Seconds of the frames: the clip's own, else by the frame rate."""
    if clip.times is not None:
        return clip.times.tolist()
    return [(args.start + n * args.stride) / args.fps for n in range(len(clip.frames))]


def _figures(args: argparse.Namespace, clip, found, seconds: float, peak: int, caught: list) -> dict[str, Any]:
    """The summary."""
    count, height, width, _ = clip.frames.shape
    notes = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
    figures = {
        "command": shlex.join(["gate4d", *sys.argv[1:]]), "method": args.method, "model": args.model,
        "clip": clip.name, "frames": count, "height": height, "width": width,
        "fps": count / seconds, "seconds": seconds, "peak_bytes": peak, "device": args.device,
        "dynamic_share": None if found.masks is None else float(found.masks.float().mean()), "notes": notes,
    }  # fmt: skip
    if clip.masks is not None:
        figures["dynamic_share_true"] = float(clip.masks.float().mean())
    return figures


def _counted(images: Iterable[torch.Tensor], show: Show) -> Iterator[torch.Tensor]:
    """The frames one by one, each counted when the next one is asked for."""
    for image in images:
        yield image
        show(advance=1)


def _autocast(args: argparse.Namespace) -> AbstractContextManager:
    if args.amp is None:
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, {"bf16": torch.bfloat16, "fp16": torch.float16}[args.amp])


def _clip(args: argparse.Namespace, patch: int, streams: bool):
    from gate4d.data import read_clip, render_clip
    from gate4d.data.clip import fitted_size

    if args.frames.startswith("rendered:"):
        seed = args.frames.removeprefix("rendered:")
        if not seed.isdecimal():
            raise ValueError(f"--frames: rendered:SEED needs a whole number, got {args.frames!r}.")
        size = fitted_size(392, 518, patch=patch, max_patches=args.patches)
        return render_clip(args.max_frames or AT_ONCE, *size, seed=int(seed))
    given = {"start": args.start, "stride": args.stride, "patch": patch, "max_patches": args.patches}
    if args.max_frames is not None or streams:
        return read_clip(args.frames, max_frames=args.max_frames, **given)
    clip = read_clip(args.frames, max_frames=AT_ONCE + 1, **given)  # one more, to know whether something is left out
    if len(clip.frames) <= AT_ONCE:
        return clip
    warnings.warn(
        f"{args.method} sees all frames at once, so the first {AT_ONCE} were read: say --max-frames for more.",
        stacklevel=2,
    )
    return replace(clip, frames=clip.frames[:AT_ONCE], times=None if clip.times is None else clip.times[:AT_ONCE])


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of the method; what it does not know is refused with a list of what it does."""
    from gate4d import methods
    from gate4d.handle import METHODS

    options = dict(map(_option, args.option))
    if args.method in METHODS:  # patch() speaks of others
        taken = inspect.signature(getattr(methods, METHODS[args.method])).parameters.values()
        names = {p.name for p in taken if p.kind is p.KEYWORD_ONLY}
        if unknown := sorted(options.keys() - names):
            raise ValueError(
                f"--option: {args.method} has no option {', '.join(unknown)}; it has {', '.join(sorted(names))}."
            )
    return options


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--option must be NAME=VALUE, got {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: nested thousands deep
        return name, value  # a plain word


def _check(args: argparse.Namespace) -> None:
    for name, least in (("max_frames", 2), ("start", 0), ("stride", 1), ("patches", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}.")
    if not (math.isfinite(args.fps) and args.fps > 0):
        raise ValueError(f"--fps must be a number > 0 (frames a second), got {args.fps:g}.")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise FileExistsError(f"--out: {args.out} exists and is not an empty folder; give another name.")
    if not args.out.resolve().parent.is_dir():
        raise FileNotFoundError(f"--out: the folder {args.out.resolve().parent} does not exist.")
    try:
        float(torch.zeros(1, device=args.device))  # "meta" makes tensors and holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as e:  # torch's ways to say that there is no such device
        raise ValueError(f"--device {args.device} cannot be used: {str(e).splitlines()[0]}") from None
    needed = ["PIL", *_NEEDED.get(args.method, ())]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"gate4d run needs {' and '.join(missing)}: pip install 'gate4d[methods]'.")


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _print(figures: dict[str, Any], written: list[Path]) -> None:
    of = "allocated on the GPU" if figures["device"].startswith("cuda") else "of the whole process"
    share = figures["dynamic_share"]
    dynamic = "no masks: the method or the model gives none" if share is None else f"{share:.1%} of the pixels"
    if share is not None and "dynamic_share_true" in figures:
        dynamic += f" (truly moving: {figures['dynamic_share_true']:.1%})"
    rows = {
        "method": f"{figures['method']} on {figures['model']}",
        "frames": f"{figures['frames']} of {figures['width']}x{figures['height']} pixels, from {figures['clip']}",
        "speed": f"{figures['fps']:.2f} FPS ({figures['seconds']:.1f} s)",
        "peak": f"{figures['peak_bytes'] / 2**20:.0f} MiB {of}",
        "dynamic": dynamic,
    }
    for name, text in (*rows.items(), *(("note", note) for note in figures["notes"])):
        print(f"{name:<9}{text}")
    print(f"{'wrote':<9}{', '.join(map(str, written))}")
