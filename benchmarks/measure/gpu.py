"""Variants in turns on a GPU: paired rounds as in :mod:`.rounds`, timed by CUDA events.

In a round a variant is called for a few hundredths of a second, the cache flushed between the calls, and the median
counts; a variant whose calls are long is called once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

import torch

from .rounds import Comparison

ROUNDS = 5
WARM_MS, ROUND_MS = 10, 60


def sample(step: Callable[[], object]) -> float:
    """Seconds of a call: the median of as many as fit a round. One call where there is no GPU (a dry run)."""
    if not torch.cuda.is_available():
        return single(step)
    import triton.testing

    return triton.testing.do_bench(step, warmup=WARM_MS, rep=ROUND_MS, return_mode="median") / 1e3


def single(step: Callable[[], object]) -> float:
    """Seconds of one call, on the CPU where there is no GPU (a dry run)."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def compare(
    variants: Mapping[str, Callable[[], object]],
    *,
    optional: Collection[str] = (),
    rounds: int = ROUNDS,
    timer: Callable[[Callable[[], object]], float] = sample,
    seconds: float = float("inf"),
) -> tuple[Comparison, dict[str, str]]:
    """Time ``variants`` in turns, every second round in reverse order.

    No round begins after ``seconds``, the first apart. Returns the times, and for each of the ``optional`` ones that
    could not run the error; it takes no further part.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    failed: dict[str, str] = {}
    end = time.monotonic() + seconds
    for n in range(rounds):
        if n and time.monotonic() > end:
            break
        for name in list(times) if n % 2 == 0 else list(reversed(times)):
            try:
                times[name].append(timer(variants[name]))
            except (RuntimeError, ValueError, TypeError) as e:
                if name not in optional:
                    raise
                failed[name] = " ".join(str(e).split())[:300]
                del times[name]
    return Comparison(times), failed
