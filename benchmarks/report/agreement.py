"""``gate4d bench --against FILE``: how far the ratios of two runs are apart.

Only ratios are compared, never times. What one process waited for others is no property of the code: figures that were
marked as disturbed are compared like the others and counted. A ratio of memory may be off by what the system's counters
leave open, a MiB of the row's largest peak, before it counts as a difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gate4d.terminal import table

from ..measure.resident import MIB
from ..measure.rounds import QUIET

TOLERANCE = 0.10


@dataclass(frozen=True)
class Figure:
    """A ratio; ``slack`` is what it may be off by its measurement's resolution."""

    name: str
    ratio: float
    slack: float = 0.0
    disturbed: bool = False


def figures(result: dict) -> dict[str, Figure]:
    """Every ratio of a results file of targets, systems or sequences, by name."""
    found = _sequences(result) if result["kind"] == "sequences" else _rows(result)
    return {f.name: f for f in found}


def _rows(result: dict) -> Iterator[Figure]:
    for row in result["rows"]:
        if row["ratio"] is None or row["unit"]:
            continue
        peaks = [b for b in row["peak_memory"].values() if not isinstance(b, str)]
        slack = MIB / max(peaks) if peaks and not row["times"] else 0.0
        disturbed, name = "DISTURBED" in row["note"], f"{row['id']} {row['what']}"
        yield Figure(name, row["ratio"], slack, disturbed)
        for peer, ratio in row["peers"].items():
            if not isinstance(ratio, str):
                yield Figure(f"{name}; / {peer}", ratio, slack, disturbed)


def _sequences(result: dict) -> Iterator[Figure]:
    for backbone, data in result["backbones"].items():
        waits = {
            (c, p["frames"]): p["wait"] or 0.0 for c, curve in data["curves"].items() for p in curve["points"]
        }  # fmt: skip
        for peer, ratios in data["time_ratios"].items():
            for n, ratio in ratios.items():
                waited = max(waits["gate4d", int(n)], waits[peer, int(n)])
                yield Figure(f"{backbone}, gate4d / {peer}, {n} frames", ratio, disturbed=waited >= QUIET)


def difference(a: Figure, b: Figure) -> float:
    """How much the larger exceeds the smaller, beyond their slack: 0.1 is ten per cent."""
    low, high = sorted((a.ratio, b.ratio))
    return max(0.0, high - max(a.slack, b.slack) - low) / low if low > 0 else 0.0


def compare(now: dict, before: dict, tolerance: float = TOLERANCE) -> tuple[list[str], bool]:
    """Lines of at most 80 columns, and whether all ratios agree.

    Raises:
        ValueError: the files have no ratio in common.
    """
    new, old = figures(now), figures(before)
    both = sorted(new.keys() & old.keys(), key=lambda name: (-difference(new[name], old[name]), name))
    if not both:
        raise ValueError("the two results files have no ratio in common: are they of the same command?")
    rows: list = [
        f"note: {what} differs: {a} and {b}"
        for what, a, b in (
            ("the processor", now["hardware"]["processor"], before["hardware"]["processor"]),
            ("the effort", now["effort"], before["effort"]),
            ("the number of threads", now["threads"], before["threads"]),
        )
        if a != b
    ]
    apart = [name for name in both if difference(new[name], old[name]) > tolerance]
    rows.append(("ratio", "now", "before", "apart"))
    for name in apart or both[:3]:
        a, b = new[name], old[name]
        mark = " (disturbed)" if a.disturbed or b.disturbed else ""
        shown = name[: 53 - len(mark)] + mark
        rows.append((shown, f"{a.ratio:.3f}", f"{b.ratio:.3f}", f"{difference(a, b):.1%}"))
    disturbed = sum(new[name].disturbed or old[name].disturbed for name in both)
    rows.append(
        f"{len(both)} ratios, {len(apart)} apart by more than {tolerance:.0%}, "
        f"the worst by {difference(new[both[0]], old[both[0]]):.1%}; {disturbed} disturbed"
    )
    if alone := sorted(new.keys() ^ old.keys()):
        rows.append(f"only in one: {', '.join(alone)}"[:80])
    return table("<54 >8 >9 >9", rows), not apart
