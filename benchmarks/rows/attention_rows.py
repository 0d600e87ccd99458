"""The CPU targets of attention, one function each: C1 to C8 and C12.

Ratios are times of variants that take turns in one run, same threads, same dtype, random inputs; below the target is
better. Forward passes run without autograd. Every variant's result is checked before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import torch

from .. import peers
from ..check import Expected, expected_backward, expected_forward
from ..inputs import Inputs, make_inputs
from ..measure import memory
from ..measure.rounds import Comparison, compare
from ..registry import AttentionShape
from .target import Row, Settings, one_line, target

_STATS = ("entropy", "max_prob", "sum_sq")


class Contest:
    """Variants of one row: built, checked against their expected results, then timed in turns."""

    def __init__(self, settings: Settings, title: str):
        self.settings = settings
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
        self.settings.report(f"{self.title}: checking {name}")
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
        effort = self.settings.effort
        return compare(
            self.steps,
            seconds=effort.seconds,
            threads=self.settings.threads,
            min_rounds=effort.min_rounds,
            max_rounds=effort.max_rounds,
            calls=calls,
            sample_seconds=effort.sample_seconds,
            on_round=lambda n: self.settings.report(f"{self.title}: round {n}"),
        )

    def row(
        self, timed: Comparison, id: str, what: str, of: str, to: str, limit: float, note: str, *versus: str
    ) -> Row:
        """The row ``of / to``; ``versus`` names further peers that ``of`` is compared with."""
        shown = [name for name in (of, to, *versus) if name in self.steps]
        timed = timed.only(*shown)
        ratio = timed.ratio(of, to)
        others = {name: timed.ratio(of, name).median for name in shown[2:]}
        others |= {name: self.failed[name] for name in versus if name in self.failed}
        notes = [note, *timed.warnings()]
        return Row(
            id, what, ratio.median, limit, medians=timed.medians(), times=timed.times, waits=timed.waits,
            spread=ratio.spread, peers=others, note="; ".join(notes),
        )  # fmt: skip


def _size(x: Inputs) -> str:
    batch, heads, queries, dim = x.q.shape
    keys = "" if x.k.shape[2] == queries else f" x {x.k.shape[2]}"
    return f"{'' if batch == 1 else f'B = {batch}, '}H = {heads}, N = {queries}{keys}, D = {dim}"


def _ours(s: Settings, x: Inputs, **options) -> Callable[[], peers.Step]:
    return partial(peers.gate4d_forward, x, backend=s.backend, **options)


def _forward_against_sdpa(s: Settings, id: str, dtype: torch.dtype, limit: float) -> list[Row]:
    x = make_inputs(s.shape("vggt.global"), 4, dtype=dtype, gate="pairwise")
    name = str(dtype).removeprefix("torch.")
    gated = expected_forward(x)
    contest = Contest(s, id)
    contest.enter("gate4d", _ours(s, x), gated)
    contest.enter("SDPA", partial(peers.sdpa, x), expected_forward(x.ungated()), peer=True)
    contest.enter("SDPA + mask", partial(peers.sdpa_masked, x), gated, optional=True)
    return [
        contest.row(contest.run(), id, f"gated forward {name} / SDPA", "gate4d", "SDPA", limit, _size(x), "SDPA + mask")
    ]


@target("C1", "gated forward float32 / SDPA")
@torch.no_grad()
def gated_forward_fp32(s: Settings) -> list[Row]:
    """Four VGGT frames, pairwise gate, against un-gated SDPA."""
    return _forward_against_sdpa(s, "C1", torch.float32, 0.85)


@target("C2", "gated forward bfloat16 / SDPA")
@torch.no_grad()
def gated_forward_bf16(s: Settings) -> list[Row]:
    """The same in bfloat16, against SDPA in bfloat16."""
    return _forward_against_sdpa(s, "C2", torch.bfloat16, 0.55)


@target("C3", "gated forward float32 / compiled FlexAttention")
@torch.no_grad()
def gated_forward_flex(s: Settings) -> list[Row]:
    """The same bias in compiled FlexAttention; its compilation is timed apart."""
    x = make_inputs(s.shape("vggt.global"), 4, gate="pairwise")
    gated = expected_forward(x)
    contest = Contest(s, "C3")
    contest.enter("gate4d", _ours(s, x), gated)
    compile_seconds = contest.enter("FlexAttention", partial(peers.flex_attention, x), gated, peer=True)
    timed = contest.run()
    note = (
        f"{_size(x)}; FlexAttention's compilation, {compile_seconds - timed.median('FlexAttention'):.1f} s, not counted"
    )
    return [contest.row(timed, "C3", "gated forward / FlexAttention", "gate4d", "FlexAttention", 0.40, note)]


@target("C4", "forward + backward with gate gradients / SDPA's")
def forward_backward(s: Settings) -> list[Row]:
    """Gradients for q, k, v and the motion scores, against SDPA's forward and backward without any gate."""
    x = make_inputs(s.shape("vggt.global"), 4, gate="pairwise", requires_grad=True)
    grad_out = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(2))
    plain = x.ungated()
    contest = Contest(s, "C4")
    ours = partial(peers.gate4d_forward, backend=s.backend)
    contest.enter("gate4d", partial(peers.with_backward, ours, x, grad_out), expected_backward(x, grad_out))
    theirs = partial(peers.with_backward, peers.sdpa, plain, grad_out)
    contest.enter("SDPA", theirs, expected_backward(plain, grad_out), peer=True)
    return [contest.row(contest.run(), "C4", "forward + backward / SDPA's", "gate4d", "SDPA", 1.0, _size(x))]


@target("C5", "30 % of the keys dropped / no gate")
@torch.no_grad()
def dropped_keys(s: Settings) -> list[Row]:
    """A hard gate must save time in proportion to the keys it drops."""
    x = make_inputs(s.shape("vggt.global"), 4, gate="drop", drop_fraction=0.3)
    expected = expected_forward(x)
    contest = Contest(s, "C5")
    contest.enter("dropped", _ours(s, x), expected)
    contest.enter("no gate", _ours(s, x.ungated()), expected_forward(x.ungated()))
    contest.enter("SDPA + mask", partial(peers.sdpa_masked, x), expected, optional=True)
    return [
        contest.row(
            contest.run(), "C5", "30 % of keys dropped / no gate", "dropped", "no gate", 0.75, _size(x), "SDPA + mask"
        )
    ]


@target("C6", "frame-causal over 8 frames / full, and a window of 2")
@torch.no_grad()
def frame_causal(s: Settings) -> list[Row]:
    """Tiles that no query sees must cost nothing."""
    shape = s.shape("vggt.global")
    causal = make_inputs(shape, 8, visible="frame_causal")
    window = make_inputs(shape, 8, visible="frame_causal", window=2)
    full = causal.ungated()
    contest = Contest(s, "C6")
    contest.enter("full", _ours(s, full), expected_forward(full))
    contest.enter("window of 2", _ours(s, window), expected_forward(window))
    contest.enter("frame-causal", _ours(s, causal), expected_forward(causal))
    contest.enter("SDPA + mask", partial(peers.sdpa_masked, causal), expected_forward(causal), optional=True)
    timed = contest.run()
    causal_row = ("C6", "frame-causal, 8 frames / full", "frame-causal", "full", 0.62, _size(full), "SDPA + mask")
    window_row = ("C6", "window of 2 frames / full", "window of 2", "full", 0.30, _size(full))
    return [contest.row(timed, *causal_row), contest.row(timed, *window_row)]


@target("C7", "extra memory beyond inputs and outputs, a thread")
def extra_memory(s: Settings) -> list[Row]:
    """The growth of a fresh process's resident set in one call, at growing N; see :mod:`.memory` for the method."""
    shape, sizes = replace(s.shape("vggt.global"), heads=s.effort.memory_heads), s.effort.memory_tokens
    largest = sizes[-1:]
    lines = [
        _memory_row(s, "forward, pairwise gate", shape, sizes, gate="pairwise"),
        _memory_row(s, "forward, bfloat16", shape, largest, gate="pairwise", dtype="bfloat16"),
        _memory_row(s, "forward, 30 % of keys dropped", shape, largest, gate="drop"),
        _memory_row(s, "forward + backward", shape, sizes[:2], gate="pairwise", backward=True),
    ]
    for name, implementation in (("SDPA", "sdpa"), ("SDPA + mask", "sdpa_masked"), ("maps", "materialised")):
        tokens = sizes[0]
        lines[0].peak_memory |= _peaks(
            s, shape, (tokens,), implementation, label=f"{name}, ", optional=True, gate="pairwise"
        )
    return lines


def _memory_row(s: Settings, what: str, shape: AttentionShape, sizes: tuple[int, ...], **case) -> Row:
    peaks = _peaks(s, shape, sizes, "gate4d_forward", backend=s.backend, **case)
    worst = max(peaks.values()) / s.threads / memory.MIB
    note = f"H = {shape.heads}, D = {shape.head_dim}; worst of N = {', '.join(map(str, sizes))}; {s.threads} threads"
    return Row("C7", f"memory, {what}", worst, 16.0, "MiB", peak_memory=peaks, note=note)


def _peaks(
    s: Settings,
    shape: AttentionShape,
    sizes: tuple[int, ...],
    implementation: str,
    *,
    label: str = "",
    optional: bool = False,
    **case,
) -> dict[str, int | str]:
    """Extra bytes at each N, one fresh process each."""
    peaks: dict[str, int | str] = {}
    for n in sizes:
        s.report(f"C7: {implementation}, N = {n}")
        single = replace(shape, queries=n, keys=n, special=0)  # one frame of N tokens
        arguments = {"implementation": implementation, "shape": asdict(single), "frames": 1, **case}
        try:
            found = memory.peak_growth(
                "gate4d.benchmarks.measure.memory:attention_step", threads=s.threads, **arguments
            )
        except RuntimeError as e:
            if not optional:
                raise
            peaks[f"{label}N = {n}"] = f"failed, {one_line(e)}"
        else:
            peaks[f"{label}N = {n}"] = found["extra_bytes"]
    return peaks


@target("C8", "gate on / off, and row statistics on / off")
@torch.no_grad()
def gate_and_statistics(s: Settings) -> list[Row]:
    """What the gate and the statistics cost inside the own kernel."""
    x = make_inputs(s.shape("vggt.global"), 4, gate="pairwise")
    contest = Contest(s, "C8")
    contest.enter("no gate", _ours(s, x.ungated()), expected_forward(x.ungated()))
    contest.enter("gate", _ours(s, x), expected_forward(x))
    contest.enter("gate + statistics", _ours(s, x, row_stats=_STATS), expected_forward(x, _STATS))
    plain = x.ungated()
    contest.enter("statistics", _ours(s, plain, row_stats=_STATS), expected_forward(plain, _STATS))
    timed = contest.run()
    return [
        contest.row(timed, "C8", "row statistics on / off, gated", "gate + statistics", "gate", 1.08, _size(x)),
        contest.row(timed, "C8", "row statistics on / off, no gate", "statistics", "no gate", 1.08, _size(x)),
        contest.row(timed, "C8", "gate on / off", "gate", "no gate", 1.08, _size(x)),
    ]


@target("C12", "overhead of a call at N = 64 against SDPA")
@torch.no_grad()
def call_overhead(s: Settings) -> list[Row]:
    """Microseconds a call beyond SDPA's; the gate object is built once."""
    calls = 1000 if s.effort.seconds else 1
    rows = []
    for heads in (1, s.shape("vggt.global").heads):
        shape = replace(s.shape("vggt.global"), heads=heads, queries=64, keys=64, special=0)
        x = make_inputs(shape, 1, gate="pairwise")
        plain = x.ungated()
        contest = Contest(s, "C12")
        contest.enter("no gate", _ours(s, plain), expected_forward(plain))
        contest.enter("gate", _ours(s, x), expected_forward(x))
        contest.enter("SDPA", partial(peers.sdpa, plain), expected_forward(plain), peer=True)
        timed = contest.run(calls)
        for name in ("no gate", "gate"):
            row = contest.row(timed, "C12", f"call - SDPA's, {name}, H = {heads}", name, "SDPA", 10.0, _size(x))
            more = timed.difference(name, "SDPA")
            rows.append(replace(row, ratio=more.median * 1e6, spread=more.spread * 1e6, unit="us", peers={}))
    return rows
