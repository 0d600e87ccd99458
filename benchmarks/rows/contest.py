"""Variants of a row against each other: built, checked, timed in turns, and reduced to rows."""

from __future__ import annotations

import time
from collections.abc import Callable

from .. import peers
from ..check import Expected
from ..measure.rounds import Comparison, compare
from .target import Conditions, TargetRow, one_line


class Contest:
    """Variants of one row, checked against their expected results before they are timed; ratios are paired."""

    def __init__(self, conditions: Conditions, title: str):
        self.conditions = conditions
        self.title = title
        self.steps: dict[str, peers.Step] = {}
        self.failed: dict[str, str] = {}
        self.prepared: dict[str, tuple[float, float]] = {}  # seconds of building a variant and of its first call

    def enter(
        self,
        name: str,
        build: Callable[[], peers.Step],
        expected: Expected,
        *,
        peer: bool = False,
        optional: bool = False,
    ) -> float:
        """Add a variant; returns the seconds that building it and its first call took.

        A wrong result always raises. Any other failure of an ``optional`` peer, one that runs out of memory, is kept
        for the row's ``peers``.
        """
        self.conditions.report(f"{self.title}: checking {name}")
        begin = time.perf_counter()
        try:
            step = build()
            built = time.perf_counter()
            results = step()
        except Exception as e:
            if not optional:
                raise
            self.failed[name] = f"failed, {one_line(e)}"
            return 0.0
        end = time.perf_counter()
        expected.verify(name, results, peer=peer or optional)
        self.steps[name] = step
        self.prepared[name] = built - begin, end - built
        return end - begin

    def run(self, calls: int = 1) -> Comparison:
        """Time all that were entered."""
        effort = self.conditions.effort
        return compare(
            self.steps,
            seconds=effort.seconds,
            threads=self.conditions.threads,
            min_rounds=effort.min_rounds,
            max_rounds=effort.max_rounds,
            calls=calls,
            sample_seconds=effort.sample_seconds,
            on_round=lambda n: self.conditions.report(f"{self.title}: round {n}"),
        )

    def row(
        self, timed: Comparison, id: str, what: str, of: str, to: str, limit: float, note: str, *versus: str
    ) -> TargetRow:
        """The row ``of / to``; ``versus`` names further peers that ``of`` is compared with."""
        shown = [name for name in (of, to, *versus) if name in self.steps]
        timed = timed.only(*shown)
        ratio = timed.ratio(of, to)
        others = {name: timed.ratio(of, name).median for name in shown[2:]}
        others |= {name: self.failed[name] for name in versus if name in self.failed}
        notes = [note, *timed.warnings()]
        return TargetRow(
            id, what, ratio.median, limit, medians=timed.medians(), times=timed.times, waits=timed.waits,
            spread=ratio.spread, peers=others, note="; ".join(notes),
        )  # fmt: skip
