"""The recurrent model: recognised as CUT3R, one clip or frame by frame, driven by the methods for CUT3R."""

import pytest
import torch

import gate4d
from gate4d.methods.clips import recurrent_views
from gate4d.methods.rollout import recurrent_steps
from gate4d.models.recurrent import RecurrentModel

TINY = {"heads": 3, "encoder": 1, "decoder": 2, "state": 4, "memory": 2, "widths": [4, 6]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = RecurrentModel(**TINY).eval()
    with torch.no_grad():  # fresh models hardly attend, and hardly answer to what they attend to
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.double()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 6, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def together(found):
    return {name: torch.cat([f[name] for f in found], dim=1) for name in found[0]}


@torch.no_grad()
def test_a_clip_gives_what_its_frames_give_one_by_one(model, images):
    whole = model(images)
    assert whole["pose_enc"].shape == (2, 6, 9)
    assert whole["depth"].shape == (2, 6, 16, 24, 1)
    assert whole["depth_conf"].shape == whole["motion"].shape == (2, 6, 16, 24)
    for steps in (model.stream(images), [model([{"img": 2 * images[:, 0] - 1}])]):
        for name, x in together(list(steps)).items():
            torch.testing.assert_close(x, whole[name][:, : x.shape[1]], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_later_frames_change_nothing_before_them_and_earlier_ones_do(model, images):
    changed = images.clone()
    changed[:, 2] = 1 - changed[:, 2]
    a, b = model(images), model(changed)
    for name in a:
        assert torch.equal(a[name][:, :2], b[name][:, :2])
        assert (a[name][:, 2:] != b[name][:, 2:]).flatten(2).any(-1).all()


@torch.no_grad()
def test_a_reset_forgets_state_memory_and_images(model, images):
    views = [{"img": 2 * x - 1} for x in images.unbind(1)]
    views[2]["reset"] = torch.ones(2, dtype=torch.bool)
    views = recurrent_views(views, device=torch.device("cpu"))
    found = together([prediction for prediction, _ in recurrent_steps(model, views, renew_pose=True)])
    fresh = model(images[:, 3:])
    for name, x in fresh.items():
        torch.testing.assert_close(found[name][:, 3:], x, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_patch_recognises_it_as_cut3r_and_changes_nothing(model, images):
    table = gate4d.inspect(model)
    assert table.families == ("cut3r",)
    roles = ("encoder", "decoder self", "decoder cross", "state self", "state cross", "memory self", "memory cross")
    assert [len(table.select(role)) for role in roles] == [1, 2, 2, 2, 2, 2, 2]
    plain = model(images)
    with gate4d.patch(model):
        patched = model(images)
    for name, x in plain.items():
        torch.testing.assert_close(patched[name], x, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", ["ttt3r", "mut3r"])
def test_methods_for_cut3r_run_on_it(model, images, method):
    clip = images[0]
    with torch.no_grad():
        plain = model(clip[None])
    with gate4d.patch(model, method=method) as handle:
        result = handle.run(clip)
    found = together(result.predictions)
    assert all(torch.isfinite(x).all() for x in found.values())
    first = 1 if method == "ttt3r" else 0  # TTT3R replaces the first state as CUT3R does
    if first:
        torch.testing.assert_close(found["depth"][:, 0], plain["depth"][:, 0], atol=1e-9, rtol=1e-9)
    assert not torch.allclose(found["depth"][:, -1], plain["depth"][:, -1], atol=1e-6)


def test_gradients_reach_every_parameter(model, images):
    out = model(images[:, :3])
    sum(x.square().sum() for x in out.values()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.zero_grad(set_to_none=True)
    assert not missing


def test_bad_sizes_are_named(model):
    with pytest.raises(ValueError, match="multiples of 8"):
        model(torch.rand(1, 2, 3, 15, 24))
    with pytest.raises(ValueError, match="dim must be at least 192"):
        RecurrentModel(dim=96)
    with pytest.raises(ValueError, match="square"):
        RecurrentModel(state=10)
