"""Curves over frames for people: 80-column tables, Markdown, and what is predicted beyond them."""

from __future__ import annotations

import numpy as np

from gate4d.terminal import markdown_table, table

from ..measure.resident import MIB
from ..measure.rounds import QUIET
from ..sequences import predictions
from ..sequences.contestants import SEQUENCES
from .documents import heading


def lines(result: dict, chosen: list[str]) -> list[str]:
    """All tables of a results file, in the order of ``chosen``."""
    found: list[str] = []
    for name in chosen:
        data = result["backbones"].get(name)
        found += ["", *([f"{name}: FAILED, {result['errors'][name]}"] if data is None else backbone_table(name, data))]
    if result["backbones"]:
        found += ["", *prediction_table(result["backbones"])]
    return [*found, "", *gpu_table()]


def backbone_table(name: str, data: dict) -> list[str]:
    """Speed (a stream: milliseconds for the last frame) and memory of every contestant, ratios, what was counted."""
    contestants = list(data["curves"])
    unit = "ms" if SEQUENCES[name].stream else "FPS"
    rows: list = [
        f"{name}: shaped like {data['stands_for']}; {data['tokens_per_frame']} tokens a frame",
        " " * 6 + "".join(f"{c.replace('window', 'wind.'):>14}" for c in contestants),
        ("frames", *(unit, "MiB") * len(contestants)),
    ]
    for n in data["counts"]:
        rows.append((n, *(cell for c in contestants for cell in _cells(name, data, c, n) or ("-", "-"))))
    return table(">6" + " >8 >6" * len(contestants), rows) + ends(data)


def _cells(name: str, data: dict, contestant: str, frames: int) -> tuple[str, str] | None:
    """Speed and MiB of a point; None where the contestant did not get so far."""
    p = next((p for p in data["curves"][contestant]["points"] if p["frames"] == frames), None)
    if p is None:
        return None
    speed = f"{p['latency_seconds'] * 1000:.1f}" if SEQUENCES[name].stream else f"{p['fps']:.2f}"
    return speed, f"{p['peak_bytes'] / MIB:.0f}"


def ends(data: dict) -> list[str]:
    """Why curves stopped, the time ratios at the last common count, and how well outputs agree."""
    found = [f"{c} stopped {curve['stopped']}." for c, curve in data["curves"].items() if curve["stopped"]]
    ratios = [(c, *list(r.items())[-1]) for c, r in data["time_ratios"].items() if r]
    found += [f"time of gate4d / {c} at {n} frames: {r:.3f}" for c, n, r in ratios]
    waits = [p["wait"] for c in data["curves"].values() for p in c["points"] if p["wait"] is not None]
    if disturbed := sum(w >= QUIET for w in waits):
        found.append(
            f"DISTURBED: at {disturbed} of {len(waits)} points the process waited for others, up to {max(waits):.0%}"
        )
    if not data.get("together", True):
        found.append("the processes did not fit into memory side by side: they ran call by call, less comparably")
    worst = max(data["largest_relative_difference"].values(), default=None)
    if worst is not None:
        found.append(f"outputs that should agree differ by at most {worst:.1e} of the largest")
    return found


def prediction_table(found: dict[str, dict]) -> list[str]:
    """What 1,000 and 10,000 frames would take: the same stacks here, and VGGT's size on GPUs."""
    rows: list = ["PREDICTED, not measured: curves through the points above; bytes from shapes"]
    rows.append("".join([" " * 31, *(f"{f'{n:,} frames':>24}" for n in predictions.FRAMES)]))
    for name, data in found.items():
        for contestant, said in data["predicted"].items():
            at = [said["frames"][str(n)] for n in predictions.FRAMES]
            rows.append((name, contestant, *(x for p in at for x in (_time(p["seconds"]), size(p["peak_bytes"])))))
    errors = [abs(s["last_point_error"]) for d in found.values() for s in d["predicted"].values()
              if s["last_point_error"] is not None]  # fmt: skip
    if errors:
        rows.append(
            f"the same fit misses the last measured point by {np.median(errors):.0%} in the median, "
            f"{max(errors):.0%} at most"
        )
    return table("<12 <19" + " >12 >12" * len(predictions.FRAMES), rows)


def gpu_table() -> list[str]:
    """The multi-GPU predictions."""
    rows: list = [
        "PREDICTED for VGGT's size (24 + 24 blocks, 1041 tokens a frame), bf16, assuming",
        f"{predictions.ASSUMED_TFLOPS:.0f} TFLOP/s a GPU, no time for communication; gate4d has no multi-GPU runner",
        ("frames", "GPUs", "memory a GPU", "with a dense mask", "PFLOP", "time"),
    ]
    for s in predictions.sharded():
        dense = size(predictions.vggt_bytes(s.frames, "SDPA + mask")) if s.gpus == 1 else ""
        operations = f"{s.operations / 1e15:,.0f}"
        rows.append((f"{s.frames:,}", s.gpus, size(s.bytes_per_gpu), dense, operations, _time(s.seconds)))
    return table(">8 >6 >16 >20 >10 >12", rows)


def markdown(result: dict) -> str:
    """The results file as the sequences part of BENCHMARKS.md: a table and a picture per backbone, then predictions."""
    found = [f"- {line}" for line in heading(result)]
    found.append(f"- memory limit {size(result['max_bytes'])} a process; {result['effort']} effort")
    for name, data in result["backbones"].items():
        contestants = list(data["curves"])
        unit = "ms for the last frame" if SEQUENCES[name].stream else "frames a second"
        found += ["", f"### {name}: {data['stands_for']}", ""]
        found += [f"{data['tokens_per_frame']} tokens a frame; {unit}, then peak MiB above the loaded model.", ""]
        rows = [(n, *("; ".join(_cells(name, data, c, n) or "-") for c in contestants)) for n in data["counts"]]
        found += [*markdown_table(("frames", *contestants), rows), "", *(f"- {line}" for line in ends(data))]
        found += _picture(result, name, name)
    found += ["", "### Predicted", "", "```", *prediction_table(result["backbones"]), "", *gpu_table(), "```"]
    return "\n".join([*found, *_picture(result, "predicted", "predictions")]) + "\n"


def _picture(result: dict, ending: str, text: str) -> list[str]:
    name = next((p for p in result["pictures"] if p.endswith(f"-{ending}")), None)
    return [] if name is None else ["", f"![{text}](benchmarks/results/{name}.png)"]


def size(size: float | None) -> str:
    """Bytes with a unit that keeps three digits."""
    if size is None:
        return "-"
    for unit in ("MiB", "GiB", "TiB"):
        size /= 1024 if unit != "MiB" else MIB
        if size < 1000:
            return f"{size:.3g} {unit}"
    return f"{size:,.0f} TiB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for limit, unit, name in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"
