"""MotionGate's constructors against their formulas, and what they refuse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from gate4d import MotionGate, gated_attention


def weights(gate: MotionGate, queries: int, keys: int) -> torch.Tensor:
    """The weight ``[B, Nq, Nk]`` each unnormalised probability is multiplied with, by the definition."""
    batch = next(x.shape[0] for x in (gate.key_score, gate.dropped_keys, gate.output_scale) if x is not None)
    w = torch.ones(batch, queries, keys)
    if gate.key_score is not None:
        a = torch.ones(batch, queries) if gate.query_score is None else gate.query_score
        w = (1 - a[:, :, None] * gate.key_score[:, None, :]) ** gate.strength
    if gate.dropped_keys is not None:
        w = w * ~gate.dropped_keys[:, None, :]
    return w


@pytest.fixture
def motion() -> tuple[torch.Tensor, torch.Tensor]:
    query, key = torch.rand(2, 5), torch.rand(2, 7)
    query[0, 0], query[0, 1], key[1, 2], key[1, 3] = 0, 1, 0, 1
    return query, key


@pytest.mark.parametrize("strength", [0, 0.5, 1, 2, 1.7])
def test_pairwise(motion, strength):
    query, key = motion
    gate = MotionGate.pairwise(query, key, strength=strength)
    expected = torch.stack(
        [torch.stack([(1 - (1 - query[b, i]) * key[b]) ** strength for i in range(5)]) for b in range(2)]
    )
    torch.testing.assert_close(weights(gate, 5, 7), expected)
    assert gate.renormalize
    assert gate.strength == strength


def test_pairwise_with_itself(motion):
    query, _ = motion
    both, one = MotionGate.pairwise(query, query), MotionGate.pairwise(query)
    assert torch.equal(weights(one, 5, 5), weights(both, 5, 5))


@pytest.mark.parametrize("strength", [0, 0.5, 1, 3])
def test_keys(motion, strength):
    gate = MotionGate.keys(motion[1], strength=strength)
    assert torch.equal(weights(gate, 5, 7), ((1 - motion[1]) ** strength)[:, None].expand(2, 5, 7))


@pytest.mark.parametrize("strength", [0, 0.5, 1, 3])
def test_queries_scale_the_output(motion, strength):
    query = motion[0].requires_grad_()
    gate = MotionGate.queries(query, strength=strength)
    torch.testing.assert_close(gate.output_scale, (1 - query) ** strength, rtol=0, atol=0)
    assert gate.key_score is None
    assert gate.query_score is None
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    out = gated_attention(q, k, v, gate=gate, backend="reference")
    plain = gated_attention(q, k, v, backend="reference")
    torch.testing.assert_close(out, plain * gate.output_scale[:, None, :, None])


@pytest.mark.parametrize("strength", [0, 0.5, 1, 2])
def test_queries_have_a_finite_gradient_at_full_motion(strength):
    """The power's derivative at 0 is infinite below 1; as for the weights, it counts as 0."""
    motion = torch.tensor([[1.0, 0.5, 0.0]], requires_grad=True)
    MotionGate.queries(motion, strength=strength).output_scale.sum().backward()
    expected = torch.tensor([[-1.0 if strength == 1 else 0.0, -strength * 0.5 ** (strength - 1), -float(strength)]])
    torch.testing.assert_close(motion.grad, expected)


def test_drop_keys():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    gate = MotionGate.drop_keys(mask)
    assert torch.equal(weights(gate, 2, 3)[:, 0], (~mask).float())
    assert gate.dropped_keys is mask


@pytest.mark.parametrize("renormalize", [False, True])
def test_static_to_dynamic(renormalize):
    query, key = torch.tensor([[True, False]]), torch.tensor([[True, False, True]])
    gate = MotionGate.static_to_dynamic(query, key, renormalize=renormalize)
    assert torch.equal(weights(gate, 2, 3), torch.tensor([[[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]]))
    assert gate.renormalize is renormalize
    assert not MotionGate.static_to_dynamic(query).renormalize
    assert torch.equal(weights(MotionGate.static_to_dynamic(query), 2, 2), torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precision_of_scores(dtype):
    """Scores are fp32 whatever they came as; float64 stays, for checks of gradients."""
    gate = MotionGate.pairwise(torch.rand(1, 4).to(dtype))
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert gate.query_score.dtype == gate.key_score.dtype == kept


MOTION = {"pairwise": "query_motion", "keys": "key_motion", "queries": "query_motion"}
MASKS = {"drop_keys": "mask", "static_to_dynamic": "query_mask"}


@pytest.mark.parametrize(("kind", "name"), MOTION.items())
@pytest.mark.parametrize("bad", [-0.01, 1.01, float("nan"), float("inf"), -float("inf")])
def test_motion_outside_its_range(kind, name, bad):
    score = torch.rand(2, 5)
    score[1, 3] = bad
    with pytest.raises(ValueError, match=rf"^{name} must hold motion scores in \[0, 1\]"):
        getattr(MotionGate, kind)(score)


def test_the_second_argument_is_checked_and_named():
    score = torch.rand(2, 5)
    with pytest.raises(ValueError, match=r"^key_motion must hold motion scores"):
        MotionGate.pairwise(score, score + 1)
    with pytest.raises(TypeError, match=r"^key_mask must be a bool tensor, got a torch.float32"):
        MotionGate.static_to_dynamic(score > 0.5, score)


@pytest.mark.parametrize(("kind", "name"), MOTION.items())
@pytest.mark.parametrize("bad", [None, 0.5, [[0.5]], torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2).long()])
def test_motion_of_a_wrong_type(kind, name, bad):
    with pytest.raises(TypeError, match=rf"^{name} must be a floating-point tensor"):
        getattr(MotionGate, kind)(bad)


@pytest.mark.parametrize(("kind", "name"), [*MOTION.items(), *MASKS.items()])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 5)])
def test_wrong_rank(kind, name, shape):
    score = torch.rand(shape) if kind in MOTION else torch.rand(shape) > 0.5
    with pytest.raises(ValueError, match=rf"^{name} must have shape \[B, N\], got \[{', '.join(map(str, shape))}\]"):
        getattr(MotionGate, kind)(score)


@pytest.mark.parametrize(("kind", "name"), MASKS.items())
@pytest.mark.parametrize("bad", [None, [[True]], torch.rand(1, 2), torch.ones(1, 2).long()])
def test_mask_of_a_wrong_type(kind, name, bad):
    with pytest.raises(TypeError, match=rf"^{name} must be a bool tensor"):
        getattr(MotionGate, kind)(bad)


@pytest.mark.parametrize("kind", MOTION)
@pytest.mark.parametrize(
    ("bad", "error"),
    [(-1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("1", TypeError), (True, TypeError)],
)
def test_wrong_strength(kind, bad, error):
    with pytest.raises(error, match=r"^strength must be"):
        getattr(MotionGate, kind)(torch.rand(1, 3), strength=bad)


def call(gate, batch=2, queries=5, keys=7):
    q, k, v = (torch.randn(batch, 3, n, 8) for n in (queries, keys, keys))
    return gated_attention(q, k, v, gate=gate)


@pytest.mark.parametrize(
    ("gate", "field"),
    [
        (lambda: MotionGate.pairwise(torch.rand(2, 6), torch.rand(2, 7)), "query_score"),
        (lambda: MotionGate.pairwise(torch.rand(2, 5)), "key_score"),  # one motion for unequal sides
        (lambda: MotionGate.keys(torch.rand(1, 7)), "key_score"),  # another batch
        (lambda: MotionGate.queries(torch.rand(2, 7)), "output_scale"),
        (lambda: MotionGate.drop_keys(torch.rand(2, 5) > 0.5), "dropped_keys"),
    ],
)
def test_a_gate_of_other_tokens(gate, field):
    with pytest.raises(ValueError, match=rf"^gate\.{field} must have shape \[B, N[qk]\] = \[2, [57]\], got"):
        call(gate())


def test_a_gate_of_another_device():
    with pytest.raises(ValueError, match=r"^gate\.key_score must be on q's device cpu, got meta"):
        call(MotionGate(key_score=torch.rand(2, 7, device="meta")))


@pytest.mark.parametrize("bad", [1.0, "pairwise", torch.rand(2, 7)])
def test_not_a_gate(bad):
    with pytest.raises(TypeError, match=r"^gate must be a MotionGate or None, got"):
        call(bad)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"strength": -1.0}, ValueError),
        ({"strength": None}, TypeError),
        ({"key_score": torch.ones(2, 7).long()}, TypeError),
        ({"output_scale": 0.5}, TypeError),
        ({"dropped_keys": torch.rand(2, 7)}, TypeError),
        ({"dropped_keys": torch.rand(7) > 0.5}, ValueError),
    ],
)
def test_a_hand_made_gate_is_checked(fields, error):
    """The fields are public: a wrong type must not reach a kernel that reads memory."""
    with pytest.raises(error, match=f"^{next(iter(fields))} must"):
        MotionGate(**fields)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_compute_the_same(clone):
    torch.manual_seed(1)
    gate = MotionGate(torch.rand(2, 5), torch.rand(2, 7), torch.rand(2, 5), torch.rand(2, 7) > 0.8, 1.7, False)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    assert torch.equal(gated_attention(q, k, v, gate=clone(gate)), gated_attention(q, k, v, gate=gate))
