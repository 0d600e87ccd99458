"""The Triton kernels on a GPU, all cases of the attention tests; skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.attention_cases import Case, check
from torch import Tensor

import gate4d
from gate4d.functional import ROW_STATS, AttentionAux

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

GATES = ("none", "pairwise", "pairwise_half", "pairwise_2", "pairwise_1.7", "keys", "drop_keys", "general")
VISIBLE = ("full", "frame_causal", "window", "packed", "intervals", "empty")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def attend_on_gpu(q: Tensor, k: Tensor, v: Tensor, *, gate: Any, visible: Any) -> tuple[Tensor, AttentionAux]:
    if gate is not None:
        names = ("query_score", "key_score", "output_scale", "dropped_keys")
        gate = replace(gate, **{n: None if getattr(gate, n) is None else getattr(gate, n).cuda() for n in names})
    out, aux = gate4d.gated_attention(
        *(x.cuda() for x in (q, k, v)), gate=gate, visible=visible,
        row_stats=ROW_STATS, return_aux=True, backend="triton",
    )  # fmt: skip
    return out.cpu(), AttentionAux(*(x.cpu() for x in aux))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("gate", GATES)
def test_gates_and_visibilities(gate: str, visible: str, dtype: torch.dtype) -> None:
    check(Case(gate, visible, dtype, queries=333, keys=333, dim=64), attend_on_gpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 16, 32, 48, 72, 80, 96, 128, 256])
def test_head_dimensions(dim: int, dtype: torch.dtype) -> None:
    check(Case("pairwise", "window", dtype, batch=1, queries=200, keys=200, dim=dim), attend_on_gpu)


def test_offsets_beyond_32_bits() -> None:
    """The last rows of views whose strides put them past 2**31 elements."""
    tokens, dim, stride = 600, 16, 4_000_000
    buffer = torch.zeros(tokens * stride + dim, dtype=torch.float16, device="cuda")
    wide = buffer.as_strided((1, 1, tokens, dim), (0, 0, stride, 1))
    values = torch.randn(1, 1, tokens, dim, dtype=torch.float16, device="cuda")
    wide.copy_(values)
    far = gate4d.gated_attention(wide, wide, wide, backend="triton")
    near = gate4d.gated_attention(values, values, values, backend="triton")
    assert near.abs().sum() > 0
    assert torch.equal(far, near)
