"""All targets, and how one is run: what ``gate4d bench`` and ``gate4d bench systems`` choose from."""

from __future__ import annotations

from . import attention_rows, statistics_rows, system_rows  # noqa: F401 (they register their targets)
from .target import TARGETS, Conditions, Target, TargetRow, one_line


def load_targets() -> dict[str, Target]:
    """All targets, in the order of their numbers."""
    return dict(sorted(TARGETS.items(), key=lambda item: (item[0][0], int(item[0][1:]))))


def run_target(chosen: Target, conditions: Conditions) -> list[TargetRow]:
    """The target's rows; one that fails in any way is a row that says so, and the run goes on."""
    try:
        return chosen.measure(conditions)
    except Exception as e:  # a broken row must not hide the others
        return [TargetRow(chosen.id, chosen.what, error=one_line(e))]
