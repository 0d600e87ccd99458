"""Direct calls of the operators, as exported and compiled graphs make them, without Python's checks before them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import require_backend

from gate4d import MotionGate, TokenLayout, Visibility, gated_attention, received_attention
from gate4d.visibility import MAX_KEYS

require_backend("cpu", module=True)

from helpers.malformed_calls import good  # noqa: E402  (calls the operators)


def test_none_crashes_and_none_is_accepted():
    result = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "helpers" / "malformed_calls.py"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert result.returncode == 0, f"died in: {lines[-1]}\n{result.stderr[-2000:]}"
    wrong = [line for line in lines if not line.endswith(": refused")]
    assert not wrong, f"{len(wrong)} of {len(lines)} calls: {wrong[:20]}"
    assert len(lines) > 600


def test_the_message_names_what_it_got_and_wants():
    arguments = good()["attention_forward"] | {"v": torch.zeros(2, 3, 100, 24)}
    with pytest.raises(
        RuntimeError, match=r"v must be float32 \[2, 3, 130, any\] on the CPU, got float32 \[2, 3, 100, 24\]"
    ):
        torch.ops.gate4d.attention_forward(*arguments.values())


def test_a_compiled_graph_checks_the_values_it_gets():
    q, k, v = (torch.randn(1, 1, 8, 4) for _ in range(3))

    @torch.compile(fullgraph=True)
    def attend(q, k, v, motion):
        return gated_attention(q, k, v, gate=MotionGate.keys(motion), backend="cpu")

    attend(q, k, v, torch.rand(1, 8))
    with pytest.raises(RuntimeError, match=r"key_score must hold values in \[0, 1\]"):
        attend(q, k, v, torch.full((1, 8), 1.5))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39])
def test_scale(scale, backend):
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="scale must be finite"):
        gated_attention(q, q, q, scale=scale, backend=backend)
    with pytest.raises(ValueError, match="scale must be finite"):
        received_attention(q, q, torch.zeros(1, 1, 4), scale=scale, backend=backend)


@pytest.mark.parametrize("field", ["query_score", "key_score"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_scores_through_the_fields_of_a_gate(field, value):
    score = torch.tensor([[0.5, value]])
    with pytest.raises(ValueError, match=rf"{field} must hold values in \[0, 1\]"):
        MotionGate(**{field: score})
    gate = MotionGate(query_score=torch.rand(1, 2), key_score=torch.rand(1, 2))
    getattr(gate, field)[0, 1] = value  # behind the gate's back, as an optimizer's step could
    with pytest.raises(ValueError, match=field):
        gate.validate()
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match=field):
        gated_attention(q, q, q, gate=gate, backend="cpu")


# --- Visibility -------------------------------------------------------------------------------------------------------


def bounds(end: int = 40, dtype: torch.dtype = torch.int32, queries: int = 6) -> torch.Tensor:
    rows = torch.zeros(1, 3, queries, dtype=dtype)
    rows[:, 1] = end
    return rows


@pytest.mark.parametrize("end", [60, 10**7, 2**31 - 1])
def test_bounds_past_the_keys(end, backend):
    q, k = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 40, 8)
    with pytest.raises(ValueError, match=rf"intervals up to key {end}, but k has Nk=40"):
        gated_attention(q, k, k, visible=Visibility(bounds(end)), backend=backend)
    assert Visibility(bounds(end)).key_extent == end


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((bounds(dtype=torch.int64),), TypeError, "bounds must be an int32 tensor or None, got torch.int64"),
        ((bounds().tolist(),), TypeError, "int32 tensor or None, got list"),
        ((bounds()[0],), ValueError, r"shape \[1 or B, 3, Nq\], got \[3, 6\]"),
        ((bounds()[:, :2],), ValueError, r"got \[1, 2, 6\]"),
        ((bounds(-1),), ValueError, "must not be negative, got -1"),
        ((bounds(60), 40), ValueError, "must not pass key_extent=40, got an end of 60"),
        ((bounds(40), 0, 30), ValueError, r"num_keys must be in \[40, "),
        ((None, 0, 2**31), ValueError, "num_keys must be in"),
    ],
)
def test_bounds_that_do_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        Visibility(*arguments)


def test_more_keys_than_the_kernels_can_count():
    for make in (
        lambda: Visibility.frame_causal(TokenLayout(2, 2**30)),
        lambda: Visibility.per_frame(TokenLayout(2, 2**30)),
        lambda: Visibility.packed([0, 1], [0, 2**31]),
    ):
        with pytest.raises(ValueError, match=f"at most {MAX_KEYS} keys"):
            make()
    many = torch.zeros(1, 1, 1, 4).expand(1, 1, 2**31, 4)
    with pytest.raises(RuntimeError, match=r"B, H, Nq and Nk must be at most"):
        gated_attention(torch.zeros(1, 1, 1, 4), many, many, backend="cpu")
