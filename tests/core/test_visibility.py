"""TokenLayout and Visibility against dense masks written by hand, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from gate4d import TokenLayout, Visibility, gated_attention

LAYOUTS = [TokenLayout(1, 5), TokenLayout(4, 3, 1), TokenLayout(5, [1, 4, 2, 3, 1]), TokenLayout(3, [4, 2, 5], 2)]


def frame_of(layout: TokenLayout) -> list[int]:
    return [t for t, size in enumerate(layout.tokens_per_frame) for _ in range(size)]


def dense(rule, queries: int, keys: int) -> torch.Tensor:
    return torch.tensor([[bool(rule(i, j)) for j in range(keys)] for i in range(queries)]).reshape(1, queries, keys)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_per_frame(layout):
    frame, n = frame_of(layout), layout.num_tokens
    assert torch.equal(Visibility.per_frame(layout).dense(n, n), dense(lambda i, j: frame[i] == frame[j], n, n))


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_frame_causal(layout):
    frame, n = frame_of(layout), layout.num_tokens
    for window, sinks, first in product((None, 1, 2, 9), (0, 1, 3, 9), range(layout.frames)):
        begin = layout.offsets[first]

        def sees(i: int, j: int, window=window, sinks=sinks, begin=begin) -> bool:
            t, u = frame[begin + i], frame[j]
            return u <= t and (u < sinks or window is None or u > t - window)

        visible = Visibility.frame_causal(layout, window, sinks, first)
        assert torch.equal(visible.dense(n - begin, n), dense(sees, n - begin, n)), (window, sinks, first)


@pytest.mark.parametrize(
    ("queries", "keys"), [([0, 3, 7], None), ([0, 3, 3, 7], [0, 2, 6, 6]), ([0, 0, 4], [0, 5, 5]), ([0, 6], [0, 0])]
)
@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_packed(queries, keys, kind):
    k = queries if keys is None else keys

    def sees(i: int, j: int) -> bool:
        return any(queries[s] <= i < queries[s + 1] and k[s] <= j < k[s + 1] for s in range(len(k) - 1))

    visible = Visibility.packed(kind(queries), None if keys is None else kind(keys))
    assert torch.equal(visible.dense(queries[-1], k[-1]), dense(sees, queries[-1], k[-1]))


def test_intervals():
    start, end = torch.randint(0, 9, (2, 3, 6))
    sink = torch.randint(0, 9, (3, 6))
    expected = torch.cat(
        [dense(lambda i, j, b=b: j < sink[b, i] or start[b, i] <= j < end[b, i], 6, 9) for b in range(3)]
    )
    assert torch.equal(Visibility.intervals(start, end, sink).dense(6, 9), expected)
    assert torch.equal(Visibility.intervals(start[0], end[0], sink[0]).dense(6, 9), expected[:1])
    by_int = Visibility.intervals(start, end, 4).dense(6, 9)
    assert torch.equal(by_int, Visibility.intervals(start, end, torch.full((3, 6), 4)).dense(6, 9))
    row = Visibility.intervals(start[:1], end, sink)  # one row of starts for the batch
    assert torch.equal(row.bounds[:, 0], start[:1].expand(3, 6).int())


def test_full_needs_no_bounds():
    assert Visibility.full().bounds is None
    assert Visibility.full().dense(2, 3).all()


def test_bounds_are_moved_once():
    visible = Visibility.packed([0, 4])
    assert visible.bounds_on(torch.device("cpu")) is visible.bounds
    assert visible.bounds_on(torch.device("meta")) is visible.bounds_on(torch.device("meta"))


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_layout_of_uniform_frames():
    layout = TokenLayout(3, 5, 2)
    assert (layout.num_tokens, layout.patches_per_frame, layout.uniform) == (15, 3, True)
    assert layout.is_patch().tolist() == [False, False, True, True, True] * 3
    scores = torch.rand(2, 3, 3)
    tokens = layout.token_scores(scores)
    assert torch.equal(tokens.reshape(2, 3, 5)[:, :, 2:], scores)
    assert not tokens.reshape(2, 3, 5)[:, :, :2].any()
    assert torch.equal(layout.patch_tokens(tokens).reshape(2, 3, 3), scores)
    assert torch.equal(layout.patch_tokens(tokens.T, dim=0), layout.patch_tokens(tokens).T)
    assert layout.token_scores(scores > 0.5).dtype == torch.bool


def test_layout_of_ragged_frames():
    layout = TokenLayout(2, [3, 5], 1)
    assert (layout.num_tokens, layout.uniform, layout.offsets) == (8, False, (0, 3, 8))
    tokens = layout.token_scores(torch.arange(1.0, 7.0)[None])
    assert tokens.tolist() == [[0, 1, 2, 0, 3, 4, 5, 6]]
    with pytest.raises(ValueError, match=r"^patches_per_frame needs a layout whose frames all have the same"):
        _ = layout.patches_per_frame


def test_token_scores_are_differentiable():
    scores = torch.rand(1, 2, 2, requires_grad=True)
    TokenLayout(2, 3, 1).token_scores(scores).sum().backward()
    assert torch.equal(scores.grad, torch.ones(1, 2, 2))


def test_layouts_compare_by_value():
    assert TokenLayout(2, 3, 1) == TokenLayout(2, [3, 3], 1)
    assert hash(TokenLayout(2, 3, 1)) == hash(TokenLayout(2, [3, 3], 1))
    assert TokenLayout(2, 3, 1) != TokenLayout(2, 3)
    assert TokenLayout(2, 3) != "layout"


@pytest.mark.parametrize("sizes", [np.int64(3), np.array([3, 3]), torch.tensor([3, 3]), (3, 3)])
def test_layout_takes_any_integers(sizes):
    assert TokenLayout(2, sizes) == TokenLayout(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((0, 3), ValueError, "frames"),
        ((-1, 3), ValueError, "frames"),
        ((2.0, 3), ValueError, "frames"),
        ((2, 0), ValueError, "tokens_per_frame"),
        ((2, [3, 0]), ValueError, "tokens_per_frame"),
        ((2, [3]), ValueError, "tokens_per_frame"),
        ((2, [3, 4, 5]), ValueError, "tokens_per_frame"),
        ((2, 3.5), TypeError, "tokens_per_frame"),
        ((2, [3, 3.5]), TypeError, "tokens_per_frame"),  # was cut to 3
        ((2, None), TypeError, "tokens_per_frame"),
        ((2, "33"), TypeError, "tokens_per_frame"),
        ((2, 3, -1), ValueError, "special_tokens"),
        ((2, 3, 1.0), ValueError, "special_tokens"),
        ((2, 3, 4), ValueError, "tokens_per_frame"),
    ],
)
def test_layout_errors(arguments, error, name):
    with pytest.raises(error, match=f"^{name} must be"):
        TokenLayout(*arguments)


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 5), (4,), (1, 1, 1, 4)])
def test_patch_scores_that_do_not_add_up(shape):
    with pytest.raises(ValueError, match=r"^patch_scores must have 4 patch scores a batch item for TokenLayout"):
        TokenLayout(2, 3, 1).token_scores(torch.rand(shape))


def test_patch_tokens_of_another_length():
    with pytest.raises(ValueError, match=r"^tokens must have 6 entries along dim 1, got 5"):
        TokenLayout(2, 3).patch_tokens(torch.rand(1, 5))


# --- what visibilities refuse -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"window": 0}, "window"),
        ({"window": 1.5}, "window"),
        ({"sinks": -1}, "sinks"),
        ({"sinks": None}, "sinks"),
        ({"first_query_frame": -1}, "first_query_frame"),
        ({"first_query_frame": 4}, "first_query_frame"),
        ({"first_query_frame": 0.0}, "first_query_frame"),
    ],
)
def test_frame_causal_errors(options, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        Visibility.frame_causal(TokenLayout(4, 3), **options)


@pytest.mark.parametrize("bad", [[], [0], [1, 3], [0, 3, 2], [[0, 3]]])
@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seqlens_k"])
def test_packed_errors(bad, name):
    with pytest.raises(ValueError, match=f"^{name} must be a non-decreasing 1-D sequence that starts at 0"):
        Visibility.packed(**{"cu_seqlens": [0, 3], name: bad})


def test_packed_takes_integers_only():
    with pytest.raises(TypeError, match=r"^cu_seqlens must hold integers, got torch\.float32"):
        Visibility.packed([0, 2.5, 4])


def test_packed_counts_must_agree():
    with pytest.raises(ValueError, match=r"^cu_seqlens_k must describe as many sequences as cu_seqlens \(2\), got 1"):
        Visibility.packed([0, 2, 4], [0, 4])


@pytest.mark.parametrize(
    ("start", "end", "sink", "error", "match"),
    [
        (torch.tensor([0.0]), torch.tensor([1]), 0, TypeError, "^start must be an integer tensor, got torch.float32"),
        ([0], torch.tensor([1]), 0, TypeError, "^start must be an integer tensor, got list"),
        (torch.tensor([0]), torch.tensor([True]), 0, TypeError, "^end must be an integer tensor, got torch.bool"),
        (torch.tensor([0]), torch.tensor([1]), 0.5, TypeError, "^sink_end must be an integer tensor"),
        (torch.tensor(0), torch.tensor([1]), 0, ValueError, r"^start must have shape \[Nq\] or \[B, Nq\]"),
        (torch.tensor([0]), torch.tensor([[[1]]]), 0, ValueError, r"^end must have shape"),
        (torch.zeros(3).long(), torch.ones(4).long(), 0, ValueError, "^start, end and sink_end must have matching"),
        (torch.tensor([-1]), torch.tensor([1]), 0, ValueError, "^intervals must not be negative, got a bound of -1"),
        (torch.tensor([0]), torch.tensor([2**31]), 0, ValueError, "^intervals must fit into int32"),
    ],
)
def test_interval_errors(start, end, sink, error, match):
    with pytest.raises(error, match=match):
        Visibility.intervals(start, end, sink)


def call(visible, batch=2, queries=6, keys=6):
    q, k, v = (torch.randn(batch, 1, n, 4) for n in (queries, keys, keys))
    return gated_attention(q, k, v, visible=visible)


@pytest.mark.parametrize(
    ("visible", "match"),
    [
        (lambda: Visibility.per_frame(TokenLayout(2, 4)), "must describe Nq=6 queries"),
        (lambda: Visibility.packed([0, 6], [0, 5]), "describes 5 keys, but k has Nk=6"),
        (lambda: Visibility.frame_causal(TokenLayout(3, 3), first_query_frame=1), "describes 9 keys"),
        (lambda: Visibility.intervals(torch.zeros(6).long(), torch.full((6,), 7)), "intervals up to key 7"),
        (lambda: Visibility.intervals(torch.zeros(6).long(), torch.full((6,), 6), 9), "intervals up to key 9"),
        (lambda: Visibility.intervals(torch.zeros(3, 6).long(), torch.ones(3, 6).long()), "a batch of 1 or 2"),
    ],
)
def test_a_visibility_of_other_tokens(visible, match):
    with pytest.raises(ValueError, match=f"^visible .*{match}"):
        call(visible())


@pytest.mark.parametrize("bad", [torch.ones(6, 6, dtype=torch.bool), "full", TokenLayout(2, 3)])
def test_not_a_visibility(bad):
    with pytest.raises(TypeError, match=r"^visible must be a Visibility or None, got"):
        call(bad)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_the_same(clone):
    visible = Visibility.frame_causal(TokenLayout(3, 2), window=2)
    other = clone(visible)
    assert torch.equal(other.bounds, visible.bounds)
    assert (other.key_extent, other.num_keys) == (visible.key_extent, visible.num_keys)
    assert repr(other) == repr(visible)
    assert repr(clone(Visibility.full())) == "Visibility(full)"
    assert clone(TokenLayout(2, [3, 4], 1)) == TokenLayout(2, [3, 4], 1)


def test_rows_and_rows_of_another():
    layout = TokenLayout(3, 2)
    visible = Visibility.frame_causal(layout, window=1, sinks=1)
    dense = visible.dense(6, 6)
    kept = visible.rows([5, 0, 5])
    assert torch.equal(kept.dense(3, 6), dense[:, [5, 0, 5]])
    assert (kept.num_keys, kept.key_extent) == (6, 6)
    assert visible.bounds.shape == (1, 3, 6)  # untouched
    every = Visibility.intervals(torch.zeros(2, dtype=torch.long), torch.full((2,), 6))
    both = visible.with_rows(every)
    assert torch.equal(both.dense(8, 6), torch.cat((dense, torch.ones(1, 2, 6, dtype=torch.bool)), dim=1))
    assert both.num_keys == 6
    two = Visibility.intervals(torch.tensor([[0], [1]]), torch.tensor([[4], [5]]))
    assert torch.equal(visible.with_rows(two).dense(7, 6)[1], torch.cat((dense[0], two.dense(1, 6)[1])))
    full = Visibility.full()
    assert full.rows([3]) is full
    for bad in ([6], [-1], [[0]]):
        with pytest.raises(ValueError, match=r"index must be 1-D with entries in \[0, 6\)"):
            visible.rows(bad)
    for bad, match in ((full, "got a full one"), (Visibility.per_frame(TokenLayout(2, 2)), "got 4 keys for 6")):
        with pytest.raises(ValueError, match=match):
            visible.with_rows(bad)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (2, 0), (2, 1)])
def test_token_causal(window, sinks):
    layout = TokenLayout(4, (3, 1, 4, 2))
    causal = Visibility.frame_causal(layout, window, sinks)
    got = Visibility.token_causal(layout, window, sinks)
    assert torch.equal(got.dense(10, 10), causal.dense(10, 10) & torch.ones(10, 10, dtype=torch.bool).tril())
    assert (got.num_keys, got.key_extent) == (10, 10)


@pytest.mark.parametrize("made", ["inference", "fake"])
def test_a_copy_kept_by_one_call_serves_every_other(made):
    """On another device: a fake one holds nothing, one made in inference mode cannot be trained with."""
    visible, other = Visibility.per_frame(TokenLayout(2, 3)), torch.device("meta")
    with torch.inference_mode() if made == "inference" else FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(visible.bounds_on(other), FakeTensor) == (made == "fake")
    kept = visible.bounds_on(other)
    assert not isinstance(kept, FakeTensor)
    assert not kept.is_inference()
    assert visible.bounds_on(other) is kept


def test_a_visibility_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        visible = Visibility.per_frame(TokenLayout(2, 3))
        assert visible.bounds_on(torch.device("cpu")).is_inference()
    q = torch.randn(1, 2, 6, 8, requires_grad=True)
    gated_attention(q, q, q, visible=visible).sum().backward()
    assert q.grad.isfinite().all()
    assert not visible.bounds_on(torch.device("meta")).is_inference()
