"""``make soak MINUTES=10``: the same work over and over in one process, whose memory must not grow.

A round is attention forward and backward with statistics, a stream through a windowed cache, a patch and
its undoing, and a whole method on the shipped recurrent model. After warming up for a tenth of the time the largest
resident size of each further tenth is noted; growing means that the last half reached more than the first half did, by
more than one of the largest tensors a round makes. Returns 1 then, or if tensors are left over.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time

import torch

import gate4d
from gate4d.models import load
from gate4d.nn import FrameKVCache

from .cases import draw, random_case
from .check import run

_CASES = 60
_PART = 10
# What the allocator may keep beyond: one more of the largest tensors that a round makes (a page of the cache is 2 MiB).
_SLACK = 2 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


class Work:
    """One round of everything."""

    def __init__(self) -> None:
        self.model = load("recurrent").eval()
        self.frames = torch.rand(4, 3, 64, 80, generator=torch.Generator().manual_seed(0))
        self.drawn = [(c, draw(c)) for c in map(random_case, range(_CASES)) if c.poison == "none"]

    def round(self) -> None:
        for case, x in self.drawn:
            values, _ = run(case, x, gate4d.gated_attention)
            q, k = x.tensors["q"], x.tensors["k"]
            gate4d.received_attention(q, k, values["lse"], visible=x.visible, scale=case.scale or None)
            if k.shape[2]:
                gate4d.cross_moments(q, k)
        cache = FrameKVCache(window=3, anchors=1)
        for _ in range(12):
            q, k, v = torch.randn(3, 1, 4, 60, 32)
            cache.append(k, v)
            cache.attend(q)
        with torch.no_grad():
            with gate4d.patch(self.model):
                pass
            with gate4d.patch(self.model, method="ttt3r") as handle:
                handle.run(self.frames)


def soak(work: Work, seconds: float) -> tuple[list[int], int, int]:
    """The largest resident size of each part after the first, the rounds, and the tensors left over."""
    begin, parts, rounds = time.monotonic(), [0] * _PART, 0
    alive = None
    while (now := time.monotonic() - begin) < seconds or rounds < 2 * _PART:
        # Few rounds in a short time: parts then are of equal rounds.
        part = min(_PART - 1, int(max(now / seconds, rounds / (2 * _PART)) * _PART)) if seconds else 0
        work.round()
        rounds += 1
        parts[part] = max(parts[part], resident())
        if alive is None and part > 0:
            alive = tensors()
    return [p for p in parts[1:] if p], rounds, tensors() - (alive or 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error("--minutes must be positive")
    sizes, rounds, left = soak(Work(), 60 * args.minutes)
    half = len(sizes) // 2
    growth = max(sizes[half:]) - max(sizes[:half])
    shown = " ".join(f"{s / 2**20:.1f}" for s in sizes)
    print(f"soak: {rounds} rounds; MiB resident by part of the time: {shown}")
    print(f"soak: the second half reached {growth / 2**10:+.0f} KiB beyond the first; {left} tensors left over")
    return int(growth > _SLACK or left > 0)


if __name__ == "__main__":
    sys.exit(main())
