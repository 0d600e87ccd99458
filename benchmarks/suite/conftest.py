"""The fixture that times gate4d and a peer in turns, and stores their ratio beside pytest-benchmark's own figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from gate4d.benchmarks.measure.ratio import paired
from gate4d.benchmarks.peers import Step

SECONDS, ROUNDS = 2.5, (7, 40)


@pytest.fixture
def versus(benchmark, request) -> Callable[[Step, Step], None]:
    """``versus(ours, peer)``: both give the same results (the caller has checked), each round runs the peer, then ours.

    The peer runs in the round's setup, which pytest-benchmark does not time, so that its table shows gate4d; the
    median of the ratios of the rounds is ``extra_info["ratio"]``. Work on a GPU is waited for.
    """

    def run(ours: Step, peer: Step) -> None:
        ours, peer = _synchronised(ours), _synchronised(peer)
        theirs: list[float] = []

        def before() -> None:
            begin = time.perf_counter()
            peer()
            theirs.append(time.perf_counter() - begin)

        ours(), before()
        pair = theirs[0] * 2
        rounds = max(ROUNDS[0], min(ROUNDS[1], int(SECONDS / pair)))
        benchmark.group = request.node.path.stem
        benchmark.pedantic(ours, setup=before, rounds=rounds, warmup_rounds=1)
        times = benchmark.stats.stats.data
        ratio, spread = paired(times, theirs[-len(times) :])
        seconds = statistics.median(theirs)
        benchmark.extra_info.update(ratio=ratio, spread=spread, peer_seconds=seconds, rounds=rounds)

    return run


def _synchronised(step: Step) -> Callable[[], None]:
    def run() -> None:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run
