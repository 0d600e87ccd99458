"""The two rules by which a ratio of times is taken; every one that is reported follows one of them. Bytes are divided
where they are counted, in :mod:`..rows`.

- Paired: implementations took turns in one process. Each round gives a ratio, and the median of those counts: a slow
  drift of the clock frequency or of the load cancels within a round.
- Separate: each implementation ran in a process of its own. Each is reduced to the mean of the faster half of its
  rounds, since what others do to the machine adds time and never takes any, and the means are divided.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Ratio(NamedTuple):
    """Median over the rounds and half of the interquartile range."""

    median: float
    spread: float


def paired(of: Sequence[float], to: Sequence[float]) -> Ratio:
    """``of / to``, round by round; entry ``i`` of both is the same round."""
    return _summary([a / b for a, b in zip(of, to, strict=True)])


def paired_difference(of: Sequence[float], to: Sequence[float]) -> Ratio:
    """``of - to`` by the same rule, in the unit of the times."""
    return _summary([a - b for a, b in zip(of, to, strict=True)])


def separate(of: Sequence[float], to: Sequence[float]) -> float:
    """``of / to``, each by the faster half of its own rounds."""
    return faster_half(of) / faster_half(to)


def faster_half(seconds: Sequence[float]) -> float:
    """Mean of the faster half, the middle one of an odd number included."""
    return statistics.fmean(sorted(seconds)[: (len(seconds) + 1) // 2])


def _summary(values: list[float]) -> Ratio:
    if len(values) == 1:
        return Ratio(values[0], 0.0)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(middle, (high - low) / 2)
