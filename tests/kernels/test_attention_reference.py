"""The oracle itself: against SDPA, by hand, by what must not matter, and by numerical differentiation."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.attention_cases import GATES, VISIBLE, Case, draw

from gate4d import MotionGate, Visibility, gated_attention
from gate4d.functional import ROW_STATS

attend = partial(gated_attention, backend="reference")
RENORMALIZED = [g for g in GATES if g not in ("static_to_dynamic", "zeroed_after_softmax", "general")]
STRENGTHS = (0.0, 0.5, 1.0, 2.0, 3.0, 1.7)


def doubles(case: Case):
    x = draw(case)
    return x, x.q.double(), x.k.double(), x.v.double(), x.query_motion.double(), x.key_motion.double()


@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("gate", RENORMALIZED)
def test_against_sdpa_with_the_bias_of_the_papers(gate, visible):
    """A renormalised gate is the additive bias ``strength * log(1 - a b)``, with -inf where nothing is to be seen."""
    x, q, k, v, query, key = doubles(Case(gate, visible, queries=24, keys=30, dim=8))
    g = GATES[gate](query, key, x.masks) or MotionGate()
    bias = torch.zeros(2, 1, q.shape[2], 30, dtype=torch.float64)
    if g.key_score is not None:
        a = torch.ones_like(query) if g.query_score is None else g.query_score
        bias = g.strength * torch.log(1 - a[:, None, :, None] * g.key_score.double()[:, None, None, :])
        bias = bias.nan_to_num(nan=0.0, neginf=-math.inf)  # 0 * -inf: a strength of 0 is no gate
    if g.dropped_keys is not None:
        bias = bias.masked_fill(g.dropped_keys[:, None, None], -math.inf)
    if x.visible is not None:
        bias = bias.masked_fill(~x.visible.dense(q.shape[2], 30)[:, None], -math.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    lse = torch.logsumexp(q @ k.mT / math.sqrt(8) + bias, -1)
    expected = torch.where(lse.isfinite()[..., None], expected, 0.0)
    if g.output_scale is not None:
        expected = expected * g.output_scale[:, None, :, None]
    out, aux = attend(q, k, v, gate=GATES[gate](query, key, x.masks), visible=x.visible, return_aux=True)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(aux.lse, lse, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("visible", ["full", "window", "intervals"])
@pytest.mark.parametrize("gate", ["static_to_dynamic", "zeroed_after_softmax", "general"])
def test_without_renormalising_weights_act_after_the_softmax(gate, visible):
    x, q, k, v, query, key = doubles(Case(gate, visible, queries=24, keys=30, dim=8))
    g = GATES[gate](query, key, x.masks)
    seen = torch.ones(1, q.shape[2], 30).bool() if x.visible is None else x.visible.dense(q.shape[2], 30)
    seen = seen if g.dropped_keys is None else seen & ~g.dropped_keys[:, None]
    logits = (q @ k.mT / math.sqrt(8)).masked_fill(~seen[:, None], -math.inf)
    p = torch.softmax(logits, -1).nan_to_num(0.0)
    p = p * ((1 - g.query_score[:, :, None] * g.key_score[:, None]) ** g.strength)[:, None].double()
    out, aux = attend(q, k, v, gate=g, visible=x.visible, return_aux=True, row_stats=ROW_STATS)
    scale = 1.0 if g.output_scale is None else g.output_scale[:, None, :, None]
    torch.testing.assert_close(out, p @ v * scale, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(aux.lse, logits.logsumexp(-1), rtol=1e-12, atol=1e-14)  # of the un-gated sum
    torch.testing.assert_close(aux.entropy, -torch.special.xlogy(p, p).sum(-1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(aux.max_prob, p.amax(-1))
    torch.testing.assert_close(aux.sum_sq, p.square().sum(-1))


def test_by_hand():
    """Two queries, three keys, logits of log 1, log 2, log 5: everything in fractions."""
    q = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    k = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log().reshape(1, 1, 3, 1)
    v = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64).reshape(1, 1, 3, 1)
    call = partial(attend, q, k, v, scale=1.0, return_aux=True, row_stats=ROW_STATS)

    def same(got, expected):
        torch.testing.assert_close(got.flatten(), torch.tensor(expected, dtype=torch.float64))

    out, aux = call()
    same(out, [(10 + 40 + 150) / 8] * 2)
    same(aux.lse, [math.log(8)] * 2)
    same(aux.max_prob, [5 / 8] * 2)
    same(aux.sum_sq, [30 / 64] * 2)
    same(aux.entropy, [-(math.log(1 / 8) + 2 * math.log(2 / 8) + 5 * math.log(5 / 8)) / 8] * 2)
    # Query 0 static, query 1 moving; key 2 moving by 4/5: weights 1, 1, 1/5 for the static query alone.
    motion = torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([[0.0, 0.0, 0.8]], dtype=torch.float64)
    out, aux = call(gate=MotionGate.pairwise(*motion))
    same(out, [(10 + 40 + 30) / 4, 25.0])
    same(aux.lse, [math.log(4), math.log(8)])
    out, aux = call(gate=MotionGate(1 - motion[0], motion[1], renormalize=False))
    same(out, [(10 + 40 + 30) / 8, 25.0])
    same(aux.lse, [math.log(8)] * 2)
    out, _ = call(gate=MotionGate.pairwise(*motion, strength=2))
    same(out, [(10 + 40 + 150 / 25) / (3 + 5 / 25), 25.0])
    out, _ = call(gate=MotionGate.queries(motion[0]))
    same(out, [25.0, 0.0])
    out, _ = call(gate=MotionGate.drop_keys(torch.tensor([[False, True, False]])))
    same(out, [(10 + 150) / 6] * 2)
    moving = torch.tensor([[False, True]]), torch.tensor([[True, False, False]])
    out, _ = call(gate=MotionGate.static_to_dynamic(*moving))
    same(out, [190 / 8, 25.0])
    out, _ = call(visible=Visibility.intervals(torch.tensor([2, 1]), torch.tensor([3, 2]), torch.tensor([1, 0])))
    same(out, [160 / 6, 20.0])


@pytest.mark.parametrize("gate", ["dropped_and_gated", "general", "drop_keys"])
def test_what_is_not_seen_does_not_matter(gate):
    x, q, k, v, query, key = doubles(Case(gate, "intervals", queries=20, keys=30, dim=8))
    unseen = x.masks[1] | ~x.visible.dense(20, 30).any(1)
    shape = unseen[:, None, :, None]

    def run(k, v, key):
        out, aux = attend(
            q, k, v, gate=GATES[gate](query, key, x.masks), visible=x.visible, return_aux=True, row_stats=ROW_STATS
        )
        return out, *aux

    before = run(k, v, key)
    noisy = torch.where(shape, 1e4 * torch.randn_like(k), k), torch.where(shape, 1e4 * torch.randn_like(v), v)
    after = run(*noisy, torch.where(unseen, torch.rand_like(key), key))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    other = run(*(torch.cat((t[:1], t[1:] + 1)) for t in (k, v)), key)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(before, other, strict=True))
    assert not torch.equal(before[0][1], other[0][1])


@pytest.mark.parametrize("renormalize", [True, False])
def test_dead_rows(renormalize):
    """Nothing visible, everything dropped, all weights zero."""
    q, k, v = (torch.randn(3, 1, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    empty = torch.tensor([[0, 1], [0, 0], [0, 0]]), torch.tensor([[0, 1], [2, 2], [2, 2]])
    dropped = torch.tensor([[False] * 2, [True] * 2, [False] * 2])
    a = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    b = torch.ones(3, 2, dtype=torch.float64)
    dead = torch.tensor([[True, True], [True, True], [True, False]])[:, None]
    gate = MotionGate(a, b, dropped_keys=dropped, renormalize=renormalize)
    out, aux = attend(q, k, v, gate=gate, visible=Visibility.intervals(*empty), return_aux=True, row_stats=ROW_STATS)
    assert not out[dead].any()
    assert not any(s[dead].any() for s in aux[1:])
    gated_away = torch.tensor([[False, False], [False, False], [True, False]])[:, None]
    assert torch.equal(aux.lse == -math.inf, dead if renormalize else dead & ~gated_away)
    grads = torch.autograd.grad((out, aux.lse), (q, k, v), (torch.ones_like(out), torch.ones_like(aux.lse)))
    assert all(g.isfinite().all() for g in grads)
    assert not any(g[:2].any() for g in grads)


def _fields(**chosen):
    """A gate whose fields are leaves, so that each is differentiated on its own."""
    return lambda a, b, c, mask, strength: MotionGate(
        a if "a" in chosen else None, b if "b" in chosen else None, c if "c" in chosen else None,
        mask if "mask" in chosen else None, strength, chosen.get("renormalize", True),
    )  # fmt: skip


KINDS = {
    "none": lambda a, b, c, mask, strength: None,
    "pairwise": lambda a, b, c, mask, strength: MotionGate.pairwise(a, b, strength=strength),
    "keys": lambda a, b, c, mask, strength: MotionGate.keys(b, strength=strength),
    "queries": lambda a, b, c, mask, strength: MotionGate.queries(a, strength=strength),
    "drop_keys": lambda a, b, c, mask, strength: MotionGate.drop_keys(mask),
    "static_to_dynamic": lambda a, b, c, mask, strength: MotionGate.static_to_dynamic(mask[:, :4], mask),
    "after_softmax": _fields(a=1, b=1, renormalize=False),
    "everything": _fields(a=1, b=1, c=1, mask=1),
    "everything_after_softmax": _fields(a=1, b=1, c=1, mask=1, renormalize=False),
}


@pytest.mark.parametrize(
    ("kind", "strength"),
    [
        (kind, s)
        for kind in KINDS
        for s in (STRENGTHS if kind not in ("none", "drop_keys", "static_to_dynamic") else (1.0,))
    ],
)
def test_gradcheck(kind, strength):
    """Gradients of out and lse in q, k, v and the gate's scores, with a window and a row that sees nothing."""
    leaves = [torch.randn(2, 2, n, 3, dtype=torch.float64) for n in (4, 5, 5)]
    leaves += [0.1 + 0.8 * torch.rand(2, n, dtype=torch.float64) for n in (4, 5, 4)]
    mask = torch.tensor([[False, True, False, False, True], [False] * 5])
    visible = Visibility.intervals(torch.tensor([0, 1, 3, 2]), torch.tensor([5, 3, 3, 5]), torch.tensor([0, 1, 0, 1]))

    def f(q, k, v, a, b, c):
        gate = KINDS[kind](a, b, c, mask, strength)
        out, aux = attend(q, k, v, gate=gate, visible=visible, return_aux=True)
        return out, torch.where(aux.lse.isfinite(), aux.lse, 0)

    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in leaves])


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradient_of_a_score_of_one(renormalize):
    """A weight of exactly 0 has the gradient from its inside at strength 1, and none otherwise."""
    q, k, v = (torch.randn(1, 2, n, 3, dtype=torch.float64) for n in (3, 4, 4))
    score = torch.tensor([[0.3, 1.0, 0.6, 1.0]], dtype=torch.float64)

    def loss(score, strength=1.0):
        gate = MotionGate(None, score, strength=strength, renormalize=renormalize)
        out, aux = attend(q, k, v, gate=gate, return_aux=True)
        return out.sin().sum() + aux.lse.sum()

    leaf = score.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    step = 1e-6
    for j in (1, 3):
        inside = score.clone()
        inside[0, j] -= step
        assert abs(float((loss(score) - loss(inside)) / step - grad[0, j])) < 1e-4 * abs(float(grad[0, j]))
    for strength in (0.5, 2.0):
        (grad,) = torch.autograd.grad(loss(leaf, strength), leaf)
        assert torch.equal(grad == 0, score == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    """The output keeps the inputs' dtype; lse and statistics are at least fp32."""
    q, k, v = (torch.randn(1, 1, 4, 8).to(dtype) for _ in range(3))
    out, aux = attend(q, k, v, return_aux=True, row_stats=ROW_STATS)
    assert out.dtype == dtype
    assert {x.dtype for x in aux} == {torch.promote_types(dtype, torch.float32)}
