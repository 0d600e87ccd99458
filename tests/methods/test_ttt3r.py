"""TTT3R on the stand-in of CUT3R: against the rollout with all maps materialised, in float64."""

import copy
import gc
import types

import pytest
import torch
from helpers.accuracy import assert_accurate
from standins import croco, factories, vggt
from standins.common import live_bytes

import gate4d
from gate4d.data.procedural import evaluation_clips
from gate4d.evaluation import camera_errors
from gate4d.geometry import decode_pose, invert
from gate4d.methods.clips import recurrent_views
from gate4d.models import load


def clip(frames=5, batch=2):
    return [torch.rand(batch, 3, 32, 48) for _ in range(frames)]


def materialised(model, images, reset_every=None, chain=True):
    """The rollout with the logits of every layer kept whole, and the update written out.

    With ``chain``, the frame before a reset is fed again after it, and that answer dropped.
    """
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
    order = list(range(len(views)))
    if reset_every is not None and chain:
        order = [n for i in order for n in ([i - 1, i] if i and i % reset_every == 0 else [i])]
    for step, i in enumerate(order):
        view, again = views[i], step > 0 and order[step - 1] == i
        maps.clear()
        feat, pos, shape = (x[0] for x in feats[i][0])
        result, (new, mem) = model._forward_decoder_step(
            [view] * 2, 0 if fresh else 1, feat, pos, shape, init, init_mem, state, state_pos, mem
        )
        rate = torch.stack(maps).mean((0, 2, 4)).sigmoid()  # [L, B, H, S, M] -> [B, S]
        rate = torch.ones_like(rate) if fresh else rate
        state = rate[..., None] * new + (1 - rate[..., None]) * state
        if not again:
            rates.append(rate)
            outputs.append(result["pts3d"])
        fresh = reset_every is not None and (i + 1) % reset_every == 0 and not again
        if fresh:
            state, mem = init, init_mem
    for block in model.dec_blocks_state:
        del block.cross_attn.forward
    return torch.stack(outputs), torch.stack(rates), state


@pytest.mark.parametrize(("reset_every", "chain"), [(None, True), (2, False), (2, True)])
@torch.no_grad()
def test_against_materialised_maps(reset_every, chain):
    model, images = croco.cut3r_steps(), clip()
    exact = materialised(croco.cut3r_steps(torch.float64), [x.double() for x in images], reset_every, chain)
    torch_says = materialised(model, images, reset_every, chain)
    with gate4d.patch(model, method="ttt3r", reset_every=reset_every, chain=chain) as handle:
        result = handle.run(images)
    ours = torch.stack([p["pts3d"] for p in result.predictions]), result.rates, result.state
    for name, got, true, baseline in zip(("points", "rate", "state"), ours, exact, torch_says, strict=True):
        assert_accurate(name, got, true, baseline)
    first = [t % reset_every == 0 if reset_every and not chain else t == 0 for t in range(len(images))]
    assert bool((result.rates[first] == 1).all())
    rest = result.rates[[not f for f in first]]
    assert bool(((rest > 0) & (rest < 1)).all())
    assert float(rest.std()) > 1e-3  # the tokens do differ


def world(encoding):
    """Camera to world of CUT3R's 7 numbers, one item: by rotating the axes with ``q e q*``."""
    *shift, real, x, y, z = encoding.double()
    axis, pose = torch.stack((x, y, z)), torch.eye(4).double()
    for column, e in enumerate(torch.eye(3).double()):
        once = torch.linalg.cross(axis, e) + real * e
        pose[:3, column] = e + 2 * torch.linalg.cross(axis, once)
    pose[:3, 3] = torch.stack(shift)
    return pose


@torch.no_grad()
def test_chunks_are_put_together_as_the_authors_do():
    """Their demo: the frame before a reset comes again after it, and poses are multiplied by those before resets."""
    model, every = factories.dense_cut3r(), 3
    images = [torch.rand(1, 3, 32, 48) for _ in range(8)]
    views = []
    for n, view in enumerate(recurrent_views(images, device=torch.device("cpu"))):
        resets = (n + 1) % every == 0
        views.append({**view, "reset": torch.tensor([resets])})
        views += [{**view, "reset": torch.tensor([False])}] if resets else []
    with gate4d.patch(model, method="ttt3r") as handle:
        theirs = handle.run(views).predictions
    dropped = [n for n, view in enumerate(views) if n and bool(views[n - 1]["reset"])]
    kept = [p for n, p in enumerate(theirs) if n not in dropped]
    with gate4d.patch(model, method="ttt3r", reset_every=every) as handle:
        frames = list(handle.method.stream(images))
        ours = handle.run(images).predictions
    assert len(kept) == len(ours) == len(frames) == len(images)
    base = torch.eye(4).double()
    for n, (frame, got, own) in enumerate(zip(frames, ours, kept, strict=True)):
        assert (frame.base is None) == (n < every)
        torch.testing.assert_close(world(got["camera_pose"][0]), base @ world(own["camera_pose"][0]), atol=1e-5, rtol=0)
        points = own["pts3d_in_other_view"][0].double() @ base[:3, :3].T + base[:3, 3]
        torch.testing.assert_close(got["pts3d_in_other_view"][0].double(), points, atol=1e-4, rtol=1e-4)
        assert torch.equal(got["conf"], own["conf"])
        if (n + 1) % every == 0:
            base = base @ world(own["camera_pose"][0])
    assert not torch.allclose(base, torch.eye(4).double(), atol=0.1)


@torch.no_grad()
def test_the_shipped_model_does_not_jump_at_a_reset():
    pytest.importorskip("safetensors")
    model, (batch,) = load("recurrent"), evaluation_clips(24, 64, 80, count=1)
    true = batch.poses[0].double()
    true[:, :3, 3] /= batch.depth[0, 0].mean()

    def error(**options):
        with gate4d.patch(model, method="ttt3r", **options) as handle:
            found = torch.cat([p["pose_enc"][0] for p in handle.run(batch.images[0]).predictions])
        return camera_errors(invert(decode_pose(found.double(), 64, 80)[0]).numpy(), true.numpy()).ate

    plain, apart, chained = error(), error(reset_every=8, chain=False), error(reset_every=8)
    assert apart > 3 * plain  # each chunk begins at the origin
    assert chained < 1.3 * plain  # measured: 0.0047 without resets, 0.0242 apart, 0.0052 chained


@torch.no_grad()
def test_a_run_holds_one_state_and_what_it_is_told_to_keep():
    model, held = factories.dense_cut3r(), {}
    earlier = {id(x): x for x in gc.get_objects()}  # kept, so that no id is given away again

    def frames(count):
        for n in range(count):
            if n in (10, count - 1):
                held[n] = live_bytes(earlier)
            yield torch.rand(1, 3, 32, 48)

    with gate4d.patch(model, method="ttt3r", keep="camera_pose") as handle:
        result = handle.run(frames(60))
    assert [list(p) for p in result.predictions] == [["camera_pose"]] * 60
    assert held[59] - held[10] <= 49 * (7 + result.rates.shape[-1]) * 4 * 2  # cameras and rates; a state is larger
    assert result.state.nbytes > (7 + result.rates.shape[-1]) * 4 * 2
    del result
    with gate4d.patch(model, method="ttt3r") as handle:  # by default all predictions, but one state
        result = handle.run(frames(60))
    shape = result.state.shape
    alive = [x for x in gc.get_objects() if type(x) is torch.Tensor and id(x) not in earlier and x.shape == shape]
    assert len({x.data_ptr() for x in alive}) <= 2
    assert all("pts3d_in_other_view" in p for p in result.predictions)
    with gate4d.patch(model, method="ttt3r", keep=lambda p: float(p["conf"].mean())) as handle:
        assert all(isinstance(p, float) for p in handle.run(frames(3)).predictions)
    with (
        gate4d.patch(model, method="ttt3r", keep=["camera"]) as handle,
        pytest.raises(ValueError, match=r"keep must name entries .*'camera_pose'.* got \['camera'\]"),
    ):
        handle.run(frames(3))
    for bad in (3, [], [1]):
        with pytest.raises(TypeError, match="keep must be"):
            gate4d.patch(model, method="ttt3r", keep=bad)


@pytest.mark.parametrize("method", ["ttt3r", "mut3r"])
@torch.no_grad()
def test_states_of_past_frames_are_let_go_while_it_runs(method):
    """By default, too: only what is returned may grow with the frames."""
    model, held = factories.dense_cut3r(), {}
    earlier = {id(x): x for x in gc.get_objects()}  # kept, so that no id is given away again

    def frames():
        for n in range(40):
            if n in (10, 39):
                alive = (x for x in gc.get_objects() if type(x) is torch.Tensor and id(x) not in earlier)
                held[n] = {(x.data_ptr(), x.shape) for x in alive}
            yield torch.rand(1, 3, 32, 48)

    with gate4d.patch(model, method=method) as handle:
        shape = handle.run(frames()).state.shape
    states = {n: sum(x == shape for _, x in tensors) for n, tensors in held.items()}
    assert states[39] <= states[10] <= 4  # before, after, and the first


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
    with pytest.raises(ValueError, match="chain"):
        gate4d.patch(model, method="ttt3r", chain="yes")
    with gate4d.patch(model, method="ttt3r") as handle:  # refused patches left nothing behind
        with pytest.raises(ValueError, match="frame 1 is"):
            handle.run([torch.rand(3, 32, 48), torch.rand(3, 32, 64)])
        with pytest.raises(ValueError, match="at least 1 frame"):
            handle.run([])
        with pytest.raises(ValueError, match="frame 0 must have shape"):
            handle.run([torch.rand(32, 48)])
        with pytest.raises(TypeError, match="uint8"):
            handle.run(torch.zeros(2, 3, 32, 48, dtype=torch.uint8))
