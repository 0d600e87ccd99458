"""Backends for CUDA tensors as far as a CPU can show: reasons, order, registration, and those made of torch calls."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gate4d
from gate4d import MotionGate, Visibility
from gate4d.kernels import support
from gate4d.kernels.attention import backends
from gate4d.kernels.attention.backends import auto_order, explain
from gate4d.kernels.attention.op import Request
from gate4d.kernels.cross_moments.op import kernel_reasons
from gate4d.kernels.norm_rope import op as norm_rope_op


def request_(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, dim: int = 64, **options) -> Request:
    return Request(device, dtype, dim, dim, **{"gate": "pairwise", **options})


def test_importing_gate4d_does_not_import_triton() -> None:
    code = "import sys, gate4d; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "name",
    [
        "attention_forward", "attention_backward", "received_attention", "cross_moments", "norm_rope_forward",
        "norm_rope_backward",
    ],
)  # fmt: skip
def test_operators_have_a_cuda_implementation(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gate4d::{name}", "CUDA")


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (request_("cpu"), "needs CUDA tensors, got cpu"),
        (request_(dtype=torch.float64), "supports float32, bfloat16 and float16, got float64"),
        (request_(dim=257), "head dimensions from 1 to 256, got 257"),
        (request_(dim=0), "head dimensions from 1 to 256, got 0"),
    ],
)
def test_triton_says_why_not(request_: Request, reason: str) -> None:
    assert any(reason in r for r in backends.BACKENDS["triton"].not_supported_reasons(request_))
    assert reason in explain(request_)


def test_a_missing_triton_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "has_triton", lambda: False)
    reasons = backends.BACKENDS["triton"].not_supported_reasons(request_())
    assert "triton is not installed; pip install gate4d[triton]" in reasons


@pytest.mark.parametrize("index", [0, 1])
def test_the_device_of_the_tensors_is_asked_and_not_the_current_one(index: int, monkeypatch) -> None:
    """Two cards, the current one new and the other too old; tensors without memory stand for theirs."""
    pytest.importorskip("triton")
    monkeypatch.setattr(support, "_capabilities", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capabilities = {None: (9, 0), 0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[device])
    why = "it needs compute capability 8.0 or newer, got 7.5"
    with FakeTensorMode():
        q = torch.empty(1, 2, 5, 64, device=f"cuda:{index}", dtype=torch.bfloat16)
        score = torch.empty(1, 5, device=q.device)
        assert (why in gate4d.explain(q, q, q, gate=MotionGate.keys(score))) == (index == 1)
        assert (why in norm_rope_op.triton_reasons(q, True)) == (index == 1)
        assert norm_rope_op.fits(q, True) == (index == 0)
    for index, reasons in enumerate(
        (kernel_reasons("cuda", torch.float32, 0), kernel_reasons("cuda", torch.float32, 1))
    ):
        assert (why in reasons) == (index == 1)


def test_an_explicit_backend_does_not_fall_back() -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(NotImplementedError, match=r"triton: .*needs CUDA tensors, got cpu"):
        gate4d.gated_attention(q, q, q, backend="triton")


def test_measured_rows_come_before_the_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert auto_order(request_())[:2] == ("sdpa", "triton")
    rows = [{"dtype": "bfloat16", "gate": "drop", "order": ["sdpa_compacted"]}]
    monkeypatch.setattr(backends, "MEASURED", rows)
    assert auto_order(request_())[0] == "sdpa"
    assert auto_order(request_(gate="drop")) == ("sdpa_compacted", "sdpa", "triton", "flex", "reference")


@pytest.mark.parametrize("renormalize", [True, False])
def test_folded_gate_on_keys(renormalize: bool) -> None:
    q, k, v = torch.randn(3, 2, 3, 40, 24, dtype=torch.float64).unbind(0)
    score = torch.rand(2, 40, dtype=torch.float64)
    score[:, ::4] = 1
    score[1] = 1  # every weight 0
    score.requires_grad_()
    gate = MotionGate(key_score=score, strength=2.0, renormalize=renormalize)
    out, want = (gate4d.gated_attention(q, k, v, gate=gate, backend=b) for b in ("sdpa_folded", "reference"))
    torch.testing.assert_close(out, want)
    got, expected = (torch.autograd.grad(x.square().sum(), score)[0] for x in (out, want))
    torch.testing.assert_close(got, expected)
    assert not out[1].any()


def test_compacted_dropped_keys() -> None:
    q, k, v = torch.randn(3, 3, 2, 40, 16, dtype=torch.float64).unbind(0)
    drop = torch.rand(3, 40) < torch.tensor([0.2, 0.7, 2.0])[:, None]
    k[drop[:, None].expand(3, 2, 40)] = torch.nan  # a dropped key is never read
    clean = torch.nan_to_num(k)
    out = gate4d.gated_attention(q, k, v, gate=MotionGate.drop_keys(drop), backend="sdpa_compacted")
    want = gate4d.gated_attention(q, clean, v, gate=MotionGate.drop_keys(drop), backend="reference")
    torch.testing.assert_close(out, want)
    assert not out[2].any()


def test_torch_backends_say_what_they_serve() -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(
        NotImplementedError, match="sdpa_folded: it serves gates of the kind 'keys' alone, got a call without a gate"
    ):
        gate4d.gated_attention(q, q, q, backend="sdpa_folded")
    visible = Visibility.intervals(torch.zeros(4, dtype=torch.int64), torch.full((4,), 2))
    gate = MotionGate.drop_keys(torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="sdpa_compacted: it would need a dense mask"):
        gate4d.gated_attention(q, q, q, gate=gate, visible=visible, backend="sdpa_compacted")
