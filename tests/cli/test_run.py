"""``gate4d run``: files against the method's own results, the summary, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from standins import factories

import gate4d
from gate4d.cli.main import main
from gate4d.data import render_clip
from gate4d.methods.results import collect

pytest.importorskip("rich")
pytest.importorskip("skimage")
Image = pytest.importorskip("PIL.Image")

FRAMES = 5


def run(tmp_path, *args, **options):
    given = {"model": "standins.factories:dense_vggt", "frames": "rendered:3", "max-frames": FRAMES, "patches": 6}
    given |= {"out": tmp_path / "out", "device": "cpu", **{n.replace("_", "-"): v for n, v in options.items()}}
    return main(["run", *args, *(str(x) for n, v in given.items() for x in (f"--{n}", v))])


def images(patch, patches=6):
    from gate4d.data.clip import fitted_size

    clip = render_clip(FRAMES, *fitted_size(392, 518, patch=patch, max_patches=patches), seed=3)
    return clip, clip.frames.permute(0, 3, 1, 2).float() / 255


CASES = {
    "more": ("dense_vggt", 14, {"masks", "overlays", "scores.npz", "poses.txt", "points.ply"}),
    "vggt4d": ("deep_vggt", 14, {"masks", "overlays", "scores.npz", "poses.txt", "points.ply"}),
    "mut3r": ("dense_cut3r", 16, {"masks", "overlays", "scores.npz", "poses.txt", "points.ply"}),
    "ttt3r": ("dense_cut3r", 16, {"scores.npz", "poses.txt", "points.ply"}),
}


@pytest.mark.parametrize("method", CASES)
def test_files_hold_what_the_method_found(method, tmp_path, capsys):
    factory, patch, files = CASES[method]
    assert run(tmp_path, method, model=f"standins.factories:{factory}") == 0
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == files | {"summary.json"}
    clip, frames = images(patch)
    with gate4d.patch(getattr(factories, factory)(), method=method) as handle:
        found = collect(handle.run(frames), tuple(frames.shape[-2:]))
    rows = np.loadtxt(out / "poses.txt")
    assert rows.shape == (FRAMES, 8)
    np.testing.assert_allclose(rows[:, 1:4], found.poses[:, :3, 3], atol=1e-6)
    assert torch.isfinite(found.poses).all()
    with np.load(out / "scores.npz") as saved:
        assert set(saved.files) == set(found.scores)
        for name, x in found.scores.items():
            assert len(x) == FRAMES
            np.testing.assert_array_equal(saved[name], x.numpy())
    header, _, body = (out / "points.ply").read_bytes().partition(b"end_header\n")
    count = int(header.split(b"element vertex ")[1].split()[0])
    assert len(body) == 15 * count
    still = found.points.isfinite().all(-1) if found.masks is None else ~found.masks
    assert 0.4 * still.sum() <= count <= 0.6 * still.sum() + 256 * FRAMES  # stand-ins are as sure of a whole patch
    summary = json.loads((out / "summary.json").read_text())
    assert summary["frames"] == FRAMES
    assert summary["fps"] > 0
    assert summary["peak_bytes"] > 2**20
    text = capsys.readouterr().out
    assert f"{FRAMES} of {frames.shape[3]}x{frames.shape[2]} pixels" in text
    if found.masks is None:
        assert summary["dynamic_share"] is None
        assert "no masks" in text
        return
    for t in range(FRAMES):
        assert np.array_equal(np.asarray(Image.open(out / "masks" / f"{t:06d}.png")) > 0, found.masks[t].numpy())
    assert len(list((out / "overlays").iterdir())) == FRAMES
    assert summary["dynamic_share"] == pytest.approx(float(found.masks.float().mean()))
    assert summary["dynamic_share_true"] == pytest.approx(float(clip.motion.float().mean()))


def test_poses_in_the_conventions_of_both_families():
    """World to camera with the scalar last, and camera to world with the scalar first, to the same matrices."""
    turn = torch.linalg.matrix_exp(torch.tensor([[0.0, -0.3, 0.2], [0.3, 0.0, -0.5], [-0.2, 0.5, 0.0]]).double())
    x, y, z, w = gate4d.methods.export.quaternions(turn.numpy()[None])[0]
    centre = torch.tensor([1.0, -2.0, 0.5]).double()
    vggt = torch.tensor([[[*(-turn.T @ centre).tolist(), -x, -y, -z, w, 1.0, 1.0]]]).double()
    cut3r = torch.tensor([[*centre.tolist(), w, x, y, z]]).double()
    for prediction in ({"pose_enc": vggt}, {"camera_pose": vggt[:, 0]}, {"camera_pose": cut3r}):
        result = gate4d.methods.Ttt3rResult([prediction], torch.ones(1, 1, 4), None)
        (pose,) = collect(result, (32, 48)).poses
        torch.testing.assert_close(pose[:3, :3], turn, atol=1e-6, rtol=0)
        torch.testing.assert_close(pose[:3, 3], centre, atol=1e-6, rtol=0)


def test_options_reach_the_method_and_a_folder_is_read(tmp_path, capsys):
    folder = tmp_path / "clip"
    folder.mkdir()
    for n in range(4):
        Image.fromarray(np.full((30, 50, 3), 60 * n, dtype=np.uint8)).save(folder / f"{n}.png")
    chosen = ["--option", "window=2", "--option", "causal=token"]
    assert run(tmp_path, "more", *chosen, frames=folder) == 0
    assert "4 of 42x28 pixels, from clip" in capsys.readouterr().out
    with np.load(tmp_path / "out" / "scores.npz") as saved:
        assert saved["refined"].tolist() == [False, False, True, True]
    Image.fromarray(np.zeros((30, 40, 3), dtype=np.uint8)).save(folder / "9.png")
    assert run(tmp_path, "more", frames=folder, out=tmp_path / "other") == 2
    assert "all frames must have one size" in capsys.readouterr().err


def test_nothing_moves_is_said(tmp_path, capsys):
    assert run(tmp_path, "more", model="standins.factories:still_vggt") == 0
    text = capsys.readouterr().out
    assert "nothing moves: the masks are empty" in text
    assert "0.0% of the pixels" in text
    assert not any(np.asarray(Image.open(p)).any() for p in (tmp_path / "out" / "masks").iterdir())


def test_a_model_saved_whole_needs_trust(tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save(factories.dense_vggt(), path)
    assert run(tmp_path, "more", model=path) == 2
    assert "can run any code" in capsys.readouterr().err
    assert run(tmp_path, "more", "--trust", model=path) == 0
    torch.save(factories.dense_vggt().state_dict(), path)
    assert run(tmp_path, "more", "--trust", model=path, out=tmp_path / "other") == 2
    assert "a checkpoint of weights needs MODULE:FACTORY" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("moer", {}, "method must be one of"),
        ("mut3r", {}, "needs a model of the family cut3r"),
        ("more", {"model": "standins.factories:dense_cut3r"}, "needs a model of the family vggt"),
        ("more", {"model": "standins.factories:nothing"}, "has no factory 'nothing'"),
        ("more", {"model": "standins.factories:no_model"}, "must be a torch.nn.Module, got dict"),
        ("more", {"model": "no_such_module:make"}, "No module named 'no_such_module'"),
        ("more", {"frames": "nowhere.mp4"}, "nothing found at nowhere.mp4"),
        ("more", {"frames": "rendered:x"}, "rendered:SEED needs a whole number"),
        ("more", {"max_frames": 1}, "--max-frames must be at least 2"),
        ("more", {"device": "cuda:99"}, "--device cuda:99 cannot be used"),
        ("more", {"option": "window"}, "--option must be NAME=VALUE"),
        ("more", {"option": "window=0"}, "window must be None or an int >= 1"),
        ("more", {"option": "speed=2"}, "unexpected keyword argument 'speed'"),
        ("vggt4d", {"model": "standins.factories:dense_vggt"}, "recipe needs global blocks"),
    ],
)
def test_bad_input_is_one_paragraph(method, options, message, tmp_path, capsys):
    assert run(tmp_path, method, **options) == 2
    assert message in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert run(tmp_path, "more") == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert run(tmp_path, "more", out=tmp_path / "no" / "out") == 2
    assert "does not exist" in capsys.readouterr().err
    one = tmp_path / "one"
    one.mkdir()
    Image.fromarray(np.zeros((30, 50, 3), dtype=np.uint8)).save(one / "0.png")
    assert run(tmp_path, "more", frames=one, out=tmp_path / "new") == 2
    assert "at least 2 frames are needed" in capsys.readouterr().err
