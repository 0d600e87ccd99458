"""MoRe's losses against their formulas, written out in float64, and the memory of the attention forcing."""

import itertools
import math

import pytest
import torch
from helpers.accuracy import assert_accurate, assert_accurate_gradient
from torch.utils._python_dispatch import TorchDispatchMode

from gate4d import TokenLayout, Visibility
from gate4d.methods.losses import (
    ForcedAttention,
    MoreRecipe,
    attention_forcing,
    camera_attention,
    confidence_regression,
    motion_bce,
    relative_pose,
    static_scores,
)

HEADS, DIM = 2, 8


def forcing_inputs(layout, batch=2, dtype=torch.float32):
    q, k = (torch.randn(batch, HEADS, layout.num_tokens, DIM, dtype=dtype) for _ in "qk")
    static = torch.rand(batch, layout.num_tokens - layout.frames * layout.special_tokens, dtype=dtype)
    return q, k, static


def forcing_restated(q, k, static, layout, form, threshold, penalise, seen, scale=None):
    """The formula, token by token, from the whole map; ``seen`` is a dense bool mask."""
    scale = DIM**-0.5 if scale is None else scale
    weights = (q @ k.mT * scale).masked_fill(~seen, -math.inf).softmax(-1)
    total = 0.0
    for b, h, t in itertools.product(range(q.shape[0]), range(q.shape[1]), range(layout.frames)):
        row, pairs, number = layout.offsets[t], [], 0
        for frame in range(layout.frames):
            for i in range(layout.offsets[frame] + layout.special_tokens, layout.offsets[frame + 1]):
                s = static[b, number] if penalise == "static" else 1 - static[b, number]
                number += 1
                if seen[row, i]:
                    pairs.append((s, weights[b, h, row, i]))
        if form == "kl":
            wanted = sum(1 - s for s, _ in pairs)
            terms = [(1 - s) / wanted * (((1 - s) / wanted).log() - alpha.log()) for s, alpha in pairs if s < 1]
            total = total + sum(terms)
            continue
        terms = {
            "product": lambda s, alpha: s * alpha,
            "score hinge": lambda s, alpha: (s - threshold).clamp_min(0) * alpha,
            "attention hinge": lambda s, alpha: s * (alpha - threshold).clamp_min(0),
        }
        total = total + sum(terms[form](*pair) for pair in pairs) / len(pairs)
    return total / (q.shape[0] * q.shape[1] * layout.frames)


FORCINGS = [("product", None), ("score hinge", 0.4), ("attention hinge", 0.04), ("kl", None)]


@pytest.mark.parametrize(("form", "threshold"), FORCINGS)
@pytest.mark.parametrize("penalise", ["dynamic", "static"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("causal", [None, {}, {"window": 2, "sinks": 1}])
def test_attention_forcing_is_its_formula(form, threshold, penalise, ragged, causal):
    layout = TokenLayout(4, (5, 7, 4, 6) if ragged else 5, special_tokens=2)
    visible = None if causal is None else Visibility.frame_causal(layout, **causal)
    n = layout.num_tokens
    seen = torch.ones(n, n, dtype=torch.bool) if visible is None else visible.dense(n, n)[0]
    q, k, static = forcing_inputs(layout)

    def run(dtype, restated):
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in (q, k, static)]
        if restated:
            loss = forcing_restated(*leaves, layout, form, threshold, penalise, seen)
        else:
            loss = attention_forcing(
                *leaves, layout=layout, form=form, threshold=threshold, penalise=penalise, visible=visible
            )
        loss.backward()
        return loss.detach(), *(x.grad for x in leaves)

    got, exact, baseline = run(torch.float32, False), run(torch.float64, True), run(torch.float32, True)
    assert_accurate("loss", got[0], exact[0], baseline[0])
    for name, *x in zip("qks", got[1:], exact[1:], baseline[1:], strict=True):
        assert_accurate_gradient(name, *x)
    other = next(layout.offsets[t] + 1 for t in range(1, 4))  # a register token: no camera row, no gradient of q
    assert not got[1][:, :, other].any()


@pytest.mark.parametrize("form", ["product", "score hinge", "attention hinge", "kl"])
def test_attention_forcing_pulls_attention_off_what_it_penalises(form):
    threshold = {"score hinge": 0.5, "attention hinge": 0.02}.get(form)
    layout = TokenLayout(3, 6, special_tokens=1)
    q, k, _ = forcing_inputs(layout, batch=1)
    static = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]).repeat(1, 3, 1)

    def on_dynamic(q, k):
        alpha = camera_attention(q[:, :, ::6], k)
        return (alpha * layout.token_scores(1 - static)).sum(-1).mean()

    for penalise, sign in (("dynamic", -1), ("static", 1)):
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        loss = attention_forcing(*leaves, static, layout=layout, form=form, threshold=threshold, penalise=penalise)
        loss.backward()
        moved = [x.detach() - 20 * x.grad for x in leaves]
        assert (on_dynamic(*moved) - on_dynamic(q, k)) * sign > 1e-3


@pytest.mark.parametrize(("form", "threshold"), FORCINGS)
def test_attention_forcing_holds_the_camera_rows_only(form, threshold):
    """No operation, forward or backward, makes more than the camera rows or a gradient of q or k."""
    layout = TokenLayout(12, 32, special_tokens=2)
    q, k, static = (x.requires_grad_() for x in forcing_inputs(layout, batch=1))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            tensors = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
            largest = max([largest, *(x.untyped_storage().nbytes() for x in tensors)])
            return out

    with Watch():
        visible = Visibility.frame_causal(layout)
        options = {"form": form, "threshold": threshold}
        attention_forcing(q, k, static, layout=layout, visible=visible, **options).backward()
    assert largest == 4 * HEADS * layout.frames * layout.num_tokens  # frames > DIM: more than a gradient of q or k


def test_a_camera_that_sees_nothing_pays_nothing():
    q, k = torch.randn(1, 1, 2, DIM, requires_grad=True), torch.randn(1, 1, 5, DIM, requires_grad=True)
    visible = Visibility.intervals(torch.tensor([0, 3]), torch.tensor([4, 3]))
    alpha = camera_attention(q, k, visible=visible)
    assert not alpha[0, 0, 1].any()
    assert not alpha[0, 0, 0, 4]
    torch.testing.assert_close(alpha[0, 0, 0].sum(), torch.tensor(1.0))
    alpha.square().sum().backward()
    assert q.grad.isfinite().all()
    assert k.grad.isfinite().all()
    assert not q.grad[0, 0, 1].any()


def test_the_default_is_the_camera_row_of_a_frame_block():
    """The authors' code in plain torch: pooled motion times the row of the softmax within the frame, and the mean."""
    batch, frames, patch, special, tokens = 2, 3, 2, 5, 5 + 6
    motion = torch.rand(batch, frames, 4, 6) > 0.5
    q, k = (torch.randn(batch * frames, HEADS, tokens, DIM).double().requires_grad_() for _ in "qk")
    row = (q[:, :, :1] * DIM**-0.5 @ k.mT).softmax(-1)  # [B * T, H, 1, P]
    moving = torch.nn.functional.avg_pool2d(motion.double().flatten(0, 1), patch).flatten(1)
    exact = (moving[:, None, None] * row[..., special:]).mean()
    layout = TokenLayout(1, tokens, special)
    targets = {"motion": motion}
    forced = ForcedAttention({23: (q, k)}, layout, patch=patch)
    total, terms = MoreRecipe().loss({}, targets, forced)
    torch.testing.assert_close(terms["forcing"], exact.detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(total, 0.01 * exact, rtol=1e-7, atol=0)
    for got, want in zip(torch.autograd.grad(total, (q, k)), torch.autograd.grad(0.01 * exact, (q, k)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)
    # the same of a clip's tokens, where every frame sees itself
    whole = TokenLayout(frames, tokens, special)
    flat = [x.detach().unflatten(0, (batch, frames)).transpose(1, 2).flatten(2, 3) for x in (q, k)]
    forced = ForcedAttention({23: tuple(flat)}, whole, Visibility.per_frame(whole), patch)
    torch.testing.assert_close(MoreRecipe().loss({}, targets, forced)[1]["forcing"], exact.detach(), rtol=1e-7, atol=0)


def test_kl_where_attention_underflows_and_where_nothing_is_static():
    layout = TokenLayout(1, 4, special_tokens=1)
    q, k = torch.zeros(1, 1, 4, DIM), torch.zeros(1, 1, 4, DIM)
    q[..., 0], k[..., 2, 0] = 1.0, -1000.0
    q.requires_grad_()
    half = torch.tensor([[[1.0, 1.0, 0.0]]])
    loss = attention_forcing(q, k, half, layout=layout, form="kl")
    exact = -math.log(2) + math.log(3) + 0.5 * 1000 * DIM**-0.5
    torch.testing.assert_close(loss.detach(), torch.tensor(exact))
    loss.backward()
    assert q.grad.isfinite().all()
    assert q.grad[0, 0, 0, 0] > 0
    assert attention_forcing(q, k, torch.zeros(1, 1, 3), layout=layout, form="kl") == 0


def test_static_scores_pool_patches():
    motion = torch.zeros(2, 4, 6, dtype=torch.bool)
    motion[0, 0, 0] = motion[0, 3, 5] = motion[1, :2, 2:4] = True
    expected = torch.ones(2, 6)
    expected[0, 0] = expected[0, 5] = 0.75
    expected[1, 1] = 0
    assert torch.equal(static_scores(motion, 2), expected)
    assert torch.equal(static_scores(motion.double(), 2), expected.double())
    with pytest.raises(ValueError, match="patch=4"):
        static_scores(motion, 4)


def test_confidence_regression_and_motion_bce():
    prediction, target = torch.randn(2, 2, 3, 4, 3).double()
    confidence = torch.rand(2, 3, 4).double() + 0.5
    valid = torch.rand(2, 3, 4) > 0.3
    spoilt = target.masked_fill(~valid[..., None], math.nan)
    each = [
        confidence[i] * (prediction[i] - target[i]).square().sum() - 0.3 * confidence[i].log()
        for i in itertools.product(range(2), range(3), range(4))
        if valid[i]
    ]
    leaf = prediction.requires_grad_()
    got = confidence_regression(leaf, spoilt, confidence, weight=0.3, valid=valid)
    torch.testing.assert_close(got, torch.stack(each).mean(), rtol=1e-13, atol=1e-13)
    got.backward()
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[~valid].any()
    flat = confidence_regression(prediction[..., 0], target[..., 0], confidence, weight=0.3)
    same = confidence_regression(prediction[..., :1], target[..., :1], confidence, weight=0.3)
    torch.testing.assert_close(flat, same, rtol=1e-13, atol=1e-13)
    nothing = confidence_regression(leaf, spoilt, confidence, weight=0.3, valid=torch.zeros_like(valid))
    assert nothing == 0
    assert nothing.requires_grad

    distances = [
        confidence[i] * (prediction[i] - target[i]).norm() - 0.3 * confidence[i].log()
        for i in itertools.product(range(2), range(3), range(4))
        if valid[i]
    ]
    got = confidence_regression(leaf, spoilt, confidence, weight=0.3, valid=valid, power=1)
    torch.testing.assert_close(got, torch.stack(distances).mean(), rtol=1e-13, atol=1e-13)
    leaf.grad = None
    confidence_regression(leaf, leaf.detach(), confidence, weight=0.3, power=1).backward()
    assert leaf.grad.isfinite().all()
    with pytest.raises(ValueError, match="power must be 1 or 2"):
        confidence_regression(prediction, target, confidence, weight=0.3, power=0)

    logits, motion = torch.randn(2, 3, 4).double() * 3, torch.rand(2, 3, 4) > 0.5
    p = logits.sigmoid()
    torch.testing.assert_close(motion_bce(logits, motion, valid), -torch.where(motion, p, 1 - p).log()[valid].mean())


def matrices(pose):
    x, y, z, w = torch.nn.functional.normalize(pose[..., 3:7], dim=-1).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    extrinsics = torch.eye(4, dtype=pose.dtype).repeat(*pose.shape[:2], 1, 1)
    extrinsics[..., :3, :3] = torch.stack([torch.stack(r, -1) for r in rows], -2)
    extrinsics[..., :3, 3] = pose[..., :3]
    return extrinsics


def test_relative_pose_is_its_formula_and_ignores_the_origin():
    pose, target = torch.randn(2, 2, 4, 9).double()

    def restated(pose, target):
        e, f = matrices(pose), matrices(target)
        angles, shifts = [], []
        for b in range(2):
            for i, j in itertools.permutations(range(4), 2):
                m, n = (x[b, j] @ torch.linalg.inv(x[b, i]) for x in (e, f))
                angles.append((((m[:3, :3].mT @ n[:3, :3]).trace() - 1) / 2).clamp(-1, 1).acos())
                shifts.append((m[:3, 3] - n[:3, 3]).norm())
        return torch.stack(angles).mean(), torch.stack(shifts).mean()

    exact = restated(pose, target)
    torch.testing.assert_close(relative_pose(pose, target), exact, rtol=1e-10, atol=1e-10)
    single = (pose.float(), target.float())
    for got, want, baseline in zip(relative_pose(*single), exact, restated(*single), strict=True):
        assert_accurate("relative pose", got, want, baseline)
    moved = torch.linalg.inv(matrices(pose)[:, :1])  # another origin for the prediction changes nothing
    shifted = matrices(pose) @ moved
    back = pose.clone()
    back[..., :3] = shifted[..., :3, 3]
    back[..., 3:7] = quaternions(shifted[..., :3, :3])
    torch.testing.assert_close(relative_pose(back, target), exact, rtol=1e-10, atol=1e-10)

    leaf = target.clone().requires_grad_()
    rotation, translation = relative_pose(leaf, target)
    assert rotation < 1e-7
    assert translation < 1e-12
    (rotation + translation).backward()
    assert leaf.grad.isfinite().all()
    assert relative_pose(pose[:, :1], target[:, :1]) == (0, 0)


def test_of_two_frames_the_earlier_gets_no_gradient():
    pose, target = torch.randn(2, 2, 4, 9).double()

    def gradient(only, **options):
        leaf = pose.clone().requires_grad_()
        sum(relative_pose(leaf, target, **options)).backward()
        return leaf.grad[:, only]

    def later_alone(frame):
        """Of the pairs with an earlier frame, this one's pose moves and the other's is given."""
        leaf = pose.clone().requires_grad_()
        total = 0.0
        for other in range(frame):
            ends = torch.stack((pose[:, other], leaf[:, frame]), dim=1)
            pair = torch.stack((target[:, other], target[:, frame]), dim=1)
            total = total + sum(relative_pose(ends, pair, detach_earlier=False)) * 2 / 12
        total.backward()
        return leaf.grad[:, frame]

    values = [relative_pose(pose, target, detach_earlier=x) for x in (True, False)]
    torch.testing.assert_close(*values, rtol=0, atol=0)
    assert not gradient(0).any()
    for frame in range(1, 4):
        torch.testing.assert_close(gradient(frame), later_alone(frame), rtol=1e-10, atol=1e-12)
    assert gradient(0, detach_earlier=False).any()


def quaternions(rotation):
    """By the eigenvector of the largest eigenvalue: slow, for any rotation."""
    m = rotation
    k = torch.zeros(*m.shape[:-2], 4, 4, dtype=m.dtype)
    for i in range(3):
        for j in range(3):
            k[..., i, j] = m[..., i, j] + m[..., j, i]
        k[..., i, i] -= m.diagonal(dim1=-2, dim2=-1).sum(-1)
    k[..., 3, 3] = m.diagonal(dim1=-2, dim2=-1).sum(-1)
    cross = (m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1])
    for i, c in enumerate(cross):
        k[..., i, 3] = k[..., 3, i] = c
    return torch.linalg.eigh(k).eigenvectors[..., -1]


def test_the_recipe_sums_what_it_names():
    batch, frames, side, patch = 2, 3, 8, 4
    layout = TokenLayout(frames, 5, special_tokens=1)
    visible = Visibility.frame_causal(layout)
    shape = (batch, frames, side, side)
    predictions = {
        "pose_enc": torch.randn(batch, frames, 9).requires_grad_(),
        "depth": torch.rand(*shape, 1).requires_grad_(),
        "depth_conf": (1 + torch.rand(shape)).requires_grad_(),
        "motion": torch.randn(shape).requires_grad_(),
        "world_points": torch.randn(*shape, 3).requires_grad_(),
        "world_points_conf": (1 + torch.rand(shape)).requires_grad_(),
    }
    targets = {"pose_enc": torch.randn(batch, frames, 9), "depth": torch.rand(shape), "motion": torch.rand(shape) > 0.5}
    targets |= {"world_points": torch.randn(*shape, 3), "valid": torch.rand(shape) > 0.3}
    layers = {n: (torch.randn(batch, HEADS, 15, DIM), torch.randn(batch, HEADS, 15, DIM)) for n in (0, 2)}
    attention = ForcedAttention(layers, layout, visible, patch)
    recipe = MoreRecipe(
        layers=(2,), forcing=7.0, form="score hinge", threshold=0.5, depth=3.0, certainty=0.4, points=2.0
    )
    total, terms = recipe.loss(predictions, targets, attention)
    rotation, translation = relative_pose(predictions["pose_enc"], targets["pose_enc"])
    static = static_scores(targets["motion"], patch)
    options = {"weight": 0.4, "valid": targets["valid"]}
    depth = confidence_regression(predictions["depth"][..., 0], targets["depth"], predictions["depth_conf"], **options)
    pair = predictions["world_points"], targets["world_points"]
    points = confidence_regression(*pair, predictions["world_points_conf"], **options)
    forcing = {"layout": layout, "form": "score hinge", "threshold": 0.5, "visible": visible}
    expected = {
        "pose": terms["pose"],
        "rotation": rotation,
        "translation": translation,
        "depth": depth,
        "motion": motion_bce(predictions["motion"], targets["motion"]),
        "points": points,
        "forcing": attention_forcing(*layers[2], static, **forcing),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach())
    weights = {"depth": 3.0, "points": 2.0, "forcing": 7.0}
    torch.testing.assert_close(total, sum(weights.get(name, 1.0) * value for name, value in expected.items()))
    total.backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in predictions.values())

    flipped = dict(targets, pose_enc=torch.cat((targets["pose_enc"][..., :3], -targets["pose_enc"][..., 3:7],
                                                targets["pose_enc"][..., 7:]), -1))  # fmt: skip
    torch.testing.assert_close(recipe.loss(predictions, flipped, attention)[0], total)
    assert recipe.loss(predictions, targets)[1].keys() == expected.keys() - {"forcing"}
    with pytest.raises(ValueError, match="share no term"):
        recipe.loss({"points": total}, targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"penalise": "both"}, "penalise must be one of"),
        ({"threshold": 1.0}, r"threshold must be in \[0, 1\)"),
        ({"threshold": None}, r"threshold must be in \[0, 1\) for form='score hinge', got None"),
        ({"form": "kl"}, "threshold has no effect with form='kl', got 0.5"),
        ({"form": "hinge"}, "form must be one of"),
        ({"layout": TokenLayout(3, 5)}, "must have a camera token"),
        ({"layout": TokenLayout(2, 5, 1)}, "q and k must be"),
        ({"visible": Visibility.frame_causal(TokenLayout(4, 5))}, "visible must describe 15 queries"),
    ],
)
def test_attention_forcing_refuses(change, message):
    layout = TokenLayout(3, 5, special_tokens=1)
    q, k, static = forcing_inputs(layout)
    with pytest.raises(ValueError, match=message):
        attention_forcing(q, k, static, **{"layout": layout, "form": "score hinge", "threshold": 0.5} | change)
