"""TTT3R on the stand-in of CUT3R: against the rollout with all maps materialised, in float64."""

import copy
import gc
import types

import pytest
import torch
from helpers.accuracy import assert_accurate
from standins import croco, vggt
from standins.common import live_bytes

import gate4d
from gate4d.methods.rollout import recurrent_views


def clip(frames=5, batch=2):
    return [torch.rand(batch, 3, 32, 48) for _ in range(frames)]


def materialised(model, images, reset_every=None):
    """The rollout with the logits of every layer kept whole, and the update written out."""
    maps = []

    def keep(self, query, key, value, qpos, kpos):
        q, k, v = self.heads(query, key, value)
        q, k = (self.rope(x, p) for x, p in ((q, qpos), (k, kpos)))
        out, logits = croco.softmax_attention(q, k, v, self.scale)
        maps.append(logits)
        return self.finish(out)

    for block in model.dec_blocks_state:
        block.cross_attn.forward = types.MethodType(keep, block.cross_attn)
    views = list(recurrent_views(images, device=torch.device("cpu")))
    feats = [model._forward_encoder([v]) for v in views]
    init, init_mem, state, state_pos, mem = feats[0][1]
    outputs, rates, fresh = [], [], True
    for i, view in enumerate(views):
        maps.clear()
        feat, pos, shape = (x[0] for x in feats[i][0])
        result, (new, mem) = model._forward_decoder_step(
            [view] * 2, 0 if fresh else 1, feat, pos, shape, init, init_mem, state, state_pos, mem
        )
        rate = torch.stack(maps).mean((0, 2, 4)).sigmoid()  # [L, B, H, S, M] -> [B, S]
        rates.append(torch.ones_like(rate) if fresh else rate)
        state = rates[-1][..., None] * new + (1 - rates[-1][..., None]) * state
        outputs.append(result["pts3d"])
        fresh = reset_every is not None and (i + 1) % reset_every == 0
        if fresh:
            state, mem = init, init_mem
    for block in model.dec_blocks_state:
        del block.cross_attn.forward
    return torch.stack(outputs), torch.stack(rates), state


@pytest.mark.parametrize("reset_every", [None, 2])
@torch.no_grad()
def test_against_materialised_maps(reset_every):
    model, images = croco.cut3r_steps(), clip()
    exact = materialised(croco.cut3r_steps(torch.float64), [x.double() for x in images], reset_every)
    torch_says = materialised(model, images, reset_every)
    with gate4d.patch(model, method="ttt3r", reset_every=reset_every) as handle:
        result = handle.run(images)
    ours = torch.stack([p["pts3d"] for p in result.predictions]), result.rates, result.state
    for name, got, true, baseline in zip(("points", "rate", "state"), ours, exact, torch_says, strict=True):
        assert_accurate(name, got, true, baseline)
    first = [t % reset_every == 0 if reset_every else t == 0 for t in range(len(images))]
    assert bool((result.rates[first] == 1).all())
    rest = result.rates[[not f for f in first]]
    assert bool(((rest > 0) & (rest < 1)).all())
    assert float(rest.std()) > 1e-3  # the tokens do differ


@torch.no_grad()
def test_the_models_own_loop_follows_and_undo_is_exact():
    model, images = croco.cut3r_steps(), clip(3)
    views = list(recurrent_views(images, device=torch.device("cpu")))
    plain = model(views)
    with gate4d.patch(model, method="ttt3r") as handle:
        result = handle.run(images)
        twin = copy.deepcopy(model)
        for loop in (model, twin):
            for own, ours in zip(loop(views), result.predictions, strict=True):
                assert torch.equal(own["pts3d"], ours["pts3d"])
        assert twin._recurrent_rollout.model is twin
    gate4d.unpatch(twin)
    assert torch.equal(twin(views)[-1]["pts3d"], plain[-1]["pts3d"])
    assert not torch.allclose(plain[-1]["pts3d"], result.predictions[-1]["pts3d"], atol=1e-4)
    assert "_recurrent_rollout" not in model.__dict__
    for before, after in zip(plain, model(views), strict=True):
        assert torch.equal(before["pts3d"], after["pts3d"])


@torch.no_grad()
def test_items_of_a_batch_are_independent():
    model, images = croco.cut3r_steps(), clip(3)
    with gate4d.patch(model, method="ttt3r") as handle:
        both = handle.run(images)
        one = handle.run([x[1:] for x in images])
    torch.testing.assert_close(both.rates[:, 1:], one.rates)
    torch.testing.assert_close(both.state[1:], one.state)


@torch.no_grad()
def test_a_long_stream_holds_no_more_than_a_short_one():
    model = croco.cut3r_steps()

    earlier = {id(x): x for x in gc.get_objects()}  # kept, so that no id is given away again
    held = {}
    with gate4d.patch(model, method="ttt3r", reset_every=50) as handle:
        frames = (torch.rand(1, 3, 16, 32) for _ in range(300))
        for number, step in enumerate(handle.method.stream(frames), start=1):
            if number in (50, 300):
                held[number] = live_bytes(earlier)
            assert torch.isfinite(step.state).all()
        assert number == 300
    assert held[300] <= held[50]


@torch.no_grad()
def test_one_frame_is_plain_cut3r():
    model, images = croco.cut3r_steps(), clip(1)
    with gate4d.patch(model):
        (plain,) = model(list(recurrent_views(images, device=torch.device("cpu"))))
    with gate4d.patch(model, method="ttt3r") as handle:
        result = handle.run(images)
        assert torch.equal(result.predictions[0]["pts3d"], plain["pts3d"])
        assert torch.equal(result.state, plain["state"])
        alone = handle.run(images[0][:1])  # [T, 3, H, W] is a clip as well
    torch.testing.assert_close(alone.state, result.state[:1])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="needs a model of the family cut3r"):
        gate4d.patch(vggt.Vggt(), method="ttt3r")
    with pytest.raises(ValueError, match="own fork"):
        gate4d.patch(croco.Ttt3r(), method="ttt3r")
    with pytest.raises(ValueError, match="_recurrent_rollout"):
        gate4d.patch(croco.Cut3r(), method="ttt3r")
    model = croco.cut3r_steps()
    for bad in (0, 2.5):
        with pytest.raises(ValueError, match="reset_every"):
            gate4d.patch(model, method="ttt3r", reset_every=bad)
    with gate4d.patch(model, method="ttt3r") as handle:  # refused patches left nothing behind
        with pytest.raises(ValueError, match="frame 1 is"):
            handle.run([torch.rand(3, 32, 48), torch.rand(3, 32, 64)])
        with pytest.raises(ValueError, match="at least 1 frame"):
            handle.run([])
        with pytest.raises(ValueError, match="frame 0 must have shape"):
            handle.run([torch.rand(32, 48)])
        with pytest.raises(TypeError, match="uint8"):
            handle.run(torch.zeros(2, 3, 32, 48, dtype=torch.uint8))
