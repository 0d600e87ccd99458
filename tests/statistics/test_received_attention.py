"""Received attention of every backend against a float64 map."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gate4d import MotionGate, TokenLayout, Visibility, gated_attention, received_attention
from gate4d.kernels import support
from gate4d.kernels._reference import gate_weight
from gate4d.kernels.received_attention import op
from gate4d.kernels.received_attention.op import Request
from gate4d.statistics import received as module

HAS_CPU = not module.BACKENDS["cpu"].not_supported_reasons(Request("cpu", torch.float32, 8, True))
BACKENDS = ["chunked", "reference", *(["cpu"] if HAS_CPU else [])]


def features(batch, heads, nq, nk, dim, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, n, dim, generator=generator).to(dtype) for n in (nq, nk))


def probabilities(q, k, gate=None, visible=None, scale=None):
    """The float64 map and its lse, written out from the definition."""
    g = gate or MotionGate()
    s = q.double() @ k.double().mT * (q.shape[3] ** -0.5 if scale is None else scale)
    seen = torch.ones_like(s, dtype=torch.bool)
    if visible is not None:
        seen &= visible.dense(q.shape[2], k.shape[2])[:, None]
    if g.dropped_keys is not None:
        seen &= ~g.dropped_keys[:, None, None]
    w = torch.ones_like(s)
    if g.key_score is not None:
        query = None if g.query_score is None else g.query_score.double()
        w = w * gate_weight(query, g.key_score.double(), g.strength)[:, None]
    e = torch.where(seen, s, -torch.inf)
    norm = torch.where(w > 0, e + w.log(), -torch.inf) if g.renormalize else e
    lse = norm.logsumexp(-1)
    if not g.renormalize:
        lse = lse.masked_fill(~(seen & (w > 0)).any(-1), -torch.inf)
    p = torch.where(lse[..., None] == -torch.inf, 0.0, w * (e - lse[..., None]).exp())
    return p.nan_to_num(), lse


def check(moments, p, dims, relative=1e-5):
    mean, variance = p.mean(dims), p.var(dims)
    assert (moments.count == p.shape[1] ** len(dims[:-1]) * p.shape[2]).all()
    rounding = 1e-6 * mean  # of p in fp32, by way of its exponent; what is left where p does not vary
    for got, want, slack in ((moments.mean, mean, 0.0), (moments.variance(), variance, rounding.square())):
        assert torch.isfinite(got).all()
        assert got.shape == want.shape
        assert ((got - want).abs() <= relative * want + slack).all(), ((got - want).abs() / want).max()


SHAPES = {
    "VGGT": (1, 2, 1041, 1041, 64),
    "DUSt3R": (1, 2, 576, 576, 64),
    "CUT3R": (2, 2, 768, 577, 48),
    "awkward": (2, 3, 63, 111, 20),
    "one": (1, 1, 2, 1, 8),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_plain(name, backend, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 300_000)  # several chunks
    q, k = features(*SHAPES[name])
    p, lse = probabilities(q, k)
    check(received_attention(q, k, lse.float(), backend=backend), p, (1, 2))
    check(received_attention(q, k, lse.float(), over=("queries",), backend=backend), p, (2,))


def gates(batch, nq, nk):
    generator = torch.Generator().manual_seed(5)
    a, b = torch.rand(batch, nq, generator=generator), torch.rand(batch, nk, generator=generator)
    a[:, 0], b[:, :3] = 0.0, 1.0
    return {
        "pairwise": MotionGate.pairwise(a, b),
        "square": MotionGate.pairwise(a, b, strength=2),
        "power": MotionGate.pairwise(a, b, strength=0.7),
        "none": MotionGate.pairwise(a, b, strength=0),
        "keys": MotionGate.keys(b, strength=0.5),
        "queries": MotionGate.queries(a),
        "drop": MotionGate.drop_keys(b > 0.7),
        "easi3r": MotionGate.static_to_dynamic(a > 0.5, b > 0.5),
    }


LAYOUT = TokenLayout(4, [30, 41, 25, 30], 5)
VISIBLE = {
    "all": None,
    "causal": Visibility.frame_causal(LAYOUT),
    "window": Visibility.frame_causal(LAYOUT, window=1, sinks=1),
    "items": Visibility.intervals(torch.tensor([[50], [126]]).expand(2, 126), torch.full((2, 126), 100), 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("gate", gates(1, 1, 1))
def test_gated_and_masked(gate, visible, backend):
    q, k = features(2, 2, 126, 126, 32)
    args = {"gate": gates(2, 126, 126)[gate], "visible": VISIBLE[visible], "scale": -0.2}
    p, lse = probabilities(q, k, **args)
    check(received_attention(q, k, lse.float(), **args, backend=backend), p, (1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_weight_count_as_zero(backend):
    q, k = features(1, 2, 70, 50, 16)
    blind = Visibility.intervals(torch.zeros(70, dtype=torch.long), (torch.arange(70) % 2) * 50)
    p, lse = probabilities(q, k, visible=blind)
    assert (lse[:, :, ::2] == -torch.inf).all()
    check(received_attention(q, k, lse.float(), visible=blind, backend=backend), p, (1, 2))
    weightless = MotionGate.keys(torch.ones(1, 50))
    dead = received_attention(q, k, torch.full((1, 2, 70), -torch.inf), gate=weightless, backend=backend)
    assert (dead.mean == 0).all()
    assert (dead.m2 == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearly_uniform_attention_keeps_its_small_variance(backend):
    # Sums of squares would cancel: the deviations are a thousandth of the mean.
    q, k = features(1, 1, 2000, 64, 32)
    q = q * 1e-3
    p, lse = probabilities(q, k)
    check(received_attention(q, k, lse.float(), backend=backend), p, (1, 2), relative=1e-3)
    assert (p.std(2) / p.mean(2)).max() < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_of_weightless_keys_do_not_overflow(backend):
    q, k = features(1, 1, 40, 40, 16)
    k[:, :, 3] = 100 * q[:, :, 0]
    gate = MotionGate.keys((torch.arange(40) == 3).float()[None])
    p, lse = probabilities(q, k, gate=gate)
    m = received_attention(q, k, lse.float(), gate=gate, backend=backend)
    assert torch.isfinite(m.mean).all()
    assert m.mean[0, 3] == 0
    check(m, p, (1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_views(dtype, backend):
    generator = torch.Generator().manual_seed(1)
    q, k, _ = torch.randn(2, 90, 3, 2, 36, generator=generator).to(dtype).permute(2, 0, 3, 1, 4)
    p, lse = probabilities(q, k)
    # The products of 16-bit numbers are exact in fp32, so the features' precision costs nothing here.
    check(received_attention(q, k, lse.float(), backend=backend), p, (1, 2))


@pytest.mark.parametrize("renormalize", [True, False])
def test_it_describes_the_attention_that_gave_lse(renormalize):
    q, k = features(1, 2, 100, 126, 16)
    v = torch.eye(126).expand(1, 2, 126, 126)  # out is then the map
    generator = torch.Generator().manual_seed(2)
    gate = MotionGate.static_to_dynamic(
        torch.rand(1, 100, generator=generator) > 0.5, torch.rand(1, 126, generator=generator) > 0.5,
        renormalize=renormalize,
    )  # fmt: skip
    out, aux = gated_attention(q, k, v, gate=gate, return_aux=True)
    m = received_attention(q, k, aux.lse, gate=gate)
    torch.testing.assert_close(m.mean, out.mean((1, 2)))
    torch.testing.assert_close(m.variance(), out.var((1, 2)))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), cut=st.integers(1, 59))
def test_algebra(seed, cut):
    """Queries split and merge, batches split, heads pool, keys permute; a common key component changes nothing."""
    q, k = features(2, 2, 60, 40, 16, seed)
    _, lse = probabilities(q, k)
    lse = lse.float()
    whole = received_attention(q, k, lse)
    parts = [received_attention(q[:, :, s], k, lse[:, :, s]) for s in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(parts[0].merge(parts[1]).m2, whole.m2)
    torch.testing.assert_close(received_attention(q[1:], k[1:], lse[1:]).m2[0], whole.m2[1])
    torch.testing.assert_close(received_attention(q, k, lse, over=("queries",)).pool(1).m2, whole.m2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(received_attention(q, k[:, :, order], lse).mean, whole.mean[:, order])
    common = k + torch.randn(16, generator=torch.Generator().manual_seed(seed))
    _, shifted_lse = probabilities(q, common)
    torch.testing.assert_close(received_attention(q, common, shifted_lse.float()).mean, whole.mean, rtol=1e-5, atol=0)


def test_empty():
    q, k = features(1, 2, 0, 5, 8)
    m = received_attention(q, k, torch.empty(1, 2, 0))
    assert (m.count == 0).all()
    assert (m.mean == 0).all()
    q, k = features(1, 2, 5, 0, 8)
    assert received_attention(q, k, torch.full((1, 2, 5), -torch.inf)).mean.shape == (1, 0)


@pytest.mark.skipif(not HAS_CPU, reason="needs the compiled library")
def test_operator_registration():
    q, k = features(1, 2, 20, 30, 8)
    _, lse = probabilities(q, k)
    args = (q, k, lse.float(), torch.rand(1, 20), torch.rand(1, 30), None, 0.3, 1.0)
    torch.library.opcheck(torch.ops.gate4d.received_attention.default, args)


def test_bad_arguments_are_named(monkeypatch):
    q, k = features(1, 2, 6, 7, 4)
    lse = torch.zeros(1, 2, 6)
    with pytest.raises(ValueError, match="lse must have shape"):
        received_attention(q, k, lse[..., :5])
    with pytest.raises(ValueError, match="must contain 'queries'"):
        received_attention(q, k, lse, over=("heads",))
    with pytest.raises(ValueError, match="over must be"):
        received_attention(q, k, lse, over=("keys",))
    with pytest.raises(ValueError, match="backend must be"):
        received_attention(q, k, lse, backend="gpu")
    with pytest.raises(ValueError, match=r"gate\.key_score"):
        received_attention(q, k, lse, gate=MotionGate.keys(torch.zeros(1, 6)))
    with pytest.raises(ValueError, match="visible must describe"):
        received_attention(q, k, lse, visible=Visibility.packed([0, 5]))
    with pytest.raises(NotImplementedError, match="float64"):
        received_attention(q.double(), k.double(), lse, backend="cpu")
    monkeypatch.setattr(support, "kernel_error", lambda operator: "it was not built")
    with pytest.raises(NotImplementedError, match="it was not built"):
        received_attention(q, k, lse, backend="cpu")
    assert not received_attention(q.requires_grad_(), k, lse).mean.requires_grad


def test_auto_takes_the_cuda_operator_where_it_serves(monkeypatch):
    q, k = features(1, 2, 6, 7, 4)
    with pytest.raises(NotImplementedError, match="needs CUDA tensors, got cpu"):
        received_attention(q, k, torch.zeros(1, 2, 6), backend="triton")

    def auto(device: str) -> str:
        request = Request(device, torch.float32, 4, True)
        return support.choose(module.BACKENDS, module.AUTO_ORDER, "auto", request).name

    assert auto("meta") == "chunked"  # neither CPU nor CUDA
    monkeypatch.setattr(
        op, "triton_reasons", lambda device, _, dim, index: [] if (device, dim) == ("meta", 4) else [device]
    )
    assert auto("meta") == "triton"
    assert auto("cpu") == ("cpu" if HAS_CPU else "chunked")
