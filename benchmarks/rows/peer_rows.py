"""``gate4d bench peers``: one operation at one model's shape, everything that can compute it here side by side."""

from __future__ import annotations

from functools import partial

import torch

from gate4d.terminal import table as lines_of
from gate4d.terminal import wrapped

from .. import peers
from ..check import expected_backward, expected_forward
from ..inputs import make_inputs
from ..registry import OPERATIONS, SHAPES, Operation, operation
from ..registry import shape as shape_of
from ..report.documents import duration
from .contest import Contest
from .target import Conditions, TargetRow


def measure(
    name: str, conditions: Conditions, *, shape: str | None = None, frames: int | None = None, dtype: str = "float32"
) -> tuple[TargetRow, dict[str, dict]]:
    """gate4d and every peer that can run, checked, then timed in turns.

    Returns:
        A row whose ``peers`` are gate4d's time over theirs, and per implementation the seconds of its preparation
        (dense bias, BlockMask), of its first call beyond a later one (compilation), and of a call.

    Raises:
        ValueError: unknown operation or shape, or an operation that is measured by its target.
        WrongResult: an implementation computes something else.
    """
    op = operation(name)
    if op.gate is None:
        raise ValueError(
            f"operation {name!r} is no attention call: measure it with `gate4d bench --only {op.targets[0]}`."
        )
    chosen, count = conditions.shape(shape_of(shape or op.shape).name), frames or op.frames
    if op.visible != "full" and chosen.growth != "tokens":
        raise ValueError(f"operation {name!r} needs a shape whose tokens grow with the frames, got {chosen.name!r}.")
    if op.gate == "pairwise" and chosen.sizes(count)[1] != chosen.sizes(count)[2]:
        raise ValueError(f"operation {name!r} needs as many queries as keys, got {chosen.name!r}: try 'keys'.")
    contest, gate = Contest(conditions, name), op.gate
    x = make_inputs(
        chosen, count, dtype=getattr(torch, dtype), gate=gate, visible=op.visible, window=op.window,
        requires_grad=op.backward,
    )  # fmt: skip
    ours = partial(peers.gate4d_forward, backend=conditions.backend)
    if op.backward:
        grad_out = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(2)).to(x.q.dtype)
        expected = expected_backward(x, grad_out)
    else:
        expected = expected_forward(x)

    def build(builder):
        return peers.with_backward(builder, x, grad_out) if op.backward else builder(x)

    with torch.set_grad_enabled(op.backward):
        contest.enter("gate4d", partial(build, ours), expected)
        for peer in runnable(op):
            contest.enter(peer.name, partial(build, peer.build), expected, optional=True)
        timed = contest.run()
    batch, heads, queries, dim = x.q.shape
    note = (
        f"{chosen.name}, {count} frames: B = {batch}, H = {heads}, N = {queries} x {x.k.shape[2]}, D = {dim}, {dtype}"
    )
    others = {n: timed.ratio("gate4d", n).median for n in contest.steps if n != "gate4d"} | contest.failed
    what = f"{op.what}, gate4d's time / a peer's"
    row = TargetRow(name, what, medians=timed.medians(), times=timed.times, waits=timed.waits, peers=others,
              note="; ".join([note, *timed.warnings()]))  # fmt: skip
    costs = {}
    for n, (prepare, first) in contest.prepared.items():
        call = timed.median(n)
        costs[n] = {"prepare": prepare, "compile": max(0.0, first - call), "call": call}
    return row, costs


def runnable(op: Operation) -> list[peers.Peer]:
    """The peers that can compute an operation here."""
    return [p for p in peers.PEERS.values() if not p.reasons(op.name)]


def table(row: TargetRow, costs: dict[str, dict]) -> list[str]:
    """Lines of at most 80 columns."""
    head = ("", "call", "gate4d / it", "prepare", "first call +")
    rows: list = [*wrapped(row.what), *wrapped(row.note), head]
    for name, cost in sorted(costs.items(), key=lambda item: item[1]["call"]):
        ratio = "" if name == "gate4d" else f"{row.peers[name]:.3f}"
        rows.append((name, duration(cost["call"]), ratio, duration(cost["prepare"]), duration(cost["compile"])))
    for name, said in row.peers.items():
        rows += wrapped(f"{name}: {said}") if isinstance(said, str) else []
    rows.append("prepare: once, before the calls (a dense bias, a BlockMask); first call +: what the")
    rows.append("first call took beyond a later one (compilation). Neither is in the times.")
    rows += ["", *(part for line in missing(row.id) for part in wrapped(line))]
    return lines_of("<18 >11 >14 >12 >15", rows)


def missing(name: str) -> list[str]:
    """Why the other peers cannot run this operation here."""
    found = [(p.name, p.reasons(name)) for p in peers.PEERS.values()]
    return [f"{peer} cannot run: {'; '.join(reasons)}" for peer, reasons in found if reasons]


def listing() -> list[str]:
    """Every operation, shape and peer, with what each peer lacks here."""
    rows: list = ["operations (default shape, frames; targets):"]
    for o in OPERATIONS.values():
        rows.append(("", o.name, o.what, f"{o.shape}, {o.frames}; {', '.join(o.targets)}"))
    rows += ["", "shapes (heads x dim, queries x keys):"]
    for s in SHAPES.values():
        rows.append(f"  {s.name:<24}{s.heads} x {s.head_dim}, {s.queries} x {s.keys}; {s.growth}")
    rows += ["", "peers:"]
    for p in peers.PEERS.values():
        here = [r for r in p.reasons(p.operations[0] if p.operations else "") if r]
        rows.append(f"  {p.name:<17}" + ("can run" if not here else "cannot run: " + "; ".join(here)))
        rows.append(f"  {'':<17}for {', '.join(p.operations) or 'no operation of this list'}")
    return lines_of("<2 <14 <30 <34", rows)
