"""``gate4d demo [CLIP]``: what the trained model sees in a clip, and three attention implementations side by side."""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from pathlib import Path

from gate4d.terminal import field, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "clip", nargs="?", metavar="CLIP", help="video file or folder of images; default: a rendered clip"
    )
    parser.add_argument(
        "--weights", default="alternating", help="of the trained model: a name or a file (default: the shipped ones)"
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="output folder, replaced if a demo wrote it")
    parser.add_argument("--frames", type=int, default=24, help="largest number of frames (default 24)")
    parser.add_argument("--stride", type=int, default=1, help="take every n-th frame of CLIP (default 1)")
    parser.add_argument("--patches", type=int, default=414, help="largest number of patches a frame (default 414)")
    parser.add_argument("--pairs", type=int, default=1, help="pairs of frame and clip blocks; VGGT has 24 (default 1)")
    parser.add_argument("--strength", type=float, default=1.0, help="the gate's exponent (default 1)")
    parser.add_argument("--window", type=int, help="frames a query looks back on, its own included (default: all)")
    parser.add_argument("--sinks", type=int, default=0, help="leading frames that stay visible beside the window")
    parser.add_argument(
        "--budget", type=float, default=40.0, help="seconds for the speed table, shared out (default 40)"
    )
    parser.add_argument(
        "--max-gib", type=float, help="memory limit of an implementation (default: half of what is free)"
    )
    parser.add_argument("--threads", type=int, default=0, help="threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="of the rendered clip and of the weights (default 0)")


def run(args: argparse.Namespace) -> int:
    """Render or read the clip, measure, print and write the report."""
    begin = time.perf_counter()
    _check(args)
    # Late imports: bad options are refused at once.
    from gate4d import Visibility
    from gate4d.benchmarks.measure import processes
    from gate4d.benchmarks.measure.resident import available_memory
    from gate4d.benchmarks.models import SPECIAL_TOKENS
    from gate4d.benchmarks.report import result_files
    from gate4d.benchmarks.sequences import clip_stack, trained
    from gate4d.data import read_clip, render_clip
    from gate4d.data.clip import fitted_size
    from gate4d.models import TRAINED_PATCHES

    from . import demo_report

    demo_report.check_folder(args.out)
    model = _trained(args.weights)
    patch = 14
    with progress("rendering the clip" if args.clip is None else "reading the clip") as show:

        def clip_of(patch: int, patches: int):
            if args.clip is None:
                size = fitted_size(392, 518, patch=patch, max_patches=patches)
                return render_clip(args.frames, *size, seed=args.seed)
            return read_clip(args.clip, max_frames=args.frames, stride=args.stride, patch=patch, max_patches=patches)

        outcomes, small = [], None
        if model is not None:
            small = clip_of(model.aggregator.patch_size, TRAINED_PATCHES)
            show("running the trained model")
            outcomes = trained.reconstruct(model, small)
        clip = clip_of(patch, args.patches)
        if clip.masks is not None:
            motion = clip_stack.pool_to_patches(clip.masks, patch)
            cue = "share of truly moving pixels in the patch"
        else:
            motion = clip_stack.frame_difference(clip.frames, patch)
            cue = "plain frame difference (answers to camera motion too)"

        counts = processes.frame_counts(len(clip.frames))
        limit = int(args.max_gib * 2**30) if args.max_gib else available_memory() // 2
        case = clip_stack.StackCase(
            args.strength, args.window, args.sinks, {"pairs": args.pairs, "patch": patch, "seed": args.seed}
        )
        steps = len(counts) * len(clip_stack.IMPLEMENTATIONS)
        show("starting three processes", total=steps + 1, done=0)
        study, gate_effect = clip_stack.measure(
            clip.frames, motion, counts, case, processes.Limits(args.budget, limit, threads=args.threads),
            lambda share, text: show(text, done=int(share * steps), passing=text.endswith("rounds")),
        )  # fmt: skip
        show("writing the report", done=steps)
        served = _backend(result_files.served_by("auto", Visibility.packed([0, 1])))
        about = result_files.envelope("demo", study.threads) | {
            "weights": "random",
            "trained": {"weights": args.weights, "runs": [o.figures() for o in outcomes]} if outcomes else None,
            "model": {"pairs": args.pairs, "heads": 16, "head_dim": 64, "special_tokens": SPECIAL_TOKENS},
            "gate": {"strength": args.strength, "window": args.window, "sinks": args.sinks, "cue": cue},
            "gate4d_backend": served,
        }
        with demo_report.written_at_once(args.out) as folder:
            result_files.write(folder / "figures.json", demo_report.figures(study, gate_effect, clip, about))
            subtitle = f"{args.pairs} frame + {args.pairs} clip block, 16 heads x 64, fp32, random weights"
            subtitle += f", {study.threads} threads, gate4d's {served['name']} backend"
            demo_report.draw_curves(folder / "curves.png", study, subtitle)
            demo_report.draw_overlay(folder / "overlay.png", clip, motion, patch, cue)
            if outcomes:
                demo_report.draw_trained(folder / "reconstruction.png", small, outcomes)
        show("done", done=steps + 1)

    machine = f"{study.threads} threads, {about['hardware']['processor']}"
    lines = [*field("clip", f"{clip.name}: {len(clip.frames)} frames"), *field("machine", machine)]
    if outcomes:
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        lines += ["", *field("trained", f"{parameters:.1f} M parameters, frames of {_size(small)}; {_TRAINED}")]
        lines += demo_report.trained_table(outcomes)
    else:
        lines += field("trained", "left out: no weights are shipped; --weights FILE takes others")
    lines += [
        "",
        *field("speed", f"a VGGT-shaped stack, {args.pairs} frame + {args.pairs} clip block, 16 heads x 64, RANDOM"
               f" WEIGHTS, frames of {_size(clip)}; gate4d's {served['name']} backend"),
        *field("motion", cue),
    ]  # fmt: skip
    if served["name"] == "reference":
        lines += field("", f"it holds the maps in memory and is slow, because {served['why_not_cpu']}")
    lines += ["", *demo_report.speed_table(study), ""]
    lines += [f"{curve.name} stopped {curve.stopped}." for curve in study.curves if curve.stopped]
    lines += ["FPS: whole forward pass. Peak: memory touched by it above the loaded model."]
    lines += ["max diff: largest difference of outputs, relative to the largest output;"]
    lines += [f"switching the gate off changes them by {gate_effect:.1e}."]
    written = [str(args.out / f) for f in demo_report.FILES if (args.out / f).exists()]
    lines += [f"Wrote {', '.join(written)} in {time.perf_counter() - begin:.0f} s."]
    print("\n".join(lines))
    return 0


_TRAINED = '"gates" drops what the first run found to move from the keys of early blocks, "stream" is MoRe'


def _trained(weights: str):
    """The model, or None if the default is asked for and none is shipped."""
    from gate4d import models

    try:
        model = models.load(weights)
    except FileNotFoundError:
        if weights != "alternating":
            raise
        return None
    if not hasattr(model, "aggregator"):
        raise ValueError(f"--weights must be of the alternating model, {weights} holds {type(model).__name__}.")
    return model


def _size(clip) -> str:
    height, width = clip.frames.shape[1:3]
    return f"{width}x{height}"


def _check(args: argparse.Namespace) -> None:
    for name, least in (("frames", 2), ("stride", 1), ("patches", 1), ("pairs", 1), ("sinks", 0), ("threads", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    if args.window is not None and args.window < 1:
        raise ValueError(f"--window must be at least 1 (frames, the current one included), got {args.window}.")
    for name in ("budget", "max_gib"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value:g}.")
    if not (math.isfinite(args.strength) and args.strength >= 0):
        raise ValueError(f"--strength must be finite and >= 0, got {args.strength}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("The demo needs matplotlib: pip install 'gate4d[demo]'.")


def _backend(served: dict) -> dict[str, str | None]:
    """Which backend serves the demo's calls, and why the compiled one does not, if so."""
    said = next(line.strip() for line in served["backends"] if line.strip().startswith("cpu:"))
    why = said.removeprefix("cpu: ")
    return {"name": served["backend"], "why_not_cpu": None if why == "can run" else why}
