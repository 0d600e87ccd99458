"""The 20 tests that are run first on a GPU: every kernel, forward and backward, once in what is used most."""

from __future__ import annotations

import pytest
import torch
from helpers.attention_cases import Case, check
from test_attention_gpu import attend_on_gpu

import gate4d
from gate4d.kernels.attention import trial
from gate4d.kernels.attention.op import Request
from gate4d.kernels.cross_moments import op as cross_op
from gate4d.kernels.norm_rope import op as norm_rope_op
from gate4d.kernels.received_attention import op as received_op
from gate4d.kernels.received_attention import trial as received_trial

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
BF16, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("gate", "visible", "dtype", "dim"),
    [
        ("none", "full", BF16, 64), ("pairwise", "full", BF16, 64), ("pairwise", "full", BF16, 128),
        ("pairwise", "frame_causal", BF16, 64), ("pairwise_2", "window", BF16, 64), ("keys", "packed", BF16, 64),
        ("drop_keys", "full", BF16, 64), ("pairwise_1.7", "intervals", HALF, 64), ("general", "full", SINGLE, 64),
        ("pairwise", "empty", SINGLE, 48),
    ],
)  # fmt: skip
def test_attention(gate: str, visible: str, dtype: torch.dtype, dim: int) -> None:
    check(Case(gate, visible, dtype, queries=333, keys=333, dim=dim), attend_on_gpu)


@pytest.mark.parametrize("dtype", [BF16, SINGLE], ids=str)
def test_received_attention(dtype: torch.dtype) -> None:
    for gate, masked in (("", False), ("pairwise", True)):
        received_trial.check(received_op.Request("cuda", dtype, 64, True, 0, gate=gate, masked=masked))


@pytest.mark.parametrize("dtype", [BF16, HALF, SINGLE], ids=str)
def test_cross_moments(dtype: torch.dtype) -> None:
    cross_op.check(cross_op.Request("cuda", dtype, 0))


@pytest.mark.parametrize("dtype", [BF16, HALF, SINGLE], ids=str)
def test_norm_rope(dtype: torch.dtype) -> None:
    norm_rope_op.check(norm_rope_op.Request("cuda", 0, dtype, 64, True, True, True, True, True))


def test_a_trial_passes_and_auto_takes_the_kernel() -> None:
    """Verify once, on the device: the verdict of the kind that is used most."""
    request = Request(
        "cuda", BF16, 64, 64, gate="pairwise", masked=True, aux=True, learned=True, device_index=0, row_stats=True,
        grad=True,
    )  # fmt: skip
    trial.check(request, lambda c: gate4d.kernels.attention.backends.BACKENDS["triton"].run(c))


def test_flex_passes_its_trial() -> None:
    request = Request("cuda", BF16, 64, 64, gate="pairwise", masked=True, aux=True, device_index=0)
    trial.check(request, lambda c: gate4d.kernels.attention.backends.BACKENDS["flex"].run(c))
