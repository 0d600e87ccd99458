"""The CPU targets of attention, one function each: C1 to C8 and C12.

Ratios are times of variants that take turns in one run, same threads, same dtype, random inputs; below the target is
better. Forward passes run without autograd. Every variant's result is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import torch

from .. import peers
from ..check import expected_backward, expected_forward
from ..inputs import Inputs, make_inputs
from ..measure import memory
from ..measure.resident import MIB
from ..registry import AttentionShape
from .contest import Contest
from .target import Conditions, TargetRow, one_line, target

_STATS = ("entropy", "max_prob", "sum_sq")


def _size(x: Inputs) -> str:
    batch, heads, queries, dim = x.q.shape
    keys = "" if x.k.shape[2] == queries else f" x {x.k.shape[2]}"
    return f"{'' if batch == 1 else f'B = {batch}, '}H = {heads}, N = {queries}{keys}, D = {dim}"


def _ours(s: Conditions, x: Inputs, **options) -> Callable[[], peers.Step]:
    return partial(peers.gate4d_forward, x, backend=s.backend, **options)


def _forward_against_sdpa(s: Conditions, id: str, dtype: torch.dtype, limit: float) -> list[TargetRow]:
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
def gated_forward_fp32(s: Conditions) -> list[TargetRow]:
    """Four VGGT frames, pairwise gate, against un-gated SDPA."""
    return _forward_against_sdpa(s, "C1", torch.float32, 0.85)


@target("C2", "gated forward bfloat16 / SDPA")
@torch.no_grad()
def gated_forward_bf16(s: Conditions) -> list[TargetRow]:
    """The same in bfloat16, against SDPA in bfloat16."""
    return _forward_against_sdpa(s, "C2", torch.bfloat16, 0.55)


@target("C3", "gated forward float32 / compiled FlexAttention")
@torch.no_grad()
def gated_forward_flex(s: Conditions) -> list[TargetRow]:
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
def forward_backward(s: Conditions) -> list[TargetRow]:
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
def dropped_keys(s: Conditions) -> list[TargetRow]:
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
def frame_causal(s: Conditions) -> list[TargetRow]:
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
def extra_memory(s: Conditions) -> list[TargetRow]:
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


def _memory_row(s: Conditions, what: str, shape: AttentionShape, sizes: tuple[int, ...], **case) -> TargetRow:
    peaks = _peaks(s, shape, sizes, "gate4d_forward", backend=s.backend, **case)
    worst = max(peaks.values()) / s.threads / MIB
    note = f"H = {shape.heads}, D = {shape.head_dim}; worst of N = {', '.join(map(str, sizes))}; {s.threads} threads"
    return TargetRow("C7", f"memory, {what}", worst, 16.0, "MiB", peak_memory=peaks, note=note)


def _peaks(
    s: Conditions,
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
                "gate4d.benchmarks.rows.attention_rows:attention_step", threads=s.threads, **arguments
            )
        except RuntimeError as e:
            if not optional:
                raise
            peaks[f"{label}N = {n}"] = f"failed, {one_line(e)}"
        else:
            peaks[f"{label}N = {n}"] = found["extra_bytes"]
    return peaks


def attention_step(
    implementation: str,
    shape: dict,
    frames: int,
    dtype: str = "float32",
    gate: str = "none",
    backward: bool = False,
    backend: str = "auto",
) -> Callable[[], object]:
    """The setup for a fresh process: ``implementation`` names a builder of :mod:`.peers`, ``shape`` is its fields."""
    x = make_inputs(AttentionShape(**shape), frames, dtype=getattr(torch, dtype), gate=gate, requires_grad=backward)
    build = getattr(peers, implementation)
    if implementation == "gate4d_forward":
        build = partial(build, backend=backend)
    if not backward:
        return torch.no_grad()(build(x))
    return peers.with_backward(build, x, torch.randn_like(x.q))


@target("C8", "gate on / off, and row statistics on / off")
@torch.no_grad()
def gate_and_statistics(s: Conditions) -> list[TargetRow]:
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
def call_overhead(s: Conditions) -> list[TargetRow]:
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
