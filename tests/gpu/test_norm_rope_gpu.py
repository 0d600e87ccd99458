"""Norm + RoPE-2D on a GPU: the Triton kernel, and the CUDA C++ kernel where it is built. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from helpers.accuracy import assert_accurate, assert_accurate_gradient
from helpers.norm_rope_cases import CASES, Case, Problem, draw, evaluate, lay_out
from torch import Tensor

from gate4d.kernels.norm_rope import op
from gate4d.nn import norm_rope

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def on_gpu(x: Problem, case: Case) -> Problem:
    def move(value):
        return value.cuda() if isinstance(value, Tensor) else value

    grad_out = lay_out(x.grad_out.cuda(), case.out_memory)[0]
    settings = {name: move(value) for name, value in x.settings.items()}
    views = *lay_out(x.x.cuda(), case.memory), *lay_out(x.out.cuda(), case.out_memory)
    return Problem(*views, grad_out, move(x.weight), move(x.bias), settings)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, affine: bool, backend: str) -> None:
    x = draw(case, affine)
    there = on_gpu(x, case)
    if backend == "cuda" and (reasons := op.cuda_reasons(there.x, True)):
        pytest.skip("; ".join(reasons))
    with torch.no_grad():
        options = {"weight": there.weight, "bias": there.bias, "backend": backend, **there.settings}
        norm_rope(there.x, out=there.out, **options)
    assert int(there.out_buffer.isnan().sum()) == there.out_buffer.numel() - there.out.numel()
    got = evaluate(lambda *args, **kwargs: norm_rope(*args, backend=backend, **kwargs), there, case.dtype)
    want, rounded = (evaluate(norm_rope, x, d) for d in (torch.float64, None))
    assert torch.equal(got[0], there.out)
    for name, g, exact, plain in zip(("out", "x", "weight", "bias"), got, want, rounded, strict=False):
        check = assert_accurate if name == "out" else assert_accurate_gradient
        check(name, g.cpu(), exact, plain)
