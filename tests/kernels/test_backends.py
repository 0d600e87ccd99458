"""Backends say why they cannot run, are chosen in order, and never replace one that was asked for."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import gate4d
from gate4d import MotionGate, Visibility, gated_attention
from gate4d.kernels import support
from gate4d.kernels.attention import backends
from gate4d.kernels.attention.backends import BACKENDS, explain, select
from gate4d.kernels.attention.op import Request

PLAIN = Request("cpu", torch.float32, 64, 64)
GATED = PLAIN._replace(gate="pairwise", masked=True, aux=True)


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch):
    """Choices are remembered per request; tests change what backends can do."""
    monkeypatch.setattr(backends, "_selected", {})


def qkv(dtype=torch.float32, dim=16):
    return (torch.randn(1, 2, 5, dim, dtype=dtype) for _ in range(3))


def test_auto_takes_the_first_that_can(monkeypatch):
    for order in (("cpu", "sdpa", "reference"), ("sdpa", "cpu", "reference")):
        monkeypatch.setitem(backends.AUTO_ORDER, "cpu", order)
        backends._selected.clear()
        able = [n for n in order if not BACKENDS[n].not_supported_reasons(PLAIN)]
        assert select("auto", PLAIN).name == able[0]
        able = [n for n in order if not BACKENDS[n].not_supported_reasons(GATED)]
        assert select("auto", GATED).name == able[0] != "sdpa"


def test_auto_without_the_library(monkeypatch):
    monkeypatch.setattr(support, "kernel_error", lambda operator: "it was not built")
    assert select("auto", PLAIN).name == "sdpa"
    assert select("auto", GATED).name == "reference"
    with pytest.raises(NotImplementedError, match="cpu: it was not built"):
        select("cpu", PLAIN)


@pytest.mark.parametrize("device", ["cuda", "mps", "meta"])
def test_other_devices_have_an_order(device):
    assert select("auto", PLAIN._replace(device_type=device)).name == "sdpa"
    kernels = device == "cuda" and importlib.util.find_spec("triton") is not None
    assert select("auto", GATED._replace(device_type=device)).name == ("triton" if kernels else "reference")


@pytest.mark.parametrize("gate", ["pairwise", "drop"])
def test_what_no_tile_shape_was_measured_for_goes_to_torchs_kernels(gate, monkeypatch):
    """AMD's and Intel's GPUs, and NVIDIA's before compute capability 8."""
    plain = PLAIN._replace(dtype=torch.bfloat16, gate=gate)
    want = "sdpa_compacted" if gate == "drop" else "flex"
    monkeypatch.setattr(support, "has_triton", lambda: True)
    monkeypatch.setattr("gate4d.kernels.attention.flex.has_triton", lambda: True)
    assert select("auto", plain._replace(device_type="xpu")).name == want
    assert select("auto", plain._replace(device_type="mps")).name == ("reference" if gate == "pairwise" else want)
    monkeypatch.setattr(support, "_capabilities", {0: (7, 5), 1: (8, 0)})
    assert select("auto", plain._replace(device_type="cuda", device_index=0)).name == want
    assert select("auto", plain._replace(device_type="cuda", device_index=1)).name == "triton"
    backends._selected.clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert select("auto", plain._replace(device_type="cuda", device_index=1)).name == want


def test_the_reference_is_not_chosen_silently_where_it_needs_gigabytes(monkeypatch):
    limit = backends.REFERENCE_LIMIT
    monkeypatch.setattr(support, "kernel_error", lambda operator: "it was not built")
    q, k, v = qkv()
    gate = MotionGate.keys(torch.rand(1, 5))
    small = gated_attention(q, k, v, gate=gate)
    monkeypatch.setattr(backends, "REFERENCE_LIMIT", 8 * 2 * 25 * 4 / 2**30)
    assert torch.equal(gated_attention(q, k, v, gate=gate), small)
    monkeypatch.setattr(backends, "REFERENCE_LIMIT", 7 * 2 * 25 * 4 / 2**30)
    with pytest.raises(NotImplementedError, match=r"GiB of attention maps: q is \[1, 2, 5, 16\].*backend='reference'"):
        gated_attention(q, k, v, gate=gate)
    assert torch.equal(gated_attention(q, k, v, gate=gate, backend="reference"), small)
    monkeypatch.setattr(backends, "REFERENCE_LIMIT", limit)
    tokens = torch.empty(1, 16, 30_000, 64, device="meta")
    gate = MotionGate.keys(torch.empty(1, 30_000, device="meta"))
    assert gated_attention(tokens, tokens, tokens, gate=gate).shape == tokens.shape
    big = torch.zeros(1, 1, 1, 1).expand(1, 16, 30_000, 64)
    with pytest.raises(NotImplementedError, match=r"about 429\.2 GiB .*Above 4 GiB .*gate4d\.explain.*gate4d info"):
        gated_attention(big, big, big, gate=MotionGate.keys(torch.zeros(1, 30_000)))


@pytest.mark.parametrize("name", ["CPU", "flash", "", None])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=r"^backend must be 'auto' or one of .*'cpu', .*'reference'.*, got"):
        gated_attention(*qkv(), backend=name)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gate": MotionGate.keys(torch.rand(1, 5))}, "it cannot apply a gate"),
        ({"gate": MotionGate.drop_keys(torch.rand(1, 5) > 0.5)}, "it cannot apply a gate"),
        ({"visible": Visibility.packed([0, 2, 5])}, "it would need a dense mask"),
        ({"return_aux": True}, "it returns neither lse nor row statistics"),
    ],
)
def test_a_named_backend_never_falls_back(options, reason):
    with pytest.raises(NotImplementedError, match=f"^backend='sdpa' cannot serve this call:\n(.*\n)*.*sdpa: {reason}"):
        gated_attention(*qkv(), backend="sdpa", **options)


def test_sdpa_serves_what_it_can():
    q, k, v = qkv()
    exact = gated_attention(q, k, v, backend="reference")
    torch.testing.assert_close(gated_attention(q, k, v, backend="sdpa"), exact)
    torch.testing.assert_close(gated_attention(q, k, v, backend="sdpa", visible=Visibility.full()), exact)
    gate = MotionGate.queries(torch.rand(1, 5))  # an output scale is no gate on probabilities
    exact = gated_attention(q, k, v, backend="reference", gate=gate)
    torch.testing.assert_close(gated_attention(q, k, v, backend="sdpa", gate=gate), exact)


def test_the_error_lists_every_backend_with_every_reason(monkeypatch):
    monkeypatch.setattr(support, "kernel_error", lambda operator: "it was not built")
    request = Request("cuda", torch.float64, 300, 64, gate="pairwise", masked=True, aux=True)
    with pytest.raises(NotImplementedError) as error:
        select("cpu", request)
    first, *lines = str(error.value).splitlines()
    assert first == "backend='cpu' cannot serve this call:"
    assert [line.split(":")[0].strip() for line in lines] == list(BACKENDS)
    expected = {
        "cpu": ("it was not built", "needs CPU tensors, got cuda", "got float64", "dimensions up to 256, got 300"),
        "triton": ("got float64", "dimensions from 1 to 256, got 300"),
        "sdpa": ("cannot apply a gate", "dense mask", "neither lse nor row statistics"),
        "sdpa_folded": ("of the kind 'keys' alone", "dense mask", "neither lse nor row statistics"),
        "sdpa_compacted": ("of the kind 'drop' alone", "dense mask", "neither lse nor row statistics"),
        "flex": ("got float64",),
        "reference": ("can run",),
    }
    for line, (name, reasons) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"  {name}: ")
        for reason in reasons:
            assert reason in line
    assert explain(request) == "\n".join(lines)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 16), (torch.float32, 257), (torch.float32, 300)])
def test_what_the_kernel_lacks_goes_to_the_reference(dtype, dim):
    gate = MotionGate.keys(torch.rand(1, 5))
    q, k, v = qkv(dtype, dim)
    assert select("auto", GATED._replace(dtype=dtype, head_dim=dim)).name == "reference"
    out = gated_attention(q, k, v, gate=gate)
    assert out.dtype == dtype
    assert torch.equal(out, gated_attention(q, k, v, gate=gate, backend="reference"))
    with pytest.raises(NotImplementedError, match=r"^backend='cpu' cannot serve"):
        gated_attention(q, k, v, gate=gate, backend="cpu")


def test_choices_are_remembered_per_request():
    assert select("auto", GATED) is select("auto", GATED)
    assert select("auto", GATED._replace(dtype=torch.float64)).name == "reference"


# --- what gated_attention refuses before any backend ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, [[1.0]], 3.0])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_not_tensors(bad, position):
    arguments = [*qkv()]
    arguments[position] = bad
    with pytest.raises(TypeError, match=f"^{'qkv'[position]} must be a torch.Tensor, got {type(bad).__name__}"):
        gated_attention(*arguments)


@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16), (1, 1, 2, 5, 16)])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_wrong_rank(shape, position):
    arguments = [*qkv()]
    arguments[position] = torch.randn(shape)
    with pytest.raises(ValueError, match=rf"^{'qkv'[position]} must have shape \[B, H, N, D\], got \["):
        gated_attention(*arguments)


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (((2, 2, 5, 8), (1, 2, 5, 8), (2, 2, 5, 8)), "same batch and head counts"),
        (((2, 2, 5, 8), (2, 4, 5, 8), (2, 4, 5, 8)), "same batch and head counts"),
        (((2, 2, 5, 8), (2, 2, 5, 8), (2, 1, 5, 8)), "same batch and head counts"),
        (((2, 2, 5, 8), (2, 2, 5, 9), (2, 2, 5, 8)), "^k must have q's head dimension 8, got 9"),
        (((2, 2, 5, 8), (2, 2, 5, 8), (2, 2, 6, 8)), r"^v must have one value per key \(5\), got 6"),
    ],
)
def test_shapes_that_do_not_fit(shapes, match):
    with pytest.raises(ValueError, match=match):
        gated_attention(*(torch.randn(s) for s in shapes))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32, torch.bfloat16), (torch.int64,) * 3])
def test_wrong_dtypes(dtypes):
    with pytest.raises(TypeError, match=r"^q, k and v must share one floating dtype, got"):
        gated_attention(*(torch.ones(1, 1, 2, 4, dtype=d) for d in dtypes))


def test_mixed_devices():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"^q, k and v must be on one device, got cpu, meta and cpu"):
        gated_attention(q, k.to("meta"), v)


@pytest.mark.parametrize("bad", ["entropy", ("entropy", "median"), ("lse",)])
def test_unknown_statistics(bad):
    with pytest.raises(ValueError, match=r"^row_stats must be a sequence of names out of \['entropy'"):
        gated_attention(*qkv(), row_stats=bad, return_aux=True)


def test_statistics_need_aux():
    with pytest.raises(ValueError, match=r"^row_stats needs return_aux=True"):
        gated_attention(*qkv(), row_stats=("entropy",))


def test_explain_names_the_choice_and_every_reason():
    q, k, v = qkv()
    text = gate4d.explain(q, k, v, gate=MotionGate.keys(torch.rand(1, 5)), visible=Visibility.packed([0, 2, 5]))
    first, *lines = text.splitlines()
    assert first == f"auto takes {select('auto', GATED).name}:"
    assert [line.split(":")[0].strip() for line in lines] == list(BACKENDS)
    assert "it cannot apply a gate; it would need a dense mask for this visibility" in text
    with pytest.raises(ValueError, match=r"gate\.key_score must have shape"):
        gate4d.explain(q, k, v, gate=MotionGate.keys(torch.rand(1, 4)))
