"""Easi3R on the stand-in of DUSt3R: every map, the masks and the second pass, materialised in float64."""

import importlib.util
import os
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.accuracy import assert_accurate
from standins import croco, vggt

import gate4d
from gate4d.methods.easi3r import window_pairs
from gate4d.methods.segmentation import patch_masks

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

GRID = (3, 4)
MAPS = ("dyn", "mean_i", "var_i", "mean_j", "var_j")


def build(dtype=torch.float32):
    torch.manual_seed(0)
    model = croco.Dust3rSteps().eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(1.5)
    return model.to(dtype)


def clip(frames=5):
    return torch.rand(frames, 3, GRID[0] * 16, GRID[1] * 16)


def by_definition(frames, window):
    return [(i, j) for i in range(frames) for j in range(frames) if 0 < abs(i - j) <= window]


def views(images, pair):
    shape = torch.tensor([images.shape[-2:]])
    return [{"img": images[i : i + 1] * 2 - 1, "true_shape": shape} for i in pair]


def materialised(model, images, pairs, dynamic=None):
    """All logits of all pairs, kept whole and reduced afterwards; probabilities zeroed where ``dynamic [T, P]`` says.

    The images of a pair are encoded within it. Returns predictions by pair, and the maps.
    """
    logits, current = {}, []
    for number, blocks in ((1, model.dec_blocks), (2, model.dec_blocks2)):
        for layer, block in enumerate(blocks):

            def forward(self, query, key, value, qpos, kpos, number=number, layer=layer):
                q, k, v = self.heads(query, key, value)
                s = self.turn(q, qpos) @ self.turn(k, kpos).mT * self.scale
                logits[current[0], number, layer] = s[0]
                p = s.softmax(-1)
                if number == 1 and dynamic is not None:
                    i, j = current[0]
                    p = p.masked_fill(~dynamic[i][:, None] & dynamic[j][None], 0.0)
                return self.finish(p @ v)

            block.cross_attn.forward = types.MethodType(forward, block.cross_attn)
    predictions = {}
    for pair in pairs:
        current[:] = [pair]
        predictions[pair] = model(*views(images, pair))
    for block in [*model.dec_blocks, *model.dec_blocks2]:
        del block.cross_attn.forward

    depth = len(model.dec_blocks)
    maps = {}
    for number, side, name in ((1, 1, "i"), (2, 0, "j")):
        means, deviations = [], []
        for image in range(len(images)):
            mine = [p for p in pairs if p[side] == image]
            x = torch.stack([torch.cat([logits[p, number, n].mean(1) for n in range(depth)]) for p in mine])
            x[..., 0] = (x[..., 1] + x[..., GRID[1]]) / 2  # [pairs, channels, P]
            means.append(x.mean(0))
            deviations.append(x.std(0))
        for kind, stacked in (("mean", means), ("var", deviations)):
            fused = spread(torch.stack(stacked), (0, 1, 2)).mean(1)
            maps[f"{kind}_{name}"] = spread(fused, (0, 1)).unflatten(1, GRID)
    dyn = (1 - maps["mean_i"]) * maps["var_i"] * maps["mean_j"] * (1 - maps["var_j"])
    return predictions, {"dyn": spread(dyn, (1, 2)), **maps}


def spread(x, dims):
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    return (x - low) / (high - low + 1e-6)


def assert_pass(name, got, pairs, exact, baseline):
    """Predictions and maps of a pass, then its masks from the exact maps wherever rounding cannot decide them."""
    for n, pair in enumerate(pairs):
        for ours, true, plain in zip(got.predictions[n], exact[0][pair], baseline[0][pair], strict=True):
            (key,) = true
            assert_accurate(f"{name}: {key} of {pair}", ours[key], true[key], plain[key])
    for field in MAPS:
        assert_accurate(f"{name}: {field}", getattr(got.maps, field), exact[1][field], baseline[1][field])
    labels, found = got.masks.labels, got.masks
    scores = []
    for maps in (exact[1], baseline[1]):
        dyn = maps["dyn"].flatten(1)
        means = torch.zeros_like(dyn)
        for n in labels.unique():
            means[labels == n] = dyn[labels == n].mean()
        patches = spread(means, (1,)).unflatten(1, GRID)[:, None]
        scores.append(F.interpolate(patches, size=found.masks.shape[1:], mode="bilinear")[:, 0])
    assert_accurate(f"{name}: scores", found.scores, *scores)
    off = 2 * (scores[1] - scores[0]).abs().max() + torch.finfo(torch.float32).eps  # what assert_accurate allows
    sure = (scores[0] - found.threshold).abs() > off
    assert sure.float().mean() > 0.99
    assert torch.equal(found.masks[sure], (scores[0] > found.threshold)[sure])


@pytest.mark.parametrize("window", [2, 5])
@torch.no_grad()
def test_against_everything_materialised(window):
    images, model, exact_model = clip(), build(), build(torch.float64)
    encoded = []
    hook = model.enc_norm.register_forward_hook(lambda _, args, out: encoded.append(len(out)))
    with gate4d.patch(model, method="easi3r", pair_window=window, pair_stride=1, clusters=10) as handle:
        result = handle.run(images)
    hook.remove()
    assert sum(encoded) == len(images)  # the encoder saw every frame once
    assert sorted(result.pairs) == by_definition(len(images), window)

    first = materialised(exact_model, images.double(), result.pairs), materialised(model, images, result.pairs)
    assert_pass("first", result.first, result.pairs, *first)
    dynamic = patch_masks(result.first.masks.masks, GRID)
    assert 0 < dynamic.float().mean() < 1
    second = [materialised(m, x, result.pairs, dynamic) for m, x in ((exact_model, images.double()), (model, images))]
    assert_pass("second", result, result.pairs, *second)
    gated = [p for p in result.pairs if (~dynamic[p[0]]).any() and dynamic[p[1]].any()]
    moved = [(second[0][0][p][0]["pts3d"] - first[0][0][p][0]["pts3d"]).abs().max() for p in gated]
    assert gated
    assert max(moved) > 1e-3  # the masks do change the points
    assert torch.equal(result.masks.labels, result.first.masks.labels)


@torch.no_grad()
def test_batches_give_what_pairs_alone_give():
    model, images = build(), clip(4)
    with gate4d.patch(model, method="easi3r", clusters=6) as handle:
        alone = handle.run(images)
    with gate4d.patch(model, method="easi3r", clusters=6, batch=5, keep=lambda one, two: one["pts3d"]) as handle:
        together = handle.run(list(images))
    assert torch.equal(alone.first.masks.masks, together.first.masks.masks)
    for got, expected in zip(together.predictions, alone.predictions, strict=True):
        torch.testing.assert_close(got, expected[0]["pts3d"])
    for field in MAPS:
        torch.testing.assert_close(getattr(together.maps, field), getattr(alone.maps, field))


@torch.no_grad()
def test_switches_change_what_they_should_and_nothing_stays():
    model, images = build(), clip(5)
    plain = model(*views(images, (0, 3)))
    options = {"clusters": 6}
    with gate4d.patch(model, method="easi3r", **options) as handle:
        usual, again = handle.run(images), handle.run(images[None])
        assert all(r.control.gate is None and not r.control.observers for r in handle.table)
        assert "_encode_symmetrized" not in model.__dict__
        patched = model(*views(images, (0, 3)))
    first = usual.first.predictions[usual.pairs.index((0, 3))]
    for own, ours in zip(patched, first, strict=True):  # the first pass is the plain model
        assert all(torch.equal(own[key], ours[key]) for key in own)
    for own, now in zip(plain, model(*views(images, (0, 3))), strict=True):
        assert all(torch.equal(own[key], now[key]) for key in own)
    assert torch.equal(usual.masks.masks, again.masks.masks)

    def run(**more):
        with gate4d.patch(model, method="easi3r", **{**options, **more}) as handle:
            return handle.run(images)

    def same_maps(a, b):
        return all(torch.equal(getattr(a.first.maps, f), getattr(b.first.maps, f)) for f in MAPS)

    coarse = run(clusters=2)
    assert same_maps(coarse, usual)
    assert coarse.masks.labels.unique().numel() == 2
    assert len(run(pair_window=2, pair_stride=1).pairs) == 14
    assert len(run(pair_window=2).pairs) == 12
    own = run(features=lambda x: x.unfold(2, 16, 16).unfold(3, 16, 16).mean((-1, -2)).flatten(2).mT)
    assert same_maps(own, usual)
    assert not torch.equal(own.masks.labels, usual.masks.labels)
    ring = run(pair_window=2, pair_stride=1, symmetric=False, cyclic=True)
    assert ring.pairs == [(i, (i + n) % 5) for i in range(5) for n in (1, 2)]
    assert sorted(run(pair_window=2, pair_stride=1, cyclic=True).pairs) == [
        (i, j) for i in range(5) for j in range(5) if i != j
    ]


@torch.no_grad()
def test_the_fork_of_the_authors_serves_as_well():
    class Fork(croco.Easi3r):
        _encode_image, encode = croco.Dust3rSteps._encode_image, None
        _encode_symmetrized = croco.Dust3rSteps._encode_symmetrized

        def __init__(self):
            super().__init__()
            self.patch_embed.patch_size = 16

        def forward(self, view1, view2):
            _, feats, positions = self._encode_symmetrized(view1, view2)
            known = iter([(self.decoder_embed(f), p) for f, p in zip(feats, positions, strict=True)])
            self.encode = lambda image: next(known)
            return super().forward(view1, view2)

    torch.manual_seed(0)
    fork, images = Fork().eval(), clip(3)
    with gate4d.patch(fork, method="easi3r", clusters=6) as handle:
        result = handle.run(images)
    masks = patch_masks(result.first.masks.masks, GRID)
    pair = max(result.pairs, key=lambda p: (~masks[p[0]]).float().sum() * masks[p[1]].sum())
    theirs = views(images, pair)
    for view, image in zip(theirs, pair, strict=True):
        view["atten_mask"] = result.first.masks.masks[image : image + 1]
    expected = fork(*theirs)[0]["pts3d"]
    got = result.predictions[result.pairs.index(pair)][0]["pts3d"]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    before = result.first.predictions[result.pairs.index(pair)][0]["pts3d"]
    assert (got - before).abs().max() > 100 * (got - expected).abs().max()


@torch.no_grad()
def test_clips_without_contrast_have_finite_masks(monkeypatch):
    model, images = build(), clip(3)
    with (
        gate4d.patch(model, method="easi3r") as handle,
        pytest.warns(UserWarning, match="the masks are"),
    ):
        still = handle.run(torch.full_like(images, 0.5))
    assert still.masks.masks.unique().numel() == 1
    assert torch.isfinite(still.masks.scores).all()

    from gate4d.methods import easi3r

    real = easi3r.dynamic_masks
    for fill in (False, True):  # nothing to look away from; nobody who would
        monkeypatch.setattr(
            easi3r,
            "dynamic_masks",
            lambda *a, fill=fill, **k: (m := real(*a, **k))._replace(masks=torch.full_like(m.masks, fill)),
        )
        with gate4d.patch(model, method="easi3r", clusters=6) as handle:
            result = handle.run(images)
        for ours, first in zip(result.predictions, result.first.predictions, strict=True):
            torch.testing.assert_close(ours[0]["pts3d"], first[0]["pts3d"])


@torch.no_grad()
def test_a_failed_pass_leaves_nothing_behind():
    model = build()
    with gate4d.patch(model, method="easi3r", clusters=6) as handle:
        hook = model.head2.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            handle.run(clip(3))
        hook.remove()
        assert not any(r.control.observers or r.control.gate for r in handle.table)
        assert "_encode_symmetrized" not in model.__dict__
        handle.run(clip(3))


def test_pairs():
    assert window_pairs(3, 1) == [(0, 1), (1, 2), (1, 0), (2, 1)]
    assert window_pairs(3, 9, symmetric=False) == [(0, 1), (0, 2), (1, 2)]
    assert window_pairs(1) == []
    assert sorted(window_pairs(7, 3)) == by_definition(7, 3)


def test_the_authors_pairs_are_the_default():
    """``swinstride-5-noncyclic``, and a window of 4 past 95 frames, both orders of each."""
    with gate4d.patch(build(), method="easi3r") as handle:
        for frames in (4, 7, 11, 95, 96, 120):
            window = 5 if frames <= 95 else 4
            ahead = [(i, i + n) for i in range(frames) for n in (1, 3, 5, 7, 9)[:window] if i + n < frames]
            pairs = handle.method.pairs(frames)
            assert sorted(pairs) == sorted(ahead + [(j, i) for i, j in ahead])
        assert handle.method.pairs(3) == window_pairs(3, 5)  # theirs leaves images in one pair, and no deviation
    assert window_pairs(6, 2, stride=3, symmetric=False) == [(0, 1), (0, 4), (1, 2), (1, 5), (2, 3), (3, 4), (4, 5)]
    with gate4d.patch(build(), method="easi3r", pair_window=2, pair_stride=3) as handle:
        assert handle.method.pairs(6) == window_pairs(6, 2, stride=3)


@torch.no_grad()
def test_a_run_takes_the_authors_pairs():
    with gate4d.patch(build(), method="easi3r", clusters=6) as handle:
        pairs = handle.run(clip(11)).pairs
    ahead = {(i, i + n) for i in range(11) for n in (1, 3, 5, 7, 9) if i + n < 11}
    assert sorted(pairs) == sorted(ahead | {(j, i) for i, j in ahead})


@pytest.mark.skipif("GATE4D_UPSTREAM_EASI3R" not in os.environ, reason="needs a checkout of Easi3R")
def test_pairs_are_those_of_make_pairs():
    path = Path(os.environ["GATE4D_UPSTREAM_EASI3R"]) / "dust3r" / "image_pairs.py"
    spec = importlib.util.spec_from_file_location("image_pairs", path)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    with gate4d.patch(build(), method="easi3r") as handle:
        for frames in range(4, 131):
            graph = "swinstride-5-noncyclic" if frames <= 95 else "swinstride-4-noncyclic"
            pairs = handle.method.pairs(frames)
            assert sorted(pairs) == sorted(theirs.make_pairs(list(range(frames)), scene_graph=graph))


def test_bad_input_is_named():
    for other in (vggt.Vggt(), croco.Cut3rSteps()):
        with pytest.raises(ValueError, match="needs a model of the family croco"):
            gate4d.patch(other, method="easi3r")
    with pytest.raises(ValueError, match="_encode_image"):
        gate4d.patch(croco.Dust3r(), method="easi3r")
    model = build()
    for options, error, match in (
        ({"pair_window": 0}, ValueError, "pair_window"),
        ({"pair_stride": 0}, ValueError, "pair_stride"),
        ({"batch": 1.5}, ValueError, "batch"),
        ({"symmetric": False}, ValueError, "cyclic=True"),
        ({"features": "encoder"}, TypeError, "features"),
        ({"colour": 1}, TypeError, "colour"),
    ):
        with pytest.raises(error, match=match):
            gate4d.patch(model, method="easi3r", **options)
    with gate4d.patch(model, method="easi3r", features=lambda x: x) as handle:
        for frames, error, match in (
            (clip(1), ValueError, "at least 3 images"),
            (clip(2), ValueError, "at least 3 images"),
            ([torch.rand(3, 32, 32), torch.rand(3, 32, 48)], ValueError, "one size"),
            (torch.rand(3, 3, 30, 32), ValueError, "multiples of 16"),
            (torch.zeros(3, 3, 32, 32, dtype=torch.uint8), TypeError, "uint8"),
            (clip(3), ValueError, r"features must return \[3, 12, C\]"),
        ):
            with pytest.raises(error, match=match):
                handle.run(frames)
    with (
        gate4d.patch(model, method="easi3r", pair_window=1) as handle,
        pytest.raises(ValueError, match="fewer than two pairs"),
    ):
        handle.run(clip(3))
