"""MUT3R on the stand-in of CUT3R: scores, gates and outputs against maps and additive biases in float64."""

import gc
import types

import pytest
import torch
from helpers.accuracy import assert_accurate
from standins import croco, vggt
from standins.common import live_bytes

import gate4d
from gate4d.methods.rollout import recurrent_views


def clip(frames=3, batch=2):
    return [torch.rand(batch, 3, 32, 48) for _ in range(frames)]


def views(images):
    return list(recurrent_views(images, device=torch.device("cpu")))


def entries(model):
    for n, (image, state) in enumerate(zip(model.dec_blocks, model.dec_blocks_state, strict=True)):
        yield "self", n, image.attn
        yield "image", n, image.cross_attn
        yield "state", n, state.cross_attn


def materialised(model, images, directions, layers, strength, cue):
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
        scores.append(z.sigmoid())
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
    ("directions", "layers", "strength", "cue"),
    [
        (("self", "state", "image"), range(7), 1.0, "logit_mean"),
        (("self",), (0,), 1.0, "logit_mean"),
        (("state",), (1,), 2.0, "received"),
        (("image",), range(7), 0.5, "entropy"),
    ],
)
@torch.no_grad()
def test_against_materialised_maps(directions, layers, strength, cue):
    model, images = croco.cut3r_steps(), clip()
    args = directions, layers, strength, cue
    exact = materialised(croco.cut3r_steps(torch.float64), [x.double() for x in images], *args)
    torch_says = materialised(model, images, *args)
    options = dict(zip(("directions", "layers", "strength", "cue"), args, strict=True))
    with gate4d.patch(model, method="mut3r", **options) as handle:
        result = handle.run(images)
    ours = torch.stack([p["pts3d"] for p in result.predictions]), result.motion, result.state
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
    for off in ({"directions": ()}, {"layers": ()}):
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


@torch.no_grad()
def test_one_flat_frame_is_neither_static_nor_dynamic():
    model = croco.cut3r_steps()
    for p in model.dec_blocks[:].parameters():
        p.data.zero_()
    with gate4d.patch(model, method="mut3r") as handle:
        result = handle.run(torch.full((1, 3, 32, 48), 0.5))
    assert torch.equal(result.motion, torch.full_like(result.motion, 0.5))
    assert torch.isfinite(result.predictions[0]["pts3d"]).all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="needs a model of the family cut3r"):
        gate4d.patch(vggt.Vggt(), method="mut3r")
    model = croco.cut3r_steps()
    for options, error, match in (
        ({"directions": "self"}, ValueError, "directions"),
        ({"directions": ("up",)}, ValueError, "directions"),
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
