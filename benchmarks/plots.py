"""Pictures of a :mod:`.study`: speed, latency and memory against the number of frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .resident import MIB
from .study import Curve, Point, Study

# gate4d is blue everywhere, what holds maps red, dense masks orange, un-gated attention grey.
COLOURS = {
    "gate4d": "#1a6fb5", "gate4d, window": "#0b9e8f", "maps": "#c0392b", "SDPA + mask": "#e08e0b", "SDPA": "#6d7a86",
    "FlexAttention": "#8e44ad",
}  # fmt: skip
_PANELS: dict[str, tuple[str, str, Callable[[Point], float]]] = {
    "speed": ("speed", "frames per second", lambda p: p.fps),
    "latency": ("latency", "seconds for the last frame", lambda p: p.latency),
    "memory": ("peak memory", "MiB above the loaded model", lambda p: p.peak_bytes / MIB),
}
Bytes = Mapping[str, Sequence[tuple[int, float]]]  # per contestant: (frames, bytes)


def pyplot():
    """matplotlib without a display.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'gate4d[bench]'.") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams["svg.hashsalt"] = "gate4d"  # the same figures give the same file
    return plt


def draw(
    path: Path,
    study: Study,
    title: str,
    *,
    panels: Sequence[str] = tuple(_PANELS),
    counted: Bytes | None = None,
    latency_label: str | None = None,
) -> None:
    """One panel per entry of ``panels``, written to ``path``; a name without suffix gives .png and .svg.

    ``counted`` is the memory model, drawn as thin dashed lines beside the measurement. Where a contestant stopped its
    curve ends in a cross with the reason.
    """
    plt = pyplot()
    fig, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5.4), layout="constrained", squeeze=False)
    for ax, name in zip(axes[0], panels, strict=True):
        heading, label, value = _PANELS[name]
        if name == "latency" and latency_label is not None:
            label = latency_label
        for curve in study.curves:
            _plot(ax, curve, value)
        for contestant, points in (counted or {}).items() if name == "memory" else ():
            x, y = zip(*((n, b / MIB) for n, b in points), strict=True)
            ax.plot(x, y, color=_colour(contestant), linewidth=1.2, linestyle=(0, (4, 3)), alpha=0.8)
        _scale(ax, study, heading, label, log_y=name == "memory")
        _mark_ends(ax, study.curves, value)
    if counted and "memory" in panels:
        ax = axes[0][list(panels).index("memory")]
        (line,) = ax.plot([], [], color="black", linewidth=1.2, linestyle=(0, (4, 3)), label="counted from shapes")
        ax.legend(handles=[line], frameon=False, fontsize=9, loc="upper left", handlelength=3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    fig.suptitle(title, fontsize=12)
    save(fig, path)


def save(fig, path: Path) -> None:
    """Write a figure to ``path``, or to .png and .svg if it has no suffix, and close it."""
    files = [path] if path.suffix else [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in files:
        fig.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot().close(fig)


def _colour(name: str) -> str | None:
    return COLOURS.get(name)


def _plot(ax, curve: Curve, value: Callable[[Point], float]) -> None:
    x, y = [p.frames for p in curve.points], [value(p) for p in curve.points]
    own = curve.name.startswith("gate4d")
    ax.plot(
        x, y, color=_colour(curve.name), marker="o", markersize=5, linewidth=2.4 if own else 1.8, label=curve.name,
        zorder=3 if own else 2,
    )  # fmt: skip


def _scale(ax, study: Study, heading: str, label: str, *, log_y: bool) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    ax.set(title=heading, ylabel=label + (" (log scale)" if log_y else ""))
    ax.set(xlabel=f"frames ({study.tokens_per_frame} tokens each)", xscale="log")
    shown = study.counts
    while len(shown) > 9:  # every second label, the last one kept
        shown = shown[len(shown) % 2 == 0 :: 2]
    ax.xaxis.set_major_locator(FixedLocator(shown))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    if log_y:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_ylim(0, None)
    ax.set_xlim(study.counts[0] / 1.1, study.counts[-1] * 1.25)
    ax.grid(alpha=0.3)


def _mark_ends(ax, curves: Sequence[Curve], value: Callable[[Point], float]) -> None:
    """A cross on the last point of each curve that stopped, and its reason, lines apart where ends meet."""
    placed: list[tuple[float, float]] = []
    height = ax.bbox.height or 1.0
    for curve in sorted((c for c in curves if c.ended and c.points), key=lambda c: value(c.points[-1])):
        x, y = curve.points[-1].frames, value(curve.points[-1])
        _, pixel = ax.transData.transform((x, y))
        lift = max([0.0, *(p + 0.05 * height - pixel for px, p in placed if px == x)])
        placed.append((x, pixel + lift))
        ax.plot([x], [y], marker="x", color=_colour(curve.name), markersize=11, markeredgewidth=2.5, zorder=4)
        ax.annotate(
            {"memory": "out of memory", "time": "time budget"}[curve.ended], (x, y),
            xytext=(9, 72 / ax.figure.dpi * lift), textcoords="offset points", color=_colour(curve.name), va="center",
            fontsize=9, fontstyle="italic", annotation_clip=False,
        )  # fmt: skip


def draw_predictions(path: Path) -> None:
    """Memory and time of VGGT's size against frames, counted from shapes; every curve is a prediction."""
    from . import predictions

    plt = pyplot()
    frames = (10, 30, 100, 300, 1000, 3000, 10000)
    fig, (memory, time) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    for method, gpus, style in (("gate4d", 1, "-"), ("gate4d", 8, "--"), ("SDPA + mask", 1, "-"), ("maps", 1, "-")):
        y = [predictions.vggt_bytes(n, method, gpus) / 2**30 for n in frames]
        label = f"{method}, {gpus} GPU{'s' if gpus > 1 else ''}"
        memory.plot(frames, y, style, color=_colour(method), linewidth=2, label=label)
    for size, name, side in ((80, "80 GB: H100", "top"), (141, "141 GB: H200", "bottom")):
        memory.axhline(size * 1e9 / 2**30, color="black", linewidth=0.9, linestyle=":")
        memory.text(9, size * 1e9 / 2**30, name, fontsize=8, ha="left", va=side)
    for gpus, style in ((1, "-"), (8, "--")):
        y = [predictions.vggt_operations(n) / gpus / predictions.ASSUMED_TFLOPS / 1e12 for n in frames]
        time.plot(frames, y, style, color=_colour("gate4d"), linewidth=2, label=f"{gpus} GPU{'s' if gpus > 1 else ''}")
    for ax, title, label in (
        (memory, "peak memory a GPU", "GiB (log scale)"),
        (time, f"time at an assumed {predictions.ASSUMED_TFLOPS:.0f} TFLOP/s a GPU", "seconds (log scale)"),
    ):
        ax.set(title=title, ylabel=label, xlabel="frames", xscale="log", yscale="log")
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=9, loc="upper left")
    memory.set_ylim(1, 1e6)
    fig.suptitle("PREDICTION, not measured: VGGT's size (24 + 24 blocks, 1041 tokens a frame), bf16", fontsize=12)
    save(fig, path)
