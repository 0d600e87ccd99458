"""Every backend against the float64 reference: gates, visibilities, dtypes, sizes, memory, statistics, gradients."""

from __future__ import annotations

import os
from functools import partial
from itertools import cycle, product

import pytest
import torch
import torch.nn.functional as F
from conftest import require_backend
from helpers.accuracy import assert_accurate
from helpers.attention_cases import DTYPES, GATES, ROUNDING, VISIBLE, Case, check, draw, evaluate
from helpers.torch_attention import torch_attention

from gate4d import MotionGate, Visibility, gated_attention
from gate4d.functional import ROW_STATS

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.kernel]

LENGTHS = (1, 63, 100, 111, 1041)
DIMS = (1, 32, 48, 64, 72, 80, 96, 128, 256)


def sweep() -> list[Case]:
    """Every gate x visibility x dtype; shapes go round, so that each meets every kind."""
    shapes = cycle(
        [(150, 150, 32, None), (111, 111, 48, 24), (63, 63, 64, None), (200, 200, 16, 40), (33, 33, 72, None)]
    )
    unequal = cycle([(111, 63), (40, 150), (150, 150), (7, 211)])
    cases = []
    for gate, visible, dtype in product(GATES, VISIBLE, DTYPES):
        queries, keys, dim, value_dim = next(shapes)
        if visible not in ("per_frame", "ragged", "frame_causal"):
            queries, keys = next(unequal)
        cases.append(Case(gate, visible, dtype, 2, 2, queries, keys, dim, value_dim))
    return cases


def cases(cases: list[Case]) -> pytest.MarkDecorator:
    """Pairs of case and backend; the reference, which computes every dtype alike, takes part in float32."""
    pairs = [
        (c, b)
        for c in cases
        for b in ("cpu", "reference")
        if b == "cpu" or (c.dtype == torch.float32 and c.keys < 1000)
    ]
    return pytest.mark.parametrize(("case", "backend"), pairs, ids=[f"{b}-{c}" for c, b in pairs], indirect=["backend"])


@cases(sweep())
def test_gate_visibility_dtype(case, backend):
    check(case, backend)


def sizes() -> list[Case]:
    """Every length x head dimension, short lengths twice; gates, visibilities and dtypes go round."""
    gates, visible, dtypes = cycle(GATES), cycle(["full", "frame_causal", "intervals", "window"]), cycle(DTYPES)
    cases = []
    for n, dim in product(LENGTHS, DIMS):
        batch, heads = (1, 1) if n > 1000 else (2, 3)
        for _ in range(1 if n > 1000 else 2):
            cases.append(Case(next(gates), next(visible), next(dtypes), batch, heads, n, n, dim))
    return cases


@cases(sizes())
def test_sizes(case, backend):
    check(case, backend)


# --- how the inputs lie, and degenerate shapes ------------------------------------------------------------------------


@cases(
    [
        Case(gate, visible, dtype, 2, 3, 63, 63, dim, memory=memory)
        for (memory, (gate, visible), dim), dtype in zip(
            product(
                ("qkv", "heads_last", "odd_rows", "last_stride_2", "expanded"),
                (("dropped_and_gated", "intervals"), ("none", "full")),
                (32, 72),
            ),
            cycle(DTYPES),
        )
    ]
    + [Case("pairwise", "frame_causal", torch.bfloat16, 1, 2, 1041, 1041, 64, memory="qkv")]
)
def test_memory_layouts(case, backend):
    """Views are read in place, with NaN around them; the inputs stay as they are."""
    check(case, backend)


@cases(
    [
        Case("general", "intervals", dtype, batch, heads, queries, keys, dim, value_dim)
        for dtype in (torch.float32, torch.bfloat16)
        for batch, heads, queries, keys, dim, value_dim in (
            (3, 4, 1, 200, 64, 1),
            (1, 1, 200, 1, 64, 256),
            (1, 2, 5, 130, 1, 128),
            (1, 2, 130, 5, 256, 3),
            (3, 1, 17, 33, 7, 5),
            (1, 5, 2, 2, 96, 80),
        )
    ]
)
def test_unequal_sizes(case, backend):
    check(case, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "keys", "dim", "value_dim"])
def test_empty(empty, dtype, backend):
    """Empty inputs give outputs and gradients of the right shapes, full of zeros."""
    size = {"batch": 2, "heads": 3, "queries": 5, "keys": 7, "dim": 4, "value_dim": 6, empty: 0}
    q = torch.randn(*(size[s] for s in ("batch", "heads", "queries", "dim")), dtype=dtype, requires_grad=True)
    k = torch.randn(*(size[s] for s in ("batch", "heads", "keys", "dim")), dtype=dtype, requires_grad=True)
    v = torch.randn(*(size[s] for s in ("batch", "heads", "keys", "value_dim")), dtype=dtype, requires_grad=True)
    motions = [torch.rand(size["batch"], size[n], requires_grad=True) for n in ("queries", "keys")]
    visible = Visibility.intervals(
        torch.zeros(size["queries"], dtype=torch.int32), torch.full((size["queries"],), size["keys"])
    )
    for gate, seen in product((None, MotionGate.pairwise(*motions)), (None, visible)):
        out, aux = gated_attention(
            q, k, v, gate=gate, visible=seen, row_stats=ROW_STATS, return_aux=True, backend=backend
        )
        assert out.shape == (*q.shape[:3], size["value_dim"])
        assert out.dtype == dtype
        for x in aux:
            assert x.shape == q.shape[:3]
        leaves = [q, k, v] if gate is None else [q, k, v, *motions]
        grads = torch.autograd.grad(out.sum() + torch.where(aux.lse.isfinite(), aux.lse, 0).sum(), leaves)
        assert all(g.shape == x.shape and g.isfinite().all() for g, x in zip(grads, leaves, strict=True))
        if empty == "keys":
            assert not out.any()
            assert (aux.lse == -torch.inf).all()
            assert not any(g.any() for g in grads)
        if empty == "dim":  # all logits are 0
            weight = 1 - (1 - motions[0])[:, :, None] * motions[1][:, None]
            total = torch.full((2, 5), 7.0) if gate is None else weight.sum(-1)
            torch.testing.assert_close(aux.lse, total.log()[:, None].expand_as(aux.lse))


# --- numbers that overflow, vanish or do not count --------------------------------------------------------------------


@cases(
    [
        Case(gate, visible, dtype, 2, 2, 100, 100, 64, logit_scale=50.0)
        for gate, visible, dtype in product(
            ("none", "pairwise_half", "zeroed_after_softmax"), ("full", "window"), DTYPES
        )
    ]
)
def test_big_logits(case, backend):
    """Logits in the thousands neither overflow nor lose the rows whose largest is very negative."""
    check(case, backend)


@pytest.mark.parametrize("gate", ["none", "pairwise", "dropped_and_gated", "zeroed_after_softmax"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_common_offset(gate, dtype, sign, backend):
    """A large offset common to all logits of a row shifts lse and nothing else."""
    case = Case(gate, "overlapping_sinks", dtype, 1, 2, 40, 90, 32)
    x = draw(case)
    x.q[..., 0] = sign * 64.0
    x.k[..., 0] = 64.0
    check(case, backend, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [1.0, 2.0, 0.5, 1.7])
def test_huge_logit_of_weight_zero_does_not_count(dtype, strength, backend):
    """A key of weight exactly 0 must not set the running maximum: the others would vanish below it."""
    q = torch.ones(1, 1, 3, 16, dtype=dtype)
    k = torch.zeros(1, 1, 150, 16, dtype=dtype)
    k[:, :, 77] = 1000.0  # a logit of 4000
    v = torch.randn(1, 1, 150, 8, dtype=dtype)
    motion = torch.zeros(1, 150)
    motion[:, 77] = 1.0
    q.requires_grad_()
    out, aux = gated_attention(
        q, k, v, gate=MotionGate.keys(motion, strength=strength), row_stats=ROW_STATS, return_aux=True, backend=backend
    )
    rest = motion[0] == 0  # the result is that without the key
    k, v = k[:, :, rest], v[:, :, rest]
    exact = gated_attention(
        q.double(), k.double(), v.double(), row_stats=ROW_STATS, return_aux=True, backend="reference"
    )
    torch_results = [torch_attention(q, k, v, running=running) for running in (False, True, True)]
    for name, pick in (("out", lambda r: r[0]), *((f, lambda r, f=f: getattr(r[1], f)) for f in aux._fields)):
        got, expected, *others = (pick(r).detach() for r in ((out, aux), exact, *torch_results))
        assert_accurate(name, got, expected, *others, **ROUNDING.get(name, {}))
    (grad,) = torch.autograd.grad(out.float().sum(), q)
    assert grad.isfinite().all()
    assert not grad.any()  # the keys that count are all alike


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_weights_still_count(dtype, backend):
    """All weights 2**-24: renormalising takes them out again."""
    q, k, v = (torch.randn(1, 2, 70, 32).to(dtype) for _ in range(3))
    tiny = torch.full((1, 70), 1 - 2.0**-24)
    gate = MotionGate.keys(tiny, strength=1.0)
    plain, plain_aux = gated_attention(q, k, v, return_aux=True, backend=backend)
    out, aux = gated_attention(q, k, v, gate=gate, return_aux=True, backend=backend)
    step = torch.finfo(dtype).eps
    assert float((out.double() - plain.double()).abs().max()) <= 2 * step * float(plain.abs().max())
    shift = plain_aux.lse.double() - 24 * torch.log(torch.tensor(2.0, dtype=torch.float64))
    assert float((aux.lse - shift).abs().max()) <= 4 * torch.finfo(torch.float32).eps * float(shift.abs().max())


# --- rows without anything to see -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cause", ["invisible", "dropped", "weight"])
def test_rows_that_see_nothing(cause, dtype, backend):
    """Output 0, lse -inf, statistics 0, gradients 0; the rows beside them are as if alone."""
    batch, heads, queries, keys = 2, 2, 70, 90
    q, k, v = (torch.randn(batch, heads, n, 32).to(dtype).requires_grad_() for n in (queries, keys, keys))
    dead = torch.zeros(batch, queries, dtype=torch.bool)
    visible, gate, score = None, None, torch.ones(batch, keys, requires_grad=True)
    if cause == "invisible":
        dead[0, 3], dead[1, 32:] = True, True
        end = torch.where(dead, 10, keys)
        visible = Visibility.intervals(torch.full_like(end, 10), end, torch.where(dead, 0, 4))
    elif cause == "dropped":
        dead[1] = True
        gate = MotionGate.drop_keys(dead[:, :1].expand(batch, keys))
    else:
        dead[:, ::2] = True  # a = 1 and b = 1: every weight is 0
        gate = MotionGate(dead.float(), score)
    out, aux = gated_attention(
        q, k, v, gate=gate, visible=visible, row_stats=ROW_STATS, return_aux=True, backend=backend
    )
    rows = dead[:, None].expand(batch, heads, queries)
    assert not out[rows].any()
    assert (aux.lse[rows] == -torch.inf).all()
    assert aux.lse[~rows].isfinite().all()
    assert not any(x[rows].any() for x in aux[1:])
    assert all(x.isfinite().all() for x in (out, *aux[1:]))
    leaves = [q, k, v] if cause != "weight" else [q, k, v, score]
    # The gradients that enter at dead rows are large, and must not come out anywhere.
    grad_out = torch.where(rows[..., None], 1e4, 1.0).to(dtype).expand_as(out)
    grad_lse = torch.where(rows, 1e4, 0.5)
    grads = torch.autograd.grad((out, aux.lse), leaves, (grad_out, grad_lse), retain_graph=True)
    alive = torch.autograd.grad(
        (out, aux.lse), leaves, (torch.where(rows[..., None], 0, grad_out), torch.where(rows, 0, grad_lse))
    )
    assert not grads[0][rows].any()
    for got, expected in zip(grads, alive, strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, expected)


# --- statistics and options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_do_not_change_the_output(dtype, backend):
    """Every combination of return_aux and row_stats gives the same bits."""
    x = draw(Case("dropped_and_gated", "window", dtype, queries=100, keys=100))
    gate = GATES["dropped_and_gated"](x.query_motion, x.key_motion, x.masks)
    call = partial(gated_attention, x.q, x.k, x.v, gate=gate, visible=x.visible, backend=backend)
    out, aux = call(return_aux=True, row_stats=ROW_STATS)
    assert torch.equal(call(), out)
    for chosen in ((), ("entropy",), ("sum_sq", "max_prob")):
        other, other_aux = call(return_aux=True, row_stats=chosen)
        assert torch.equal(other, out)
        assert torch.equal(other_aux.lse, aux.lse)
        for name in ROW_STATS:
            got = getattr(other_aux, name)
            assert (got is None) if name not in chosen else torch.equal(got, getattr(aux, name))
    assert not any(s.requires_grad for s in aux[1:])


def test_scale_zero_still_hides(backend):
    """A hidden logit of -inf times a scale of 0 is not a number; the mean over the visible keys is wanted."""
    q, k, v = (torch.randn(2, 2, n, 8, requires_grad=True) for n in (9, 70, 70))
    visible = Visibility.intervals(torch.arange(9), torch.arange(9) + 3, 2)
    out, aux = gated_attention(q, k, v, visible=visible, scale=0.0, return_aux=True, backend=backend)
    seen = visible.dense(9, 70)[:, None].float()
    torch.testing.assert_close(out, seen @ v / seen.sum(-1, keepdim=True))
    torch.testing.assert_close(aux.lse, seen.sum(-1).log().expand(2, 2, 9))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0].any()


def test_weights_that_underflow_give_no_nan(backend):
    """The sums of a row run through the denormals as the strength grows."""
    q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for n in (60, 5, 5))
    gate = MotionGate.pairwise(torch.linspace(0.9, 1.0, 60)[None], torch.full((1, 5), 0.99), strength=22.3)
    out = gated_attention(q, k, v, gate=gate, backend=backend)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_features_at_all(dtype, backend):
    q, k, v = (torch.zeros(1, 2, n, 0, dtype=dtype, requires_grad=True) for n in (3, 4, 4))
    out, aux = gated_attention(q, k, v, return_aux=True, backend=backend)
    assert out.shape == (1, 2, 3, 0)
    torch.testing.assert_close(aux.lse, torch.full((1, 2, 3), 4.0).log())
    (out.float().sum() + aux.lse.sum()).backward()
    mean = gated_attention(q, k, torch.ones(1, 2, 4, 5, dtype=dtype), backend=backend)
    assert torch.equal(mean, torch.ones(1, 2, 3, 5, dtype=dtype))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(scale, dtype, backend):
    """Any scale, 0 included (which is not None); compared through keys that carry the scale."""
    q, k, v = (torch.randn(1, 2, 40, 16).to(dtype) for _ in range(3))
    out = gated_attention(q, k, v, scale=scale, backend=backend)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)
    torch_out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale).to(dtype)
    assert_accurate("out", out, exact, torch_out)


def test_invisible_dropped_and_other_items_do_not_matter(backend):
    """Large changes of what a query must not see leave its bits, and the gradients, as they were."""
    case = Case("dropped_and_gated", "intervals", torch.float32, 2, 2, 70, 130, 32)
    x = draw(case)
    gate = GATES[case.gate](x.query_motion, x.key_motion, x.masks)
    unseen = x.masks[1] | ~x.visible.dense(70, 130).any(1)  # [B, Nk]
    assert unseen.any()
    k, v = (torch.where(unseen[:, None, :, None], 1e3 * torch.randn_like(t), t) for t in (x.k, x.v))

    def run(k, v):
        leaves = [t.detach().clone().requires_grad_() for t in (x.q, k, v)]
        out, aux = gated_attention(*leaves, gate=gate, visible=x.visible, return_aux=True, backend=backend)
        return out, aux.lse, *torch.autograd.grad((out, aux.lse), leaves, (x.grad_out, x.grad_lse))

    before = run(x.k, x.v)
    for a, b in zip(before, run(k, v), strict=True):
        assert torch.equal(a, b)
    assert not any(g.mT[unseen[:, None].expand(2, 2, 130)[:, :, None].expand_as(g.mT)].any() for g in before[3:])
    other = x.k.clone(), x.v.clone()
    for t in other:
        t[1] += 1.0
    assert all(torch.equal(a[0], b[0]) for a, b in zip(before, run(*other), strict=True))


# --- determinism ------------------------------------------------------------------------------------------------------


def _bits_of(dtype: torch.dtype, heads: int, backend: str, count: int) -> list[torch.Tensor]:
    torch.set_num_threads(count)
    torch.manual_seed(0)
    x = draw(Case("general", "window", dtype, 1, heads, 300, 300, 32))
    values, grads = evaluate(
        partial(gated_attention, return_aux=True, row_stats=ROW_STATS, backend=backend), x, "general"
    )
    return [*values.values(), *(g for g in grads.values() if g is not None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_deterministic(dtype, heads, backend, threads):
    """The same bits twice, although threads take their work as they come."""
    first, second = (_bits_of(dtype, heads, backend, 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_independent_of_threads(dtype, heads, threads):
    """The same bits with one thread and with two."""
    two, one = (_bits_of(dtype, heads, require_backend("cpu"), count) for count in (2, 1))
    assert all(torch.equal(a, b) for a, b in zip(two, one, strict=True))


def test_instruction_set_is_capped():
    """GATE4D_CPU_ISA caps what the library uses; ``test_isa.py`` runs this file under each cap."""
    require_backend("cpu")
    order = ("portable", "avx2", "avx512", "avx512_bf16")
    used, cap = torch.ops.gate4d.cpu_isa(), os.environ.get("GATE4D_CPU_ISA", order[-1])
    assert order.index(used) <= order.index(cap)
