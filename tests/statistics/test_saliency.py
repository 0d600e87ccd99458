"""GramSaliency, PairSaliency and the cues against materialised float64 computations, and what they hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gate4d import (
    GramMap,
    GramRecipe,
    GramSaliency,
    PairSaliency,
    TokenLayout,
    motion_cue,
    state_confidence,
)

WINDOW = (-6, -4, -2, 2, 4, 6)


def clip(layers, layout, heads=4, dim=16, batch=1, seed=0, offset=0.5):
    """q and k of every layer, [B, H, N, D]; tokens share structure, so that the maps are not noise around 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, layout.num_tokens, dim)
    base = torch.randn(shape, generator=generator)
    return [
        [base + torch.randn(shape, generator=generator) + offset * torch.randn(dim, generator=generator) for _ in "qk"]
        for _ in range(layers)
    ]


def scaled(x, dims=(-1,), eps=1e-6):
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    return (x - low) / (high - low + eps)


def materialised_gram(features, layout, maps, window=WINDOW):
    """The maps one by one, from all products of all (frame, source frame, layer, head), as the authors form them."""
    frames = [slice(layout.offsets[t] + layout.special_tokens, layout.offsets[t + 1]) for t in range(layout.frames)]
    raw = {}
    for name, (sides, layers, statistic) in maps.items():
        rows = []
        for t in range(layout.frames):
            sources = [t + w for w in window if 0 <= t + w < layout.frames]
            products = [
                features[layer][sides[0]][:, :, frames[t]].double()
                @ features[layer][sides[1]][:, :, frames[s]].double().mT
                for layer in layers
                for s in sources
            ]
            mean = torch.stack(products).mean((0, 2))  # [B, P, P]
            rows.append(mean.mean(-1) if statistic == "mean" else mean.std(-1))
        raw[name] = torch.stack(rows, dim=1)
    return raw


AUTHORS = {
    "S_mid": ((0, 0), range(3, 8), "mean"),
    "V_deep": ((0, 0), range(18, 20), "std"),
    "S_deep": ((0, 0), range(17, 22), "mean"),
    "S_sh": ((1, 1), [0], "mean"),
    "V_sh": ((0, 1), [0], "std"),
}


def materialised_dyn(raw):
    m = {name: scaled(x) for name, x in raw.items()}
    return scaled((1 - m["S_mid"]) * (1 - m["V_deep"]) * m["S_deep"] * (1 - m["S_sh"]) * m["V_sh"])


def run(saliency, features, layers=None):
    for layer in range(len(features)) if layers is None else layers:
        saliency.observe(layer, *features[layer])
    return saliency.finalize()


def close(got, want, relative=1e-5):
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= relative * want.abs().max()


@pytest.mark.parametrize("offset", [0.5, 3.0])
def test_vggt4d(offset):
    layout = TokenLayout(9, 65, 5)
    features = clip(24, layout, batch=2, offset=offset)
    result = run(GramSaliency("vggt4d", layout=layout), features)
    raw = materialised_gram(features, layout, AUTHORS)
    assert result.dyn.shape == (2, 9, 60)
    for name, want in raw.items():
        close(result.raw[name], want)
        close(result.maps[name], scaled(want))
    close(result.dyn, materialised_dyn(raw))


def test_true_width_of_vggt():
    layout = TokenLayout(4, 1041, 5)
    features = [f for f in clip(1, layout, heads=16, dim=64) for _ in range(24)]
    recipe = GramRecipe({"V": GramMap("qk", (0,), "std"), "S": GramMap("qq", (0, 1), "mean", inverted=True)})
    result = run(GramSaliency(recipe, layout=layout), features[:2])
    raw = materialised_gram(features, layout, {"V": ((0, 1), [0], "std"), "S": ((0, 0), [0, 1], "mean")})
    close(result.raw["V"], raw["V"])
    close(result.raw["S"], raw["S"])
    close(result.dyn, scaled(scaled(raw["V"]) * (1 - scaled(raw["S"]))))


def test_own_recipe_patch_tokens_only_and_low_precision():
    layout = TokenLayout(3, 24, 4)
    features = [[x.bfloat16() for x in layer] for layer in clip(3, layout)]
    patches = [[layout.patch_tokens(x, dim=2) for x in layer] for layer in features]
    recipe = GramRecipe({"V": GramMap("kk", (0, 1, 2), "std")}, window=(-1, 0, 1))
    result = run(GramSaliency(recipe, layout=layout), features)
    torch.testing.assert_close(run(GramSaliency(recipe, layout=layout), patches).dyn, result.dyn)
    raw = materialised_gram(features, layout, {"V": ((1, 1), range(3), "std")}, window=(-1, 0, 1))
    close(result.raw["V"], raw["V"])
    assert (result.maps["V"].amax(-1) > 0.999).all()


def test_windows_longer_than_the_clip_are_clipped():
    layout = TokenLayout(5, 20, 2)
    features = clip(24, layout)
    result = run(GramSaliency(layout=layout), features)
    close(result.dyn, materialised_dyn(materialised_gram(features, layout, AUTHORS)))


def test_it_holds_less_than_a_twentieth_of_all_features():
    layout = TokenLayout(20, 523, 5)
    ((q, k),) = clip(1, layout, heads=4, dim=64)
    saliency = GramSaliency(layout=layout)
    peak = 0
    for layer in range(24):
        saliency.observe(layer, q, k)
        held = [x for layers in saliency._held.values() for kept in layers for x in kept]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in [*held, *saliency._sums.values()]}
        assert q.untyped_storage().data_ptr() not in storages
        peak = max(peak, sum(s.nbytes() for s in storages.values()))
    everything = 24 * (q.untyped_storage().nbytes() + k.untyped_storage().nbytes())
    assert 0 < peak < everything / 20
    assert saliency.peak_bytes() == peak
    assert saliency.held_bytes() < everything / 1000


def small():
    layout = TokenLayout(4, 12, 2)
    return GramSaliency(layout=layout), clip(24, layout), layout


def test_layers_out_of_order_twice_or_skipped_are_named_and_leave_it_usable():
    saliency, features, _ = small()
    expected = run(GramSaliency(layout=saliency.layout), features).dyn
    with pytest.raises(ValueError, match=r"comes before layers \[0\]"):
        saliency.observe(1, *features[1])
    for layer in range(24):
        saliency.observe(layer, *features[layer])
        with pytest.raises(ValueError, match=f"layer must be an int > {layer}"):
            saliency.observe(layer, *features[layer])
        if layer < 21:
            with pytest.raises(ValueError, match="were not observed yet"):
                saliency.finalize()
        if layer == 4:
            with pytest.raises(ValueError, match=r"layer 6 comes before layers \[5\]"):
                saliency.observe(6, *features[6])
            with pytest.raises(ValueError, match="layer must be an int > 4"):
                saliency.observe(2, *features[2])
    assert torch.equal(saliency.finalize().dyn, expected)
    saliency.reset()
    assert torch.equal(run(saliency, features).dyn, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("layer", [0, 3, 18, 19])
def test_features_that_are_not_finite_are_named_and_leave_it_usable(layer, bad):
    saliency, features, layout = small()
    expected = run(GramSaliency(layout=layout), features).dyn
    for before in range(layer):
        saliency.observe(before, *features[before])
    for token in (layout.offsets[2] + 5, layout.num_tokens - 1):
        broken = [x.clone() for x in features[layer]]
        for x in broken:
            x[0, 1, token, 3] = bad
        with pytest.raises(ValueError, match=f"layer {layer} must be finite"):
            saliency.observe(layer, *broken)
    for after in range(layer, 24):
        saliency.observe(after, *features[after])
    assert torch.equal(saliency.finalize().dyn, expected)


def test_a_changing_frame_count_is_named_and_leaves_it_usable():
    saliency, features, _ = small()
    saliency.observe(0, *features[0])
    with pytest.raises(ValueError, match="frame count must not change"):
        saliency.observe(1, *(x[:, :, :36] for x in features[1]))
    with pytest.raises(ValueError, match="q must keep the shape"):
        saliency.observe(1, *(x[:, :2] for x in features[1]))
    for layer in range(1, 24):
        saliency.observe(layer, *features[layer])
    assert torch.isfinite(saliency.finalize().dyn).all()


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_frames_without_source_frames_are_an_error(frames):
    with pytest.raises(ValueError, match="no source frame within the window"):
        GramSaliency(layout=TokenLayout(frames, 12, 2))


def test_bad_recipes_and_layouts_are_named():
    layout = TokenLayout(4, 12, 2)
    with pytest.raises(ValueError, match="recipe must be"):
        GramSaliency("vggt5d", layout=layout)
    with pytest.raises(ValueError, match="patches_per_frame"):
        GramSaliency(layout=TokenLayout(4, [12, 13, 12, 12], 2))
    with pytest.raises(ValueError, match="patch tokens"):
        GramSaliency(layout=TokenLayout(4, 2, 2))
    with pytest.raises(ValueError, match="product"):
        GramMap("kq", (0,), "mean")
    with pytest.raises(ValueError, match="statistic"):
        GramMap("qk", (0,), "var")
    with pytest.raises(ValueError, match="layers"):
        GramMap("qk", (), "mean")
    with pytest.raises(ValueError, match="window"):
        GramRecipe({"S": GramMap("qq", (0,), "mean")}, window=())
    with pytest.raises(ValueError, match="maps"):
        GramRecipe({})


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 99))
def test_algebra(seed):
    """Batches split; permuting each frame's patches alike permutes the result."""
    layout = TokenLayout(4, 10, 1)
    features = clip(24, layout, batch=2, seed=seed)
    whole = run(GramSaliency(layout=layout), features)
    one = run(GramSaliency(layout=layout), [[x[1:] for x in layer] for layer in features])
    torch.testing.assert_close(one.raw["V_deep"], whole.raw["V_deep"][1:])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    tokens = torch.cat([torch.cat((torch.zeros(1, dtype=torch.long), 1 + order)) + 10 * t for t in range(4)])
    permuted = run(GramSaliency(layout=layout), [[x[:, :, tokens] for x in layer] for layer in features])
    for name in AUTHORS:
        torch.testing.assert_close(permuted.raw[name], whole.raw[name][..., order], rtol=1e-4, atol=1e-5)


# PairSaliency

PAIRS = [(a, b) for a in range(4) for b in range(4) if a != b]
GRID = (5, 6)


def pair_features(layers=2, heads=3, dim=8, queries=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(len(PAIRS), heads, n, dim, generator=generator) + 0.3  # noqa: E731
    return {(d, n): (draw(queries), draw(GRID[0] * GRID[1])) for d in (1, 2) for n in range(layers)}


def materialised_pairs(features):
    """Easi3R's maps from the logits of every pair."""
    fused = {}
    for decoder in (1, 2):
        keys = sorted(key for key in features if key[0] == decoder)
        channels = torch.cat(
            [(features[key][0].double() @ features[key][1].double().mT / 8**0.5).mean(2) for key in keys], dim=1
        ).unflatten(2, GRID)  # [pairs, L * H, h, w]
        channels[:, :, 0, 0] = (channels[:, :, 0, 1] + channels[:, :, 1, 0]) / 2
        image = [p[1] if decoder == 1 else p[0] for p in PAIRS]
        groups = [channels[[n for n, i in enumerate(image) if i == wanted]] for wanted in range(4)]
        for name, values in (("mean", [g.mean(0) for g in groups]), ("var", [g.std(0) for g in groups])):
            fused[name, decoder] = scaled(scaled(torch.stack(values), (0, 1, 2, 3)).mean(1), (0, 1, 2))
    dyn = (1 - fused["mean", 1]) * fused["var", 1] * fused["mean", 2] * (1 - fused["var", 2])
    return scaled(dyn, (1, 2)), fused


@pytest.mark.parametrize("chunks", [1, 5])
def test_pairs(chunks):
    features = pair_features()
    saliency = PairSaliency(4, GRID)
    for part in torch.arange(len(PAIRS)).chunk(chunks):
        for (decoder, layer), (q, k) in features.items():
            saliency.observe(decoder, layer, q[part], k[part], [PAIRS[i] for i in part])
    result = saliency.finalize()
    dyn, fused = materialised_pairs(features)
    close(result.dyn, dyn)
    for name, got in result._asdict().items():
        if name != "dyn":
            close(got, fused[name[:-2], 1 if name.endswith("_i") else 2])


def test_bad_pairs_are_named_and_leave_it_usable():
    features = pair_features(layers=1)
    saliency = PairSaliency(4, GRID)
    q, k = features[1, 0]
    saliency.observe(1, 0, q, k, PAIRS)
    broken = k.clone()
    broken[2, 1, 7] = torch.nan
    other = features[2, 0]
    for arguments, match in [
        ((1, 0, q[:1], k[:1], [(0, 1)]), "already observed"),
        ((2, 0, q[:2], k[:2], [(0, 1), (0, 1)]), "already observed"),
        ((3, 0, q, k, PAIRS), "decoder must be"),
        ((2, 0, q, k[:, :, :7], PAIRS), "k must have 30 keys"),
        ((2, 0, q, k, PAIRS[1:]), "pairs must hold"),
        ((2, 0, q[:1], k[:1], [(0, 4)]), "two different images"),
        ((2, 0, q[:1], k[:1], [(1, 1)]), "two different images"),
        ((2, 0, other[0], broken, PAIRS), "must be finite"),
        ((1, 1, q[:, :2], k[:, :2], PAIRS), "must keep the heads"),
    ]:
        with pytest.raises(ValueError, match=match):
            saliency.observe(*arguments)
    with pytest.raises(ValueError, match="both decoders"):
        saliency.finalize()
    saliency.observe(2, 0, *other, PAIRS)
    close(saliency.finalize().dyn, materialised_pairs(features)[0])
    saliency.reset()
    for decoder in (1, 2):
        saliency.observe(decoder, 0, q[:3], k[:3], PAIRS[:3])
    with pytest.raises(ValueError, match="fewer than two pairs"):
        saliency.finalize()
    with pytest.raises(ValueError, match="images"):
        PairSaliency(1, GRID)
    with pytest.raises(ValueError, match="grid"):
        PairSaliency(2, (1, 30))


# The cues


def decoder_layers(batch, heads, nq, nk, dim, layers=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(batch, heads, n, dim, generator=generator) + 0.5  # noqa: E731
    return [draw(nq) for _ in range(layers)], [draw(nk) for _ in range(layers)]


def test_state_confidence():
    q, k = decoder_layers(2, 16, 768, 577, 48)
    logits = torch.stack([a.double() @ b.double().mT * 48**-0.5 for a, b in zip(q, k, strict=True)])
    want = logits.mean((0, 2, 4)).sigmoid()
    close(state_confidence(q, k), want)
    close(state_confidence(q[0], k[0]), logits[0].mean((1, 3)).sigmoid())
    with pytest.raises(ValueError, match="as many layers"):
        state_confidence(q, k[:2])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("cue", ["logit_mean", "received", "entropy"])
def test_motion_cue(cue, temperature):
    q, k = decoder_layers(2, 3, 80, 80, 16)
    chosen = [0, 2]
    s = torch.stack([q[n].double() @ k[n].double().mT / 4 for n in chosen])
    p = s.softmax(-1)
    raw = {
        "logit_mean": -s.mean((0, 2, 4)),
        "received": -p.mean((0, 2, 3)),
        "entropy": -(p * p.log()).sum(-1).mean((0, 2)),
    }[cue]
    z = (raw - raw.mean(-1, keepdim=True)) / (raw.std(-1, unbiased=False, keepdim=True) + 1e-6)
    got = motion_cue(q, k, cue=cue, layers=chosen, temperature=temperature)
    close(got, (z / temperature).sigmoid())
    if cue == "received":
        lse = [(a.double() @ b.double().mT / 4).logsumexp(-1).float() for a, b in zip(q, k, strict=True)]
        torch.testing.assert_close(motion_cue(q, k, cue=cue, layers=chosen, temperature=temperature, lse=lse), got)


def test_bad_cues_are_named():
    q, k = decoder_layers(1, 1, 5, 5, 4)
    for options, match in [
        ({"cue": "mean"}, "cue must be"),
        ({"temperature": 0}, "temperature"),
        ({"layers": [3]}, "layers must be"),
        ({"layers": []}, "layers must be"),
        ({"cue": "received", "lse": [torch.zeros(1, 1, 5)]}, "lse must hold"),
        ({"cue": "received", "lse": torch.zeros(1, 1, 5)}, "lse must hold"),
    ]:
        with pytest.raises(ValueError, match=match):
            motion_cue(q, k, **options)
