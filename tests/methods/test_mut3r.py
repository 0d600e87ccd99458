"""MUT3R on the stand-in of CUT3R: scores, gates and outputs against maps and additive biases in float64."""

import gc
import types

import pytest
import torch
from helpers.accuracy import assert_accurate
from standins import croco, vggt
from standins.common import live_bytes

import gate4d
from gate4d.data.procedural import evaluation_clips
from gate4d.methods.clips import recurrent_views
from gate4d.models import load


def clip(frames=3, batch=2):
    return [torch.rand(batch, 3, 32, 48) for _ in range(frames)]


def views(images):
    return list(recurrent_views(images, device=torch.device("cpu")))


def entries(model):
    for n, (image, state) in enumerate(zip(model.dec_blocks, model.dec_blocks_state, strict=True)):
        yield "self", n, image.attn
        yield "image", n, image.cross_attn
        yield "state", n, state.cross_attn


def outlying(x):
    """Robust deviations above the third, by sorting."""
    scores = []
    for item in x:
        n = (len(item) - 1) // 2
        away = item - item.sort().values[n]
        deviation = max(1.4826 * away.abs().sort().values[n], item.std(correction=0) / 2) + 1e-6
        scores.append(torch.tanh((away / deviation - 3).clamp(min=0) / 2))
    return torch.stack(scores)


def materialised(model, images, directions, layers, strength, cue, normalise="standardised"):
    """Two rollouts a frame with all probabilities as matrices and the papers' additive bias on the logits."""
    control = {"maps": [], "motion": None}

    def install(direction, layer, module):
        def forward(self, *args):
            x, pos = (args[:1], args[1:]) if len(args) == 2 else (args[:3], args[3:])
            q, k, v = self.heads(*x)
            q, k = self.rope(q, pos[0]), self.rope(k, pos[-1])
            logits, g = q @ k.mT * self.scale, control["motion"]
            if direction == "self":
                control["maps"].append(logits)
            gated = g is not None and direction in directions and layer in layers
            if gated and direction == "self":
                logits = logits + strength * torch.log(1 - (1 - g)[:, None, :, None] * g[:, None, None])
            if gated and direction == "state":
                logits = logits + strength * torch.log(1 - g)[:, None, None]
            out = logits.softmax(-1) @ v
            if gated and direction == "image":
                out = out * ((1 - g) ** strength)[:, None, :, None]
            return self.finish(out)

        module.forward = types.MethodType(forward, module)

    def rollout(*args, **kwargs):
        control.update(maps=[], motion=None)
        plain(*args, **kwargs)
        logits = torch.stack(control["maps"])  # [L, B, H, N, N]
        p = logits.softmax(-1)
        raw = {
            "logit_mean": lambda: -logits.mean((0, 2, 4)),
            "received": lambda: -p.mean((0, 2, 3)),
            "entropy": lambda: -(p * p.log()).sum(-1).mean((0, 2)),
        }[cue]()[:, 1:]
        z = (raw - raw.mean(-1, keepdim=True)) / (raw.std(-1, correction=0, keepdim=True) + 1e-6)
        scores.append(outlying(raw) if normalise == "outliers" else z.sigmoid())
        control["motion"] = torch.nn.functional.pad(scores[-1], (1, 0))
        return plain(*args, **kwargs)

    scores, plain = [], model._recurrent_rollout
    for entry in entries(model):
        install(*entry)
    model._recurrent_rollout = rollout
    out = model(views(images))
    del model._recurrent_rollout
    for _, _, module in entries(model):
        del module.forward
    return torch.stack([o["pts3d"] for o in out]), torch.stack(scores), out[-1]["state"]


@pytest.mark.parametrize(
    ("directions", "layers", "strength", "cue", "normalise"),
    [
        (("self", "state", "image"), (0, 1), 1.0, "logit_mean", "standardised"),
        (("self",), (0,), 1.0, "logit_mean", "standardised"),
        (("state",), (1,), 2.0, "received", "standardised"),
        (("image",), (0, 1), 0.5, "entropy", "standardised"),
        (("self", "state", "image"), (0, 1), 1.0, "logit_mean", "outliers"),
    ],
)
@torch.no_grad()
def test_against_materialised_maps(directions, layers, strength, cue, normalise):
    model, images = croco.cut3r_steps(), clip()
    if normalise == "outliers":  # a few patches of many that look different
        images = [0.05 * torch.rand(2, 3, 96, 96) for _ in range(3)]
        for x in images:
            x[:, :, :16, 16:48] = (torch.rand(2, 3, 16, 32) > 0.5).float()
    args = directions, layers, strength, cue, normalise
    exact = materialised(croco.cut3r_steps(torch.float64), [x.double() for x in images], *args)
    torch_says = materialised(model, images, *args)
    options = dict(zip(("directions", "layers", "strength", "cue", "normalise"), args, strict=True))
    with gate4d.patch(model, method="mut3r", **options) as handle:
        result = handle.run(images)
    ours = torch.stack([p["pts3d"] for p in result.predictions]), result.motion_scores, result.state
    for name, got, true, baseline in zip(("points", "motion", "state"), ours, exact, torch_says, strict=True):
        assert_accurate(name, got, true, baseline)
    ungated = torch.stack([o["pts3d"] for o in model(views(images))])
    assert (exact[0] - ungated).abs().max() > 1e-3  # the gates do something


@torch.no_grad()
def test_without_gates_it_is_the_model_and_undo_is_exact():
    model, images = croco.cut3r_steps(), clip()
    plain = model(views(images))
    with gate4d.patch(model):
        patched = model(views(images))
    for off in ({"directions": None}, {"layers": None}):
        with gate4d.patch(model, method="mut3r", **off) as handle:
            result = handle.run(images)
            assert all(r.control.gate is None and not r.control.observers for r in handle.table)
        for ours, theirs in zip(result.predictions, patched, strict=True):
            assert torch.equal(ours["pts3d"], theirs["pts3d"])
    assert "_recurrent_rollout" not in model.__dict__
    for before, after in zip(plain, model(views(images)), strict=True):
        assert torch.equal(before["pts3d"], after["pts3d"])


@torch.no_grad()
def test_a_long_stream_holds_no_more_than_a_short_one():
    model, held = croco.cut3r_steps(), {}

    earlier = {id(x): x for x in gc.get_objects()}  # kept, so that no id is given away again
    with gate4d.patch(model, method="mut3r") as handle:
        frames = (torch.rand(1, 3, 16, 32) for _ in range(300))
        for number, step in enumerate(handle.method.stream(frames), start=1):
            if number in (50, 300):
                held[number] = live_bytes(earlier)
            assert torch.isfinite(step.state).all()
        assert number == 300
    assert held[300] <= held[50]


@pytest.mark.parametrize(("normalise", "score"), [("outliers", 0.0), ("standardised", 0.5)])
@torch.no_grad()
def test_one_flat_frame_has_one_score(normalise, score):
    model = croco.cut3r_steps()
    for p in model.dec_blocks[:].parameters():
        p.data.zero_()
    with gate4d.patch(model, method="mut3r", normalise=normalise) as handle:
        result = handle.run(torch.full((1, 3, 32, 48), 0.5))
    assert torch.equal(result.motion_scores, torch.full_like(result.motion_scores, score))
    assert torch.isfinite(result.predictions[0]["pts3d"]).all()


@torch.no_grad()
def test_a_static_clip_is_left_nearly_as_plain_cut3r_has_it():
    """A rendered scene in which nothing moves, seen by a camera that does; the paper's form gates half of it."""
    pytest.importorskip("safetensors")
    model, *_, batch = load("recurrent"), *evaluation_clips(6, 64, 80, count=5)
    assert not batch.masks.any()

    def run(**options):
        with gate4d.patch(model, method="mut3r", **options) as handle:
            return handle.run(batch.images[0])

    def away(result):
        return {
            name: max(
                float((a[name] - b[name]).abs().max() / b[name].abs().max())
                for a, b in zip(result.predictions, plain.predictions, strict=True)
            )
            for name in ("pose_enc", "depth")
        }

    plain = run(layers=None)
    with gate4d.patch(model):
        own = list(model.stream(batch.images))
    assert all(torch.equal(a["depth"], b["depth"]) for a, b in zip(own, plain.predictions, strict=True))
    default, paper = run(), run(normalise="standardised")
    assert 0.4 < float((paper.motion_scores > 0.5).float().mean()) < 0.6
    assert float((default.motion_scores > 0.5).float().mean()) < 0.01
    got, relative = away(default), away(paper)
    assert got["pose_enc"] < 1e-4  # measured over 24 frames: 3.6e-6, against 3.3e-3
    assert got["depth"] < 2e-3  # 5.3e-4, against 7.9e-2
    assert relative["pose_enc"] > 10 * got["pose_enc"]
    assert relative["depth"] > 10 * got["depth"]


@pytest.mark.parametrize(
    ("layers", "gated"),
    [("auto", [0, 1]), ("all", [0, 1]), ("0-1", [0, 1]), ("range(2)", [0, 1]), ("1", [1]), (1, [1]), ([0], [0]),
     ("0,1", [0, 1]), ("[0, 1]", [0, 1]), (range(2), [0, 1]), (None, [])],
)  # fmt: skip
def test_layers_as_people_write_them(layers, gated):
    with gate4d.patch(croco.cut3r_steps(), method="mut3r", layers=layers) as handle:
        assert list(handle.method.layers) == gated
        assert [len(controls) for controls in handle.method._gated.values()] == [len(gated)] * 3


@pytest.mark.parametrize(
    "layers", ["0-6", "range(7)", range(7), 2, "early", "", "1-0", (), "range(0)", 1.5, [0.5], True]
)
def test_layers_that_gate_nothing_or_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="layers must"):
        gate4d.patch(croco.cut3r_steps(), method="mut3r", layers=layers)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="needs a model of the family cut3r"):
        gate4d.patch(vggt.Vggt(), method="mut3r")
    model = croco.cut3r_steps()
    for options, error, match in (
        ({"directions": "self"}, ValueError, "directions"),
        ({"directions": ("up",)}, ValueError, "directions"),
        ({"directions": ()}, ValueError, "directions"),
        ({"normalise": "paper"}, ValueError, "normalise"),
        ({"strength": -1}, ValueError, "strength"),
        ({"cue": "colour"}, ValueError, "cue"),
        ({"temperature": 0}, ValueError, "temperature"),
    ):
        with pytest.raises(error, match=match):
            gate4d.patch(model, method="mut3r", **options)
    with (
        gate4d.patch(model, method="mut3r") as handle,
        pytest.raises(ValueError, match="frame 1 is"),
    ):
        handle.run([torch.rand(3, 32, 48), torch.rand(3, 32, 64)])
