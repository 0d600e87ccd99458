"""``gate4d run METHOD``: a method on a clip with a model of yours or one that is shipped; files and a summary."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import resource
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gate4d.terminal import Show, progress

EPILOG = """\
--model takes the name of a shipped model, a file of its weights (.safetensors), MODULE:FACTORY, or with --trust a file
written by torch.save(model). MODULE:FACTORY imports a Python module (from the current folder, too) and calls FACTORY()
without arguments; it returns your model with its checkpoint loaded, so a checkout of VGGT, CUT3R, DUSt3R or a relative
runs as it is. Both run code: use only modules and files that you trust. Weights files hold numbers and are always safe.

Frames are scaled down until they just cover the largest grid of whole patches of the model, at most --patches of them,
and cropped to it around the middle.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("method", metavar="METHOD", help="easi3r, more, mut3r, ttt3r or vggt4d: see docs/methods.md")
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="name, weights file, or MODULE:FACTORY; see below"
    )
    parser.add_argument(
        "--frames", required=True, metavar="CLIP", help="video file, folder of images, or rendered:SEED"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="output folder, new or empty")
    parser.add_argument("--max-frames", type=int, default=24, help="read at most so many frames (default 24)")
    parser.add_argument("--stride", type=int, default=1, help="take every n-th frame of CLIP (default 1)")
    parser.add_argument(
        "--patches", type=int, help="largest number of patches a frame (default 414; shipped models: as trained, 80)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the method, such as window=8; repeatable",
    )
    parser.add_argument(
        "--trust", action="store_true", help="load a model saved whole (torch.save), which runs its code"
    )


def run(args: argparse.Namespace) -> int:
    """Load the model, patch it, run the method, write what it found, print the summary."""
    _check(args)
    import gate4d
    from gate4d.methods.results import collect
    from gate4d.methods.rollout import patch_size
    from gate4d.models import MODELS, TRAINED_PATCHES

    options = dict(map(_option, args.option))
    with warnings.catch_warnings(record=True) as caught, progress("loading the model") as show:
        warnings.simplefilter("always", UserWarning)
        model = load_model(args.model, args.device, trust=args.trust)
        with gate4d.patch(model, method=args.method, **options) as handle:  # refuses before the clip is read
            show("reading the clip")
            if args.patches is None:
                args.patches = TRAINED_PATCHES if type(model).__name__ in MODELS.values() else 414
            clip = _clip(args, patch_size(model))
            images = clip.frames.permute(0, 3, 1, 2).float() / 255
            args.out.mkdir(exist_ok=True)  # whether it can be written to shows before the work is done
            show(f"running {args.method}", total=len(images), done=0)
            streams, begin = hasattr(handle.method, "stream"), time.perf_counter()
            if args.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats(args.device)
            result = handle.run(_counted(images, show) if streams else images.to(args.device))
            seconds, peak = time.perf_counter() - begin, _peak_bytes(args.device)
            show("writing files", done=len(images))
            found = collect(result, tuple(images.shape[-2:]))
            written = found.save(args.out, clip.frames)
    notes = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
    figures = {
        "command": shlex.join(["gate4d", *sys.argv[1:]]), "method": args.method, "model": args.model,
        "clip": clip.name, "frames": len(images), "height": images.shape[2], "width": images.shape[3],
        "fps": len(images) / seconds, "seconds": seconds, "peak_bytes": peak, "device": args.device,
        "dynamic_share": None if found.masks is None else float(found.masks.float().mean()), "notes": notes,
    }  # fmt: skip
    if clip.motion is not None:
        figures["dynamic_share_true"] = float(clip.motion.float().mean())
    summary = args.out / "summary.json"
    summary.write_text(json.dumps(figures, indent=2) + "\n")
    _print(figures, [*written, summary])
    return 0


def _counted(images: torch.Tensor, show: Show) -> Iterator[torch.Tensor]:
    """The frames one by one, each counted when the next one is asked for."""
    for image in images:
        yield image
        show(advance=1)


def load_model(spec: str, device: str, *, trust: bool = False) -> nn.Module:
    """The model that ``--model`` names, in eval mode on ``device``.

    Raises:
        FileNotFoundError, ImportError: there is no such file or module.
        TypeError: the factory returned, or the file holds, something else than a module.
        ValueError: the factory does not exist, or a file that runs code is not trusted.
    """
    module, colon, factory = spec.partition(":")
    if colon and not Path(spec).exists():
        if "" not in sys.path:
            sys.path.insert(0, "")
        make = getattr(importlib.import_module(module), factory, None)
        if not callable(make):
            raise ValueError(f"--model: module {module!r} has no factory {factory!r} that can be called.")
        model = make()
    elif Path(spec).suffix in (".pt", ".pth", ".bin", ".ckpt"):
        if not trust:
            raise ValueError(
                f"--model: {spec} is a pickle, which can run any code when it is loaded. If you trust it and it was "
                "written by torch.save(model), say --trust; for a checkpoint of weights, use MODULE:FACTORY."
            )
        model = torch.load(spec, map_location=device, weights_only=False)
    else:
        from gate4d import models

        return models.load(spec, device)
    if not isinstance(model, nn.Module):
        what = "; a checkpoint of weights needs MODULE:FACTORY" if isinstance(model, dict) else ""
        raise TypeError(f"--model: {spec} must be a torch.nn.Module, got {type(model).__name__}{what}.")
    return model.to(device).eval()


def _clip(args: argparse.Namespace, patch: int):
    from gate4d.data import read_clip, render_clip
    from gate4d.data.clip import fitted_size

    if args.frames.startswith("rendered:"):
        seed = args.frames.removeprefix("rendered:")
        if not seed.isdecimal():
            raise ValueError(f"--frames: rendered:SEED needs a whole number, got {args.frames!r}.")
        size = fitted_size(392, 518, patch=patch, max_patches=args.patches)
        return render_clip(args.max_frames, *size, seed=int(seed))
    return read_clip(args.frames, max_frames=args.max_frames, stride=args.stride, patch=patch, max_patches=args.patches)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--option must be NAME=VALUE, got {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a plain word


def _check(args: argparse.Namespace) -> None:
    for name, least in (("max_frames", 2), ("stride", 1), ("patches", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}.")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise FileExistsError(f"--out: {args.out} exists and is not an empty folder; give another name.")
    if not args.out.resolve().parent.is_dir():
        raise FileNotFoundError(f"--out: the folder {args.out.resolve().parent} does not exist.")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as e:  # torch's way to say that there is no such device
        raise ValueError(f"--device {args.device} cannot be used: {str(e).splitlines()[0]}") from None
    if importlib.util.find_spec("PIL") is None:
        raise ImportError("gate4d run needs PIL: pip install 'gate4d[methods]'.")


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
