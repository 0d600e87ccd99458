"""Weights below every number, logits near the largest: finite, and right, as gated_attention's docstring promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gate4d import MotionGate, Visibility, gated_attention, received_attention
from gate4d.functional import ROW_STATS

pytestmark = pytest.mark.kernel
ALMOST = 1 - 2.0**-24  # the largest score below 1


def oracle(q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor, strength: float, scale: float):
    """In float64 by the softmax of ``s + strength log(1 - a b)``; independent of the reference."""
    product = b[:, None, :] if a is None else a[:, :, None] * b[:, None, :]
    zero = product == 1
    log = torch.where(zero, -math.inf, torch.log1p(-torch.where(zero, 0.0, product)) * strength)
    logits = scale * q @ k.mT + log[:, None]
    p = torch.softmax(logits, -1)
    lse = torch.logsumexp(logits, -1)
    stats = -torch.special.xlogy(p, p).sum(-1), p.amax(-1), p.square().sum(-1)
    return p @ v, lse, *(s.detach() for s in (*stats, p))


def scores(*shape: int) -> Tensor:
    """Motion scores near both ends."""
    levels = torch.tensor([0.0, 0.5, 1 - 2.0**-12, 1 - 2.0**-20, ALMOST])
    return levels[torch.randint(0, len(levels), shape)]


def test_a_row_whose_largest_logit_has_no_weight_left(backend):
    """Its key counts for nothing beside the other; both weights may be too small for any number."""
    q, v = torch.ones(1, 1, 1, 1), torch.tensor([5.0, 1.731]).view(1, 1, 2, 1)
    k = torch.tensor([120.0, 0.0]).view(1, 1, 2, 1)
    for other in (0.0, 0.5, 1 - 2.0**-20):
        gate = MotionGate.keys(torch.tensor([[ALMOST, other]]), strength=50.0)
        out, aux = gated_attention(q, k, v, gate=gate, scale=1.0, return_aux=True, backend=backend)
        assert out.item() == pytest.approx(1.731, rel=1e-6)
        assert aux.lse.item() == pytest.approx(50 * math.log1p(-other), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("strength", [2.0, 3.0, 4.0, 8.0, 50.0])
def test_squares_of_equal_probabilities(strength, pairs, backend):
    q = torch.zeros(1, 1, 1, 4)
    k, key = torch.zeros(1, 1, 3, 4), torch.full((1, 3), ALMOST)
    gate = MotionGate(torch.ones(1, 1), key, strength=strength) if pairs else MotionGate.keys(key, strength=strength)
    _, aux = gated_attention(q, k, k, gate=gate, return_aux=True, row_stats=ROW_STATS, backend=backend)
    assert aux.sum_sq.item() == pytest.approx(1 / 3, rel=1e-5)
    assert aux.max_prob.item() == pytest.approx(1 / 3, rel=1e-5)
    assert aux.entropy.item() == pytest.approx(math.log(3), rel=1e-5)
    assert aux.lse.item() == pytest.approx(math.log(3) - 24 * strength * math.log(2), rel=1e-6)


@pytest.mark.parametrize("logits", [1.0, 30.0])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0, 2.5, 3.0, 4.0, 5.0, 8.0, 8.5, 50.0, 100.0])
def test_strong_gates_on_scores_near_one(strength, pairs, logits, backend):
    """Values, statistics, all gradients and attention received, against float64."""
    q, k, v = (torch.randn(2, 2, n, 16) for n in (37, 150, 150))
    a, b = (scores(2, 37), scores(2, 150))
    a[0] = ALMOST
    grad_out, grad_lse = torch.randn_like(q), torch.randn(2, 2, 37)
    scale = logits / 4
    exact_leaves = [x.double().requires_grad_() for x in (q, k, v, a, b)]
    ae, be = exact_leaves[3] if pairs else None, exact_leaves[4]
    *exact, p = oracle(*exact_leaves[:3], ae, be, strength, scale)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, a, b)]
    gate = MotionGate(leaves[3] if pairs else None, leaves[4], strength=strength)
    options = {"gate": gate, "scale": scale, "backend": backend}
    out, aux = gated_attention(*leaves[:3], **options, return_aux=True, row_stats=ROW_STATS)
    # What the rounding of a logit and of a weight's logarithm moves a probability by, a few times.
    logit = float((scale * exact_leaves[0] @ exact_leaves[1].mT).abs().max()) + 17 * strength
    tolerance = 4 * 2.0**-24 * (8 + logit + 4 * strength)
    for name, x, e in zip(
        ("out", "lse", *ROW_STATS), (out, aux.lse, aux.entropy, aux.max_prob, aux.sum_sq), exact, strict=True
    ):
        error = (x.double() - e).abs().max() / e.abs().max().clamp_min(1)
        assert error <= tolerance, f"{name}: {error:.1e} > {tolerance:.1e}"
    wanted = range(5) if pairs else (0, 1, 2, 4)
    grads = torch.autograd.grad((out, aux.lse), [leaves[i] for i in wanted], (grad_out, grad_lse))
    exact_grads = torch.autograd.grad(
        exact[:2], [exact_leaves[i] for i in wanted], (grad_out.double(), grad_lse.double())
    )
    for name, g, e in zip([("q", "k", "v", "a", "b")[i] for i in wanted], grads, exact_grads, strict=True):
        assert g.isfinite().all(), name
        error = (g.double() - e).abs().max() / e.abs().max()
        assert error <= 8 * tolerance, f"grad of {name}: {error:.1e} > {8 * tolerance:.1e}"
    moments = received_attention(q, k, aux.lse.detach(), gate=gate, scale=scale, backend=backend)
    received = p.mean((1, 2))
    assert (moments.mean.double() - received).abs().max() <= tolerance * received.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [10.0, -1e4, 6e20, 1e30, 1e35, 0.0, 1e-30, 1e-45])
@pytest.mark.parametrize("kind", ["none", "dropped", "keys", "strong", "pairs", "causal"])
def test_any_scale_is_finite_where_float64_is(kind, scale, dtype, backend):
    q, k, v = (torch.randn(1, 2, n, 24).to(dtype) for n in (50, 70, 70))
    motion, start = torch.rand(1, 70), torch.arange(50)
    gate = {
        "dropped": MotionGate.drop_keys(torch.rand(1, 70) < 0.5), "keys": MotionGate.keys(motion),
        "strong": MotionGate.keys(motion, strength=30.0),
        "pairs": MotionGate(torch.rand(1, 50), motion, strength=20.0),
    }.get(kind)  # fmt: skip
    visible = Visibility.intervals(start // 2, start + 20) if kind == "causal" else None
    grad_out = torch.randn(1, 2, 50, 24).to(dtype)
    results = []
    for wide in (False, True):
        leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in (q, k, v)]
        name = "reference" if wide else backend
        out, aux = gated_attention(*leaves, gate=gate, visible=visible, scale=scale, return_aux=True, backend=name)
        results.append((out, aux.lse, *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))))
    limit = torch.finfo(dtype).max / 4
    for name, x, e in zip(("out", "lse", "grad q", "grad k", "grad v"), *results, strict=True):
        assert not x.isnan().any(), name
        within = e.abs() < (limit if name != "lse" else 1e38)
        # At such scales a logit's last digit, and with it a gradient, can be any number; but not where it has to be 0.
        if name in ("out", "lse", "grad v") or abs(scale) <= 10:
            assert x[within].isfinite().all(), name
    if abs(scale) > 1e9 and kind in ("none", "dropped", "causal"):  # one key takes all
        torch.testing.assert_close(results[0][0].double(), results[1][0].double(), rtol=1e-2, atol=0)


def test_one_key_takes_all(backend):
    """Where the largest logit is the whole sum its probability is 1 at any size, in the gradient too."""
    q, v = torch.ones(1, 1, 40, 8), torch.randn(1, 1, 30, 8)
    k = torch.randn(1, 1, 30, 8)
    k[0, 0, 17] = 4.0
    for scale in (1e3, 1e5, 12345.678, 3e20, 1e36):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, aux = gated_attention(*leaves, scale=scale, return_aux=True, backend=backend)
        assert torch.equal(out, v[:, :, 17:18].expand_as(out))
        grads = torch.autograd.grad(out.sum(), leaves)
        assert not grads[0].any()
        assert not grads[1].any()
        torch.testing.assert_close(grads[2][0, 0, 17], torch.full((8,), 40.0), rtol=1e-6, atol=0)
        mean = received_attention(q, k, aux.lse.detach(), scale=scale, backend=backend).mean
        torch.testing.assert_close(mean[0], torch.eye(30)[17], rtol=1e-6, atol=0)


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0, 3.0, 1.7])
@pytest.mark.parametrize("pairs", [True, False])
def test_a_key_without_weight_above_all_others(pairs, strength, backend):
    """Its exponential leaves fp32 and counts for nothing, however large the gradients that it is multiplied with."""
    q = torch.ones(1, 1, 5, 1, requires_grad=True)
    k = torch.tensor([100.0, 0.0, -1.0]).view(1, 1, 3, 1).requires_grad_()
    v = torch.tensor([1e5, -1e5, 1e5]).view(1, 1, 3, 1).requires_grad_()
    key = torch.tensor([[1.0, 0.0, 0.5]])
    gate = MotionGate(torch.ones(1, 5), key, strength=strength) if pairs else MotionGate.keys(key, strength=strength)
    out = gated_attention(q, k, v, gate=gate, scale=1.0, backend=backend)
    grads = torch.autograd.grad(out, (q, k, v), torch.full_like(out, 100.0))
    p = 1 / (1 + math.e * 2**strength)  # of the last key
    torch.testing.assert_close(out, torch.full_like(out, (2 * p - 1) * 1e5))
    dk = 100 * 5 * p * (1 - p) * 2e5  # of its logit, over the queries
    torch.testing.assert_close(grads[0], torch.full_like(q, -dk / 5))
    torch.testing.assert_close(grads[1].flatten(), torch.tensor([0.0, -dk, dk]))
    torch.testing.assert_close(grads[2].flatten(), 500 * torch.tensor([0.0, 1 - p, p]))
