"""Closed-form logit moments against materialised float64 logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gate4d import TokenLayout, Visibility, logit_moments
from gate4d.statistics import logits as module
from gate4d.statistics.logits import mean_logits

DIMS = {"heads": 1, "queries": 2, "keys": 3}
OVERS = [("keys",), ("queries",), ("heads", "keys"), ("heads", "queries"), ("keys", "queries"), tuple(DIMS)]


def features(batch, heads, nq, nk, dim, seed=0, offset=0.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, heads, n, dim, generator=generator, dtype=dtype) for n in (nq, nk))
    return q + 0.3, k + offset + 0.2 * torch.randn(dim, generator=generator, dtype=dtype)


def materialised(q, k, over, visible=None, scale=None):
    """Mean, variance and count from the full float64 map."""
    s = q.double() @ k.double().mT * (q.shape[3] ** -0.5 if scale is None else scale)
    mask = torch.ones_like(s, dtype=torch.bool)
    if visible is not None:
        mask &= visible.dense(q.shape[2], k.shape[2])[:, None]
    dims = [DIMS[axis] for axis in over]
    count = mask.sum(dims)
    mean = torch.where(mask, s, 0.0).sum(dims, keepdim=True) / mask.sum(dims, keepdim=True).clamp_min(1)
    variance = torch.where(mask, s - mean, 0.0).square().sum(dims) / (count - 1).clamp_min(1)
    return mean.squeeze(dims), variance, count


def check(moments, expected, relative=1e-5):
    mean, variance, count = expected
    assert moments.mean.shape == mean.shape
    assert torch.equal(moments.count, count)
    for got, want in ((moments.mean, mean), (moments.variance().nan_to_num(), torch.where(count > 1, variance, 0.0))):
        assert torch.isfinite(got).all()
        # Means may cross zero, so they are compared on the scale of the logits' spread.
        slack = relative * (want.abs() + (variance.sqrt() if want is mean else 0.0))
        assert ((got.double() - want).abs() <= slack).all(), ((got - want).abs() / slack).max()


SHAPES = {  # one frame's tokens, fewer heads
    "VGGT": (1, 4, 1041, 1041, 64),
    "DUSt3R": (2, 4, 576, 576, 64),
    "CUT3R": (1, 4, 768, 577, 48),
    "one": (1, 1, 1, 1, 8),
}


@pytest.mark.parametrize("over", OVERS, ids="+".join)
@pytest.mark.parametrize("name", SHAPES)
def test_full(name, over):
    q, k = features(*SHAPES[name])
    check(logit_moments(q, k, over=over), materialised(q, k, over))


@pytest.mark.parametrize("over", OVERS, ids="+".join)
def test_strided_views_low_precision_and_scale(over):
    qkv = torch.randn(2, 100, 3, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    check(logit_moments(q, k, over=over, scale=0.7), materialised(q, k, over, scale=0.7))


@pytest.mark.parametrize("over", OVERS, ids="+".join)
def test_a_large_common_offset_does_not_destroy_the_variance(over):
    q, k = features(1, 3, 200, 300, 64, offset=1000.0)
    check(logit_moments(q, k, over=over), materialised(q, k, over))


def test_queries_orthogonal_to_the_spread_of_the_keys():
    # Keys vary by 1000 along one direction, by 1 along the others; the query sees only the others. In fp32 the
    # quadratic form would lose 6 of 7 digits.
    q, k = features(1, 1, 64, 500, 16)
    k = k + 1000 * torch.randn(500, 1) * torch.eye(16)[0]
    q[..., 0] = 0
    check(logit_moments(q, k, over=("keys",)), materialised(q, k, ("keys",)))


LAYOUT = TokenLayout(4, [30, 41, 25, 30], 5)
VISIBLE = {
    "per_frame": Visibility.per_frame(LAYOUT),
    "causal": Visibility.frame_causal(LAYOUT),
    "window": Visibility.frame_causal(LAYOUT, window=2, sinks=1),
    "nothing": Visibility.intervals(torch.zeros(126, dtype=torch.long), torch.zeros(126, dtype=torch.long)),
    "per_item": Visibility.intervals(
        torch.arange(126).repeat(2, 1) // 40 * torch.tensor([[10], [25]]), torch.full((2, 126), 90), 7
    ),
}


@pytest.mark.parametrize("over", OVERS, ids="+".join)
@pytest.mark.parametrize("name", VISIBLE)
def test_visible(name, over):
    q, k = features(2, 2, 126, 126, 32, offset=3.0)
    check(logit_moments(q, k, over=over, visible=VISIBLE[name]), materialised(q, k, over, VISIBLE[name]))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_intervals(data):
    nq, nk = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 15))
    bound = st.lists(st.integers(0, nk), min_size=nq, max_size=nq).map(torch.tensor)
    visible = Visibility.intervals(data.draw(bound), data.draw(bound), data.draw(bound))
    q, k = features(1, 2, nq, nk, 4, seed=data.draw(st.integers(0, 99)), dtype=torch.float64)
    over = data.draw(st.sampled_from(OVERS))
    check(logit_moments(q, k, over=over, visible=visible), materialised(q, k, over, visible))


@pytest.mark.parametrize("over", OVERS, ids="+".join)
@pytest.mark.parametrize(("nq", "nk"), [(6, 0), (0, 6), (0, 0)])
@pytest.mark.parametrize("batch", [1, 2])
def test_no_keys_or_no_queries(over, nq, nk, batch):
    q, k = features(2, 3, nq, nk, 8)
    zeros = torch.zeros(batch, nq, dtype=torch.long)
    plain = logit_moments(q, k, over=over)
    got = logit_moments(q, k, over=over, visible=Visibility.intervals(zeros, zeros))
    for x, y in ((got.count, plain.count), (got.mean, plain.mean), (got.m2, plain.m2)):
        assert torch.equal(x, y)
        assert not x.any()
    with pytest.raises(ValueError, match="visible"):
        logit_moments(
            q, k, over=over, visible=Visibility.intervals(torch.zeros(nq + 2).long(), torch.zeros(nq + 2).long())
        )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_algebra(seed):
    """Permuting keys changes nothing over keys; a common component moves only the mean; batches and layers merge."""
    q, k = features(2, 2, 20, 30, 8, seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    full = logit_moments(q, k, over=("keys",))
    permuted = logit_moments(q, k[:, :, torch.randperm(30, generator=generator)], over=("keys",))
    torch.testing.assert_close(permuted.mean, full.mean)
    torch.testing.assert_close(permuted.m2, full.m2)

    common = torch.randn(8, generator=generator, dtype=torch.float64)
    shifted = logit_moments(q, k + common, over=("keys",))
    torch.testing.assert_close(shifted.m2, full.m2)
    torch.testing.assert_close(shifted.mean - full.mean, 8**-0.5 * (q @ common))

    split = logit_moments(q[:1], k[:1], over=("keys",)), logit_moments(q[1:], k[1:], over=("keys",))
    torch.testing.assert_close(torch.cat([s.m2 for s in split]), full.m2)
    heads = logit_moments(q, k, over=("heads", "keys"))
    merged = logit_moments(q[:, :1], k[:, :1], over=("heads", "keys")).merge(
        logit_moments(q[:, 1:], k[:, 1:], over=("heads", "keys"))
    )
    torch.testing.assert_close(merged.m2, heads.m2)
    halves = [logit_moments(q, part, over=("keys",)) for part in (k[:, :, :11], k[:, :, 11:])]
    torch.testing.assert_close(halves[0].merge(halves[1]).variance(), full.variance())


@pytest.mark.parametrize("over", OVERS, ids="+".join)
def test_mean_alone(over):
    q, k = features(2, 3, 50, 70, 16)
    torch.testing.assert_close(mean_logits(q, k, over=over), logit_moments(q, k, over=over).mean)


def test_gradients_flow():
    q, k = features(1, 2, 6, 7, 4, dtype=torch.float64)
    visible = Visibility.packed([0, 2, 6], [0, 3, 7])
    for v in (None, visible):
        call = lambda q, k, v=v: logit_moments(q, k, over=("heads", "keys"), visible=v).finalize()  # noqa: E731
        assert torch.autograd.gradcheck(call, (q.requires_grad_(), k.requires_grad_()))


def test_bad_arguments_are_named(monkeypatch):
    q, k = features(1, 2, 6, 7, 4)
    with pytest.raises(ValueError, match="the map itself"):
        logit_moments(q, k, over=("heads",))
    for over in ((), "keys", ("keys", "layers")):
        with pytest.raises(ValueError, match="over must be"):
            logit_moments(q, k, over=over)
    with pytest.raises(ValueError, match="k must have q's B, H and D"):
        logit_moments(q, k[..., :3], over=("keys",))
    with pytest.raises(ValueError, match=r"q must be a floating tensor \[B, H, N, D\]"):
        logit_moments(q[0], k, over=("keys",))
    with pytest.raises(TypeError, match="k must have q's dtype"):
        logit_moments(q, k.double(), over=("keys",))
    monkeypatch.setattr(module, "MAX_INTERVALS", 3)
    with pytest.raises(NotImplementedError, match="6 distinct intervals"):
        logit_moments(q, k, over=("keys",), visible=Visibility.intervals(torch.arange(6), torch.arange(6) + 1))
