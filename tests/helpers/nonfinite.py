"""NaN and infinity put where some queries look and others do not: who may notice, and who must."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helpers.attention_cases import Attend, Case, Inputs, Results, draw, evaluate

PLACES = ("q", "k", "v", "grad_out", "grad_lse")
VALUES = (float("nan"), float("inf"), -float("inf"), 3e38)


@dataclass(frozen=True)
class Poison:
    place: str  # where: rows of one of PLACES
    value: float
    rows: slice

    def __str__(self) -> str:
        return f"{self.place}={self.value:g}@{self.rows.start}:{self.rows.stop}"

    def put(self, x: Inputs) -> Inputs:
        """In the first batch item and head, in one feature."""
        poisoned = getattr(x, self.place).clone()
        largest = torch.finfo(poisoned.dtype).max
        value = min(self.value, largest) if self.value == 3e38 else self.value
        rows = poisoned[0, 0, self.rows]
        if self.place == "grad_lse":
            rows.fill_(value)
        else:
            rows[:, poisoned.shape[-1] // 2] = value
        return replace(x, **{self.place: poisoned})


def seen_by(case: Case, x: Inputs, gate_drops: bool) -> Tensor:
    """Bool ``[Nq, Nk]`` of the first batch item."""
    queries, keys = x.q.shape[2], x.k.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool) if x.visible is None else x.visible.dense(queries, keys)[0]
    return seen & ~x.masks[1][0] if gate_drops else seen


def check(case: Case, attend: Attend, poison: Poison) -> None:
    """Whoever does not see the poison has what they have without it; whoever sees a NaN has NaN."""
    torch.manual_seed(0)
    x = draw(case)
    clean, dirty = evaluate(attend, x, case.gate), evaluate(attend, poison.put(x), case.gate)
    seen = seen_by(case, x, case.gate in ("drop_keys", "dropped_and_gated", "general"))
    if poison.place in ("k", "v"):
        rows = seen[:, poison.rows].any(1)
    else:
        rows = torch.zeros(len(seen), dtype=torch.bool)
        rows[poison.rows] = True
    keys = seen[rows].any(0)
    _unseen_is_the_same(clean, dirty, rows, keys)
    if poison.value != poison.value:
        _seen_is_nan(dirty, rows & seen.any(1), keys, poison.place)


def _unseen_is_the_same(clean: Results, dirty: Results, rows: Tensor, keys: Tensor) -> None:
    queries_of = {"out", "lse", "entropy", "max_prob", "sum_sq", "q", "query_motion"}
    for was, now in zip(clean, dirty, strict=True):
        for name, before in was.items():
            after = now[name]
            if before is None:
                continue
            touched = torch.zeros(before.shape[:3] if before.dim() > 2 else before.shape, dtype=torch.bool)
            who = rows if name in queries_of else keys
            # Scores are shared by the heads of a batch item; everything else belongs to one head.
            touched[(0, 0) if before.dim() > 2 else 0] = who
            assert after[~touched].isfinite().eq(before[~touched].isfinite()).all(), (
                f"{name}: reached who does not see it"
            )
            size = before[before.isfinite()].abs().max() if before.isfinite().any() else 1.0
            step = 32 * torch.finfo(before.dtype).eps
            torch.testing.assert_close(
                after[~touched], before[~touched], rtol=step, atol=float(step * size), msg=lambda m, n=name: f"{n}: {m}"
            )


def _seen_is_nan(dirty: Results, rows: Tensor, keys: Tensor, place: str) -> None:
    values, grads = dirty
    if place in ("q", "k", "v"):
        assert values["out"][0, 0, rows].isnan().any(-1).all(), "a row that sees NaN is not NaN"
    if place in ("q", "k"):
        for name in ("lse", "entropy", "max_prob", "sum_sq"):
            assert values[name][0, 0, rows].isnan().all(), f"{name} of a row that sees NaN is not NaN"
    assert grads["q"][0, 0, rows].isnan().any(-1).all(), "the gradient of a query that sees NaN is not NaN"
    assert grads["k"][0, 0, keys].isnan().any(-1).all(), "the gradient of a key that NaN rows see is not NaN"
    if place != "v" and place != "grad_lse":
        assert grads["v"][0, 0, keys].isnan().any(-1).all(), "the gradient of a value that NaN rows see is not NaN"
