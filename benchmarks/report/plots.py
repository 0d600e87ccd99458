"""Pictures of a :class:`.curves.Study`: speed, latency and memory against the number of frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..measure.curves import Curve, Point, Study
from ..measure.resident import MIB

# gate4d is blue everywhere, what holds maps red, dense masks orange, un-gated attention grey; markers serve print
# without colour.
LOOKS = {
    "gate4d": ("#1a6fb5", "o"), "gate4d, window": ("#0b9e8f", "D"), "maps": ("#c0392b", "s"),
    "SDPA + mask": ("#e08e0b", "^"), "SDPA": ("#6d7a86", "v"), "FlexAttention": ("#8e44ad", "P"),
}  # fmt: skip
_PANELS: dict[str, tuple[str, str, Callable[[Point], float]]] = {
    "speed": ("speed", "frames per second", lambda p: p.fps),
    "latency": ("latency", "ms for the last frame", lambda p: p.latency * 1000),
    "memory": ("peak memory", "MiB beyond the model", lambda p: p.peak_bytes / MIB),
}
_ENDS = {"memory": "out of memory at", "time": "time budget before"}
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

    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams["svg.hashsalt"] = "gate4d"  # the same figures give the same file
    return plt


def draw(
    path: Path,
    study: Study,
    title: str,
    *,
    panels: Sequence[str] = tuple(_PANELS),
    counted: Bytes | None = None,
    limit: int | None = None,
    latency_label: str | None = None,
) -> None:
    """One panel per entry of ``panels``, written to ``path``; a name without suffix gives .png and .svg.

    ``counted`` is the memory model, drawn as thin dashed lines beside the measurement; ``limit`` the bytes a process
    may grow by, drawn where the panel reaches them. Where a contestant stopped, its curve ends in a cross and the
    legend says at which count and why; there no label can lie on another curve.
    """
    plt = pyplot()
    fig, axes = plt.subplots(1, len(panels), figsize=(4.8 * len(panels), 4.9), layout="constrained", squeeze=False)
    fig.get_layout_engine().set(w_pad=0.1)
    for ax, name in zip(axes[0], panels, strict=True):
        heading, label, value = _PANELS[name]
        if name == "latency" and latency_label is not None:
            label = latency_label
        for curve in study.curves:
            _plot(ax, curve, value)
        if name == "memory":
            _explain(ax, counted or {}, limit)
        _scale(ax, study, heading, label, log_y=name == "memory" and any(c.points for c in study.curves))
    handles, labels = axes[0][0].get_legend_handles_labels()
    columns = min(len(labels), max(2, 5 * len(panels) // 3))
    fig.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    fig.suptitle(title, fontsize=11)
    save(fig, path)


def save(fig, path: Path) -> None:
    """Write a figure to ``path``, or to .png and .svg if it has no suffix, and close it."""
    files = [path] if path.suffix else [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in files:
        fig.savefig(file, dpi=130, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot().close(fig)


def _look(name: str) -> tuple[str | None, str]:
    return LOOKS.get(name, (None, "o"))


def _plot(ax, curve: Curve, value: Callable[[Point], float]) -> None:
    x, y = [p.frames for p in curve.points], [value(p) for p in curve.points]
    own, (colour, marker) = curve.name.startswith("gate4d"), _look(curve.name)
    label = curve.name
    if curve.ended is not None:
        label += f"\n\N{MULTIPLICATION SIGN} {_ENDS[curve.ended]} {curve.stopped_at} frames"
    ax.plot(
        x, y, color=colour, marker=marker, markersize=5.5, linewidth=2.4 if own else 1.8, label=label,
        zorder=3 if own else 2,
    )  # fmt: skip
    if curve.ended is not None and curve.points:
        ax.plot(x[-1], y[-1], marker="x", color=colour, markersize=13, markeredgewidth=2.5, zorder=4)


def _explain(ax, counted: Bytes, limit: int | None) -> None:
    """The memory model beside the measurement, and the limit of a process where the panel reaches it."""
    dashed = {"color": "black", "linewidth": 1.2, "linestyle": (0, (4, 3)), "alpha": 0.8}
    for contestant, points in counted.items():
        x, y = zip(*((n, b / MIB) for n, b in points), strict=True)
        ax.plot(x, y, **{**dashed, "color": _look(contestant)[0]})
    handles = ax.plot([], [], **dashed, label="counted from shapes") if counted else []
    if limit is not None and ax.get_ylim()[1] * MIB > limit:
        handles.append(ax.axhline(limit / MIB, color="black", linewidth=1, linestyle=":", label="memory limit"))
    if handles:
        ax.legend(handles=handles, frameon=False, fontsize=10, loc="upper left", handlelength=2.5)


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
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 20 * low else (1, 2, 3, 4, 5, 7)))
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_ylim(0, 1.06 * ax.dataLim.y1 if ax.dataLim.y1 > 0 else 1)  # nobody got as far as a point
    ax.set_xlim(study.counts[0] / 1.15, study.counts[-1] * 1.15)
    ax.grid(alpha=0.3)


def draw_predictions(path: Path) -> None:
    """Memory and time of VGGT's size against frames, counted from shapes; every curve is a prediction."""
    from ..sequences import predictions

    plt = pyplot()
    frames = (10, 30, 100, 300, 1000, 3000, 10000)
    fig, (memory, time) = plt.subplots(1, 2, figsize=(11, 4.9), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.1)
    for method, gpus, style in (("gate4d", 1, "-"), ("gate4d", 8, "--"), ("SDPA + mask", 1, "-"), ("maps", 1, "-")):
        y = [predictions.vggt_bytes(n, method, gpus) / 2**30 for n in frames]
        label = f"{method}, {gpus} GPU{'s' if gpus > 1 else ''}"
        colour, marker = _look(method)
        memory.plot(frames, y, style, color=colour, marker=marker, markersize=5.5, linewidth=2, label=label)
    for size, name in ((80, "H100"), (141, "H200")):  # named outside the panel, where no curve is
        memory.axhline(size * 1e9 / 2**30, color="black", linewidth=0.9, linestyle=":")
        beside = {"transform": memory.get_yaxis_transform(), "va": "center", "fontsize": 9}
        memory.text(1.01, size * 1e9 / 2**30, f"{name}, {size} GB", **beside)
    for gpus, style in ((1, "-"), (8, "--")):
        y = [predictions.vggt_operations(n) / gpus / predictions.ASSUMED_TFLOPS / 1e12 for n in frames]
        time.plot(
            frames,
            y,
            style,
            color=_look("gate4d")[0],
            marker="o",
            markersize=5.5,
            linewidth=2,
            label=f"{gpus} GPU{'s' if gpus > 1 else ''}",
        )
    for ax, title, label in (
        (memory, "peak memory a GPU", "GiB (log scale)"),
        (time, f"time at an assumed {predictions.ASSUMED_TFLOPS:.0f} TFLOP/s a GPU", "seconds (log scale)"),
    ):
        ax.set(title=title, ylabel=label, xlabel="frames", xscale="log", yscale="log")
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=10, loc="upper left")
    memory.set_ylim(1, 1e7)
    fig.suptitle("PREDICTION, not measured: VGGT's size (24 + 24 blocks, 1041 tokens a frame), bf16", fontsize=11)
    save(fig, path)
