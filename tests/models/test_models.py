"""The models' structure, their three ways to run, the camera pass, geometry, and files of weights."""

import json
import os
import time

import pytest
import safetensors.torch
import torch

import gate4d
from gate4d import TokenLayout
from gate4d import geometry as geo
from gate4d.models import WeightsError, build, load, metadata, save_weights
from gate4d.models.alternating import AlternatingModel
from gate4d.models.files import FOLDER, read_safetensors
from gate4d.models.matching import patch_flow

TINY = {"dim": 16, "heads": 2, "depth": 3, "trunk": 1, "widths": [4, 6]}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = AlternatingModel(**TINY).eval()
    with torch.no_grad():  # fresh models hardly attend, and hardly answer to what they attend to
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture
def images():
    return torch.rand(2, 4, 3, 16, 24, generator=torch.Generator().manual_seed(1))


# ---- geometry ----------------------------------------------------------------------------------------------------


def rotations(count):
    q = torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    half_turns = torch.eye(4, dtype=torch.float64)[:3]  # w = 0: where the usual formula divides by 0
    return torch.cat((q / q.norm(dim=-1, keepdim=True), half_turns))


def test_quaternions_round_trip():
    q = rotations(50)
    m = geo.quaternion_to_matrix(q)
    torch.testing.assert_close(m @ m.mT, torch.eye(3, dtype=m.dtype).expand_as(m), atol=1e-14, rtol=0)
    torch.testing.assert_close(geo.quaternion_to_matrix(geo.matrix_to_quaternion(m)), m, atol=1e-14, rtol=0)
    turn = geo.quaternion_to_matrix(torch.tensor([0, 0, 1.0, 1.0], dtype=torch.float64))  # 90 degrees about z: x to y
    torch.testing.assert_close(turn @ torch.tensor([1.0, 0, 0], dtype=torch.float64), torch.eye(3).double()[1])


def test_pose_encodings_round_trip():
    extrinsics = torch.eye(4, dtype=torch.float64).repeat(53, 1, 1)
    extrinsics[:, :3, :3] = geo.quaternion_to_matrix(rotations(50))
    extrinsics[:, :3, 3] = torch.randn(53, 3, dtype=torch.float64)
    intrinsics = torch.tensor([[70.0, 0, 40], [0, 60.0, 32], [0, 0, 1]], dtype=torch.float64).expand(53, 3, 3)
    encoded = geo.encode_pose(extrinsics, intrinsics, 64, 80)
    assert encoded[0, 8].item() == pytest.approx(2 * torch.atan(torch.tensor(40 / 70.0)).item())
    for got, wanted in zip(geo.decode_pose(encoded, 64, 80), (extrinsics, intrinsics), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-13, rtol=0)


def test_points_project_back_to_their_pixels():
    extrinsics = torch.eye(4, dtype=torch.float64)
    extrinsics[:3, :3] = geo.quaternion_to_matrix(rotations(1)[0])
    extrinsics[:3, 3] = torch.tensor([1.0, -2.0, 3.0])
    intrinsics = torch.tensor([[7.0, 0, 4], [0, 6.0, 3], [0, 0, 1]], dtype=torch.float64)
    depth = 1 + torch.rand(5, 8, dtype=torch.float64)
    points = geo.unproject(depth, extrinsics, intrinsics)
    seen = (points @ extrinsics[:3, :3].mT + extrinsics[:3, 3]) @ intrinsics.mT
    torch.testing.assert_close(seen[..., 2], depth)
    torch.testing.assert_close(seen[..., 0] / seen[..., 2], (torch.arange(8) + 0.5).double().expand(5, 8))
    torch.testing.assert_close(seen[..., 1] / seen[..., 2], (torch.arange(5) + 0.5).double()[:, None].expand(5, 8))


def test_targets_are_relative_to_the_first_frame_and_without_scale():
    poses = torch.eye(4, dtype=torch.float64).repeat(1, 2, 1, 1)
    poses[0, :, :3, :3] = geo.quaternion_to_matrix(rotations(2)[:2])
    poses[0, :, :3, 3] = torch.randn(2, 3, dtype=torch.float64)
    depth = 1 + torch.rand(1, 2, 4, 6, dtype=torch.float64)
    intrinsics = torch.tensor([[7.0, 0, 3], [0, 7.0, 2], [0, 0, 1]], dtype=torch.float64).repeat(1, 2, 1, 1)
    encoded, scaled, unit = geo.normalised(poses, depth, intrinsics)
    still = torch.tensor([0, 0, 0, 0, 0, 0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(encoded[0, 0, :7], still, atol=1e-14, rtol=0)
    assert scaled[0, 0].mean().item() == pytest.approx(1)
    # A point of the second frame, in metres, lies where the encoding puts it in the first camera, in the clip's unit.
    relative, k = geo.decode_pose(encoded, 4, 6)
    points = geo.unproject(scaled, relative, k)[0, 1] * unit
    world = geo.unproject(depth, geo.invert(poses), intrinsics)[0, 1]
    back = (world - poses[0, 0, :3, 3]) @ poses[0, 0, :3, :3]
    torch.testing.assert_close(points, back, atol=1e-12, rtol=0)
    moved = poses.clone()
    moved[..., :3, 3] *= 3
    again = geo.normalised(moved, 3 * depth, intrinsics)
    torch.testing.assert_close(again[0], encoded)
    torch.testing.assert_close(again[1], scaled)


# ---- the alternating model ---------------------------------------------------------------------------------------


def test_outputs_are_as_documented(model, images):
    assert model.aggregator.layout(images) == TokenLayout(4, 11, 5)
    for causal in (False, True):
        out = model(images, causal=causal)
        assert out["pose_enc"].shape == (2, 4, 9)
        assert out["depth"].shape == (2, 4, 16, 24, 1)
        assert out["depth_conf"].shape == out["motion"].shape == (2, 4, 16, 24)
        assert (out["depth"] > 0).all()
        assert (out["depth_conf"] >= 1).all()
        torch.testing.assert_close(out["pose_enc"][..., 3:7].norm(dim=-1), torch.ones(2, 4))


@torch.no_grad()
def test_patch_recognises_it_as_vggt_and_changes_nothing(model, images):
    table = gate4d.inspect(model)
    assert table.families == ("vggt",)
    counts = {role: len(table.select(role)) for role in ("frame", "global", "camera head")}
    assert counts == {"frame": 3, "global": 3, "camera head": 1}
    plain = [model(images), model(images, causal=True, camera_pass=True)]
    with gate4d.patch(model):
        patched = [model(images), model(images, causal=True, camera_pass=True)]
    for a, b in zip(plain, patched, strict=True):
        for name, x in a.items():
            torch.testing.assert_close(b[name], x, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["full", "causal", "stream"])
def test_observers_and_gates_of_a_patch_act_in_every_mode(model, images, mode):
    def run():
        if mode == "stream":
            return torch.cat([out["depth"] for out in model.stream(images)], dim=1)
        return model(images, causal=mode == "causal")["depth"]

    plain, seen = run(), []
    with gate4d.patch(model) as handle:
        control = handle.table.select("global")[1].control
        control.observers.append(lambda q, k, scale: seen.append(q.shape[2]))
        assert torch.allclose(run(), plain, atol=1e-4)
        if mode != "stream":  # a stream's keys grow, which a fixed gate cannot follow
            dropped = torch.zeros(2, 44, dtype=torch.bool)
            dropped[:, 5] = True
            control.gate = gate4d.MotionGate.drop_keys(dropped)
            assert not torch.allclose(run(), plain, atol=1e-4)
    assert seen[0] == (11 if mode == "stream" else 44)


def test_vggt4d_runs_on_it(model):
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    recipe = gate4d.GramRecipe({"S": gate4d.GramMap("qq", (0, 1), "mean", inverted=True)}, (-1, 1))
    with gate4d.patch(model, method="vggt4d", recipe=recipe, masked_layers=(0, 1)) as handle:
        result = handle.run(torch.rand(4, 3, 16, 24))
    assert result.masks.masks.shape == (4, 16, 24)
    assert result.predictions["pose_enc"].shape == (1, 4, 9)


@torch.no_grad()
def test_a_stream_gives_what_the_causal_forward_gives(model, images):
    whole = model.double()(images.double(), causal=True, camera_pass=True)
    stream = model.stream(images.double())
    frames = list(stream)
    for name in ("pose_enc", "depth", "depth_conf", "motion"):
        torch.testing.assert_close(torch.cat([f[name] for f in frames], 1), whole[name], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(stream.camera_pass(), whole["global_pose_enc"], atol=1e-10, rtol=1e-10)
    with pytest.raises(ValueError, match="at least 1 frame"):
        model.stream(images).camera_pass()


@torch.no_grad()
def test_later_frames_change_nothing_before_them_but_the_camera_pass(model, images):
    changed = images.clone()
    changed[:, 3] = 1 - changed[:, 3]
    a, b = (model(x, causal=True, camera_pass=True) for x in (images, changed))
    for name in ("pose_enc", "depth", "motion"):
        assert torch.equal(a[name][:, :3], b[name][:, :3])
        assert not torch.equal(a[name][:, 3], b[name][:, 3])
    assert not torch.allclose(a["global_pose_enc"][:, 0], b["global_pose_enc"][:, 0])
    full = [model(x)["depth"][:, 0] for x in (images, changed)]
    assert not torch.equal(*full)


@torch.no_grad()
def test_a_window_forgets(model, images):
    whole = [f["depth"] for f in model.stream(images)]
    kept = [f["depth"] for f in model.stream(images, window=2)]
    assert torch.equal(whole[1], kept[1])
    assert not torch.equal(whole[3], kept[3])


@torch.no_grad()
def test_the_camera_pass_is_what_it_is_said_to_be(model, images):
    """Restated in float64 with maps: per global block, softmax of the copies' queries over all keys of the clip."""
    model, images = model.double(), images.double()
    aggregator = model.aggregator
    x, pos, _, _ = aggregator.embed(images, causal=True)
    batch, frames, size, _ = x.shape
    late = (torch.arange(frames * size) // size)[None] > (torch.arange(frames * size) // size)[:, None]
    copies = x[:, :, 0]

    def turn(y, where):  # RoPE of [B, H, N, D]
        return aggregator.global_blocks[0].attn.rope(y, where)

    def heads(layer, y):
        return layer(y).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)

    def finish(block, y, out):
        y = y + block.ls1(block.attn.proj(out.transpose(1, 2).flatten(2)))
        return y + block.ls2(block.mlp(block.norm2(y)))

    for frame_block, block in zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True):
        before = x[:, :, 0]
        x = frame_block(x.flatten(0, 1), pos).unflatten(0, (batch, frames))
        copies = copies + x[:, :, 0] - before
        x, attn = x.flatten(1, 2), block.attn
        q, k, v = heads(attn.qkv, block.norm1(x))
        where = pos.repeat(1, frames, 1)
        q, k = turn(attn.q_norm(q), where), turn(attn.k_norm(k), where)
        mine = turn(attn.q_norm(heads(attn.qkv, block.norm1(copies))[0]), torch.zeros(1, frames, 2, dtype=torch.long))
        copies = finish(block, copies, (mine @ k.mT * 8**-0.5).softmax(-1) @ v)
        x = finish(block, x, (q @ k.mT * 8**-0.5).masked_fill(late, -torch.inf).softmax(-1) @ v)
        x = x.unflatten(1, (frames, size))
    got = model(images, causal=True, camera_pass=True)
    torch.testing.assert_close(got["global_pose_enc"], model.camera_head(copies), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(got["pose_enc"], model.camera_head(x[:, :, 0], causal=True), atol=1e-10, rtol=1e-10)


def test_block_matching_finds_a_known_shift(model):
    torch.manual_seed(3)
    large = torch.rand(1, 3, 48, 64)
    a, b = large[..., 8:40, 8:48], large[..., 4:36, 14:54]  # b(y, x) = a(y - 4, x + 6): what is at (y, x) in a, b has
    matching = model.aggregator.matching  # at (y + 4, x - 6)
    small = [torch.nn.functional.avg_pool2d(x, 2) for x in (a, b)]
    shifts = matching.correlate(*(matching.describe(x) for x in small))[:, 81:83, 6:-6, 6:-6]  # in half pixels
    assert (shifts[:, 0] - 2).abs().max() < 0.2
    assert (shifts[:, 1] + 3).abs().max() < 0.2


def test_patch_flow_measures_sub_pixel_motion():
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(40.0), indexing="ij")

    def image(dy, dx, zoom=1.0):
        v, u = (y - 15.5 - dy) / zoom, (x - 19.5 - dx) / zoom
        return torch.stack([torch.sin(0.5 * u + c) + torch.cos(0.45 * v - 0.3 * u) for c in range(3)])[None] / 4

    cells = patch_flow(image(0, 0), image(0.2, -0.1))
    assert (cells[:, :2] - torch.tensor([0.2, -0.1])[:, None, None]).abs().max() < 0.06
    torch.testing.assert_close(cells[:, 3:5], cells[:, :2] * cells[:, 2:3])
    shifted, grown = (x[0, 5:].mean((1, 2)) for x in (cells, patch_flow(image(0, 0), image(0, 0, 1.01))))
    assert grown[[0, 3]].min() > 0.01  # flow y times y, x times x: the image grows about its middle
    assert grown[[1, 2]].abs().max() < 0.2 * grown[[0, 3]].min()
    assert shifted.abs().max() < 0.005


def test_chained_steps_are_products_of_motions():
    torch.manual_seed(2)
    steps = torch.randn(2, 5, 9, dtype=torch.float64)
    matrices = geo.decode_pose(steps, 8, 8)[0]
    world, expected = torch.eye(4, dtype=torch.float64).expand(2, 4, 4), []
    for t in range(5):
        world = matrices[:, t] @ world if t else world
        expected.append(world)
    whole = geo.chained(steps)
    torch.testing.assert_close(geo.decode_pose(whole, 8, 8)[0], torch.stack(expected, 1))
    assert torch.equal(whole[..., 7:], steps[..., 7:])
    parts = torch.cat((whole[:, :3], geo.chained(steps[:, 3:], whole[:, 2])), dim=1)
    torch.testing.assert_close(parts, whole)


def test_bad_images_are_named(model):
    for shape, match in (((1, 2, 3, 15, 24), "multiples of 8"), ((2, 3, 16, 24), "B, T, 3, H, W")):
        with pytest.raises(ValueError, match=match):
            model(torch.rand(shape))


# ---- weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_weights(model, path, {"model": "alternating", "arguments": json.dumps(TINY), "seed": "7"})
    return path


def test_weights_round_trip(model, saved):
    loaded = load(saved)
    assert metadata(saved)["seed"] == "7"
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x.bfloat16().float()), name
    assert not loaded.training


def test_files_hold_16_bits(model, saved):
    stored = safetensors.torch.load_file(saved)
    assert set(stored) == set(model.state_dict())
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}
    assert set(read_safetensors(saved)[0]) == set(stored)


def test_corrupt_and_foreign_weights_are_named(saved, tmp_path):
    data = saved.read_bytes()
    broken = tmp_path / "broken.safetensors"
    for content, match in (
        (data[:-10], "no intact safetensors file: .*incomplete"),
        (b"\x00", "no intact safetensors file: .*header too small"),
        (b"PK" + data, "no intact safetensors file: .*header too large"),
        (data.replace(b'"BF16"', b'"XF16"'), "no intact safetensors file: .*XF16"),
        (data.replace(b'\\"dim\\": 16', b'\\"dim\\": 32'), r"does not fit the model 'alternating': .*wanted \["),
        (data.replace(b'"model":"alternating"', b'"model":"alternative"'), "must name a model"),
        (data[:-2] + b"\xff\x7f", "not finite"),
    ):
        assert content != data
        broken.write_bytes(content)
        with pytest.raises(WeightsError, match=match):
            load(broken)
    with pytest.raises(FileNotFoundError, match="one of"):
        load("nothing")
    with pytest.raises(ValueError, match="model must be one of"):
        build("nothing")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (json.dumps({**TINY, "depth": 10**9}), "metadata ask for depth=1000000000, and nothing in the file is larger"),
        (json.dumps({**TINY, "widths": [8, 10**12]}), "metadata ask for widths=1000000000000"),
        (json.dumps({**TINY, "depth": float("inf")}), "metadata ask for depth=inf"),
        (json.dumps({**TINY, "depth": "two"}), "arguments that make no alternating model: TypeError"),
        (json.dumps({**TINY, "heads": 0}), "arguments that make no alternating model: "),
        (json.dumps({**TINY, "dim": -16}), "arguments that make no alternating model: "),
        (json.dumps({**TINY, "colour": 1}), "arguments that make no alternating model: TypeError.*colour"),
        ("[" * 100_000, "arguments as JSON: RecursionError"),
        ('{"dim": ', "arguments as JSON: JSONDecodeError"),
        ("[1]", "arguments by name, got list"),
    ],
)
def test_metadata_that_ask_for_what_the_file_does_not_hold(model, tmp_path, arguments, match):
    path = tmp_path / "asks.safetensors"
    save_weights(model, path, {"model": "alternating", "arguments": arguments})
    begin = time.perf_counter()
    with pytest.raises(WeightsError, match=match):
        load(path)
    assert time.perf_counter() - begin < 20


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_of_weights_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for read in (load, metadata):
        with pytest.raises(FileNotFoundError, match=r"no file pipe\.safetensors"):
            read(tmp_path / "pipe.safetensors")


def test_shipped_weights_load_and_are_small():
    files = sorted(FOLDER.glob("*.safetensors"))
    assert [path.stem for path in files] == ["alternating", "recurrent"]
    assert sum(path.stat().st_size for path in files) < 24e6
    for path in files:
        assert path.stat().st_size < 12e6
        assert load(path.stem) is not None
        assert {"command", "seed"} <= set(metadata(path.stem))
