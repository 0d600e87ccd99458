"""What a query does not see never matters to it, not even NaN; what it sees makes it NaN, on every backend."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from conftest import require_backend
from helpers.attention_cases import DTYPES, GATES, VISIBLE, Case, _caller
from helpers.nonfinite import PLACES, VALUES, Poison, check

import gate4d
from gate4d import TokenLayout, Visibility, gated_attention, received_attention

pytestmark = pytest.mark.kernel
# The last rows, as the last frame of a clip; some in the middle; the first, which most see.
ROWS = (slice(130, 150), slice(70, 71), slice(0, 3))


def cases():
    """Every gate x visibility; places, values, dtypes and rows go round."""
    places, rows, dtypes = cycle(PLACES), cycle(ROWS), cycle(DTYPES)
    for i, gate in enumerate(GATES):
        for visible in VISIBLE:
            for value in (VALUES[0], VALUES[1 + i % 3]):
                yield Case(gate, visible, next(dtypes), 2, 2, 150, 150, 32, 24), Poison(next(places), value, next(rows))


@pytest.mark.parametrize(("case", "poison"), list(cases()), ids=str)
def test_only_who_sees_it(case, poison, backend):
    check(case, _caller(backend), poison)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("visible", ["frame_causal", "packed", "window", "intervals"])
def test_every_place(place, visible, backend):
    for value in VALUES:
        for rows in ROWS:
            for gate in ("none", "pairwise", "general"):
                check(
                    Case(gate, visible, torch.float32, 1, 1, 150, 150, 32), _caller(backend), Poison(place, value, rows)
                )


def test_the_last_frame_of_a_stream(backend):
    """The frames before it, forward and backward, as a model that saw a broken frame would run them."""
    layout = TokenLayout(4, 37)
    q, k, v = (torch.randn(1, 2, layout.num_tokens, 16) for _ in range(3))
    last = layout.offsets[-2]
    results = []
    for value in (0.0, float("nan")):
        leaves = [x.clone() for x in (q, k, v)]
        for x in leaves[1:]:
            x[:, :, last:] = value
        leaves = [x.requires_grad_() for x in leaves]
        out = gated_attention(*leaves, visible=Visibility.frame_causal(layout), backend=backend)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        results.append([out[:, :, :last].detach(), grads[0][:, :, :last]])
        if value != value:
            assert out[:, :, last:].isnan().all()
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize("place", ["q", "k", "lse"])
@pytest.mark.parametrize("name", ["cpu", "chunked", "reference"])
def test_received(name, place):
    if name == "cpu":
        require_backend(name)
    layout = TokenLayout(4, 37)
    q, k, v = (torch.randn(1, 2, layout.num_tokens, 16) for _ in range(3))
    visible = Visibility.frame_causal(layout)
    _, aux = gated_attention(q, k, v, visible=visible, return_aux=True)
    clean = received_attention(q, k, aux.lse, visible=visible, over=("queries",), backend=name)
    arguments = {"q": q, "k": k, "lse": aux.lse.clone()}
    rows = slice(40, 50)  # of the second frame: seen by later frames, sees the first
    arguments[place][0, 0, rows] = torch.nan
    dirty = received_attention(*arguments.values(), visible=visible, over=("queries",), backend=name)
    touched = torch.zeros(1, 2, layout.num_tokens, dtype=torch.bool)
    touched[0, 0, rows if place == "k" else slice(0, 74)] = True
    for before, after in ((clean.mean, dirty.mean), (clean.m2, dirty.m2)):
        assert after[touched].isnan().all()
        torch.testing.assert_close(after[~touched], before[~touched])


def test_a_nan_in_a_key_that_nobody_sees_has_no_gradient(backend):
    q, k, v = (torch.randn(1, 1, 70, 8) for _ in range(3))
    k[0, 0, 65:], v[0, 0, 65:] = torch.nan, torch.inf
    leaves = [x.requires_grad_() for x in (q, k, v)]
    visible = Visibility.intervals(torch.zeros(70).long(), torch.arange(1, 71).clamp(max=65))
    out, aux = gated_attention(*leaves, visible=visible, return_aux=True, backend=backend)
    grads = torch.autograd.grad(out.sum() + aux.lse.sum(), leaves)
    assert all(x.isfinite().all() for x in (out, aux.lse, *grads))
    assert not any(g[0, 0, 65:].any() for g in grads[1:])


def test_vmap_keeps_it_apart():
    require_backend("cpu")
    q, k, v = (torch.randn(3, 1, 1, 20, 8) for _ in range(3))
    v[1, :, :, 15:] = torch.nan
    visible = Visibility.packed([0, 12, 20])
    for name in ("reference", "cpu"):
        out = torch.func.vmap(lambda q, k, v, n=name: gate4d.gated_attention(q, k, v, visible=visible, backend=n))(
            q, k, v
        )
        assert out[1, :, :, 12:].isnan().all()
        assert out[[0, 2]].isfinite().all()
        assert out[1, :, :, :12].isfinite().all()
