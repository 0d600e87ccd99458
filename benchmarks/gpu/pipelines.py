"""The GPU targets G8 to G10: a whole pipeline, a stream with a cache, a recurrent step in a CUDA graph.

The models have the sizes of VGGT and CUT3R and random weights. None of this has run on a GPU yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gate4d
from gate4d.nn.control import observing
from gate4d.statistics.logits import mean_logits

from ..models import ModuleDecoder, StreamBlock, Vggt
from ..rows.target import TargetRow
from .work import Setup, Variant, Variants, Work, compare

STATE, IMAGE = 768, 577  # tokens of CUT3R's state, and of a 384 x 384 image with the pose token


# G8


class Passes:
    """How long each forward pass of a model takes, by the name of the run it belongs to."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.runs: dict[str, list[list[tuple[Any, Any]]]] = {}
        self._device, self._begin, self._now = device, None, []
        model.register_forward_pre_hook(lambda *_: setattr(self, "_begin", self._mark()))
        model.register_forward_hook(lambda *_: self._now.append((self._begin, self._mark())))

    def _mark(self) -> Any:
        if self._device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def of(self, name: str, step: Variant) -> Variant:
        """``step``, whose passes are kept under ``name``."""

        def run() -> object:
            self._now = []
            result = step()
            self.runs.setdefault(name, []).append(self._now)
            return result

        return run

    def medians(self, name: str) -> list[float]:
        """Seconds of each pass of a run, the first run, which warms, left out where there are others."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        runs = self.runs[name][1:] or self.runs[name]
        return [median(map(self._seconds, passes)) for passes in zip(*runs, strict=True)]

    def _seconds(self, marks: tuple[Any, Any]) -> float:
        begin, end = marks
        return begin.elapsed_time(end) / 1e3 if self._device == "cuda" else end - begin


def _vggt4d(s: Setup, frames: int, peaks: dict[str, int], passes: list[Passes]) -> Variants:
    """VGGT4D, two passes and masks, against one plain pass of the same model."""
    model = Vggt(**s.model).to(s.device, s.dtype).eval()
    passes[:] = [Passes(model, s.device)]
    images = torch.rand(frames, 3, s.image, s.image, device=s.device, dtype=s.dtype)
    plain = passes[0].of("vggt", torch.no_grad()(partial(model, images[None])))

    def both():
        with gate4d.patch(model, method="vggt4d") as handle:
            return handle.run(images)

    patched = passes[0].of("vggt4d", both)

    def check() -> None:
        """The first pass is the plain model: its depth must be the same, up to rounding through all blocks."""
        got, want = _peak(s, "vggt4d", patched, peaks), _peak(s, "vggt", plain, peaks)
        compare("the depth", got.predictions["depth"], want["depth"].double(), 64)
        if not 0 < got.masks.masks.float().mean() < 1:
            raise AssertionError("the masks hold everything, or nothing")

    return {"vggt4d": patched}, {"vggt": plain}, check


def _peak(s: Setup, name: str, step: Variant, peaks: dict[str, int]):
    """A step's result; its peak memory is kept."""
    if s.device != "cuda":
        return step()
    torch.cuda.reset_peak_memory_stats()
    result = step()
    peaks[name] = torch.cuda.max_memory_allocated()
    return result


def _memory(what: str, peaks: dict[str, int]) -> list[TargetRow]:
    """Nothing where there was no GPU to count on."""
    if not peaks:
        return []
    return [TargetRow("G8", f"{what}, peak memory", peaks["vggt4d"] / peaks["vggt"], 1.1, peak_memory=dict(peaks))]


def _each_pass(what: str, passes: list[Passes]) -> list[TargetRow]:
    """The time of each pass of VGGT4D over that of the plain one, in the runs that were timed."""
    (plain,) = passes[0].medians("vggt")
    found = passes[0].medians("vggt4d")
    return [
        TargetRow("G8", f"{what}, pass {n}", took / plain, 1.03, medians={"pass": took, "vggt": plain})
        for n, took in enumerate(found, 1)
    ]


def vggt4d_work(s: Setup, frames: int, seconds: float) -> Work:
    peaks: dict[str, int] = {}
    passes: list[Passes] = []
    what = f"VGGT4D, {frames} frames / VGGT"
    build, repeats = partial(_vggt4d, s, frames, peaks, passes), 1 if frames > 300 else 3

    def extra() -> list[TargetRow]:
        return [*_memory(what, peaks), *_each_pass(what, passes)]

    return Work(f"G8 {what}", 2.05, build, seconds, repeats, extra)


# G9


@torch.no_grad()
def _stream(s: Setup) -> Variants:
    """Latency of a frame once 200 have passed, against once 20 have; a window of 8 frames and one anchor."""
    layers, dim, heads = max(2, 24 // s.unit), s.model["width"], s.model["heads"]

    def after(frames: int) -> tuple[nn.ModuleList, Variant]:
        torch.manual_seed(0)
        blocks = nn.ModuleList(StreamBlock(dim, heads, window=8, anchors=1) for _ in range(layers)).to(
            s.device, s.dtype
        )
        side = int(s.frame**0.5) + 1
        index = torch.arange(s.frame, device=s.device)
        pos = torch.stack((index // side, index % side), -1)[None]
        frame = torch.randn(1, s.frame, dim, device=s.device, dtype=s.dtype)

        def step() -> Tensor:
            x = frame
            with torch.no_grad():
                for block in blocks:
                    x = block(x, pos)
            return x

        for _ in range(frames):
            step()
        return blocks, step

    early, late = after(20), after(200)

    def check() -> None:
        for blocks, step in (early, late):
            step()
            cache = blocks[-1].cache
            if cache.num_frames != 9:
                raise AssertionError(f"the cache holds {cache.num_frames} frames instead of 9")
            ((k, v),) = cache.pages()
            q = torch.randn(1, heads, 64, dim // heads, device=s.device, dtype=s.dtype)
            want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
            compare("the attention to the cache", cache.attend(q), want, 4)

    return {"frame 200": late[1]}, {"frame 20": early[1]}, check


# G10


@torch.no_grad()
def _recurrent(s: Setup) -> Variants:
    """A step of TTT3R against one of CUT3R: mean logits of every layer, rates, the mixed state."""
    torch.manual_seed(0)
    heads, dim = s.heads, s.heads * (48 if s.unit == 1 else 16)
    tokens = STATE // s.unit + 1, IMAGE // s.unit + 1
    model = ModuleDecoder(dim, heads, max(2, 12 // s.unit)).to(s.device, s.dtype).eval()
    state, image = (torch.randn(1, n, dim, device=s.device, dtype=s.dtype) for n in tokens)
    pos = tuple(torch.randint(0, 24, (1, n, 2), device=s.device) for n in tokens)
    means: list[Tensor] = []

    def observe(q: Tensor, k: Tensor, scale: float) -> None:
        means.append(mean_logits(q, k, over=("heads", "keys"), scale=scale))

    def cut3r() -> Tensor:
        return model(state, image, pos)[0]

    def ttt3r() -> Tensor:
        means.clear()
        controls = [sides[0]["cross"].control for sides in model.layers]
        with observing((c, observe) for c in controls):
            new = model(state, image, pos)[0]
        beta = torch.stack(means).mean(0).sigmoid().to(new.dtype)[..., None]
        return beta * new + (1 - beta) * state

    (slow, slow_out), (fast, fast_out) = (_graphed(s, f) for f in (ttt3r, cut3r))

    def check() -> None:
        slow()
        fast()
        want = torch.stack(means).double().mean(0).sigmoid()[..., None]
        mixed = want * fast_out().double() + (1 - want) * state.double()
        compare("the state", slow_out(), mixed, 8)
        if not (want > 0).logical_and(want < 1).all():
            raise AssertionError("a rate is not between 0 and 1")

    return {"TTT3R": slow}, {"CUT3R": fast}, check


def _graphed(s: Setup, run: Callable[[], Tensor]) -> tuple[Variant, Callable[[], Tensor]]:
    """``run`` recorded in a CUDA graph: its replay, and how to read the result. Called directly elsewhere."""
    if s.device != "cuda":
        last: list[Tensor] = []

        def step() -> None:
            last[:] = [torch.no_grad()(run)()]

        return step, lambda: last[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, lambda: out


def plan(s: Setup) -> list[Work]:
    """The measurements of G8 to G10."""
    clips = ((50, 40), (200, 120), (500, 480)) if s.unit == 1 else ((5, 1),)
    return [
        *(vggt4d_work(s, frames, seconds) for frames, seconds in clips),
        Work("G9 windowed stream, frame 200 / frame 20", 1.02, partial(_stream, s), 90),
        Work("G10 TTT3R / CUT3R, one step in a CUDA graph", 1.02, partial(_recurrent, s), 60),
    ]
