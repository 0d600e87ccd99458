"""``gate4d run``: files against the method's own results, the summary, and what is refused."""

import errno
import json
import os
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from helpers.processes import gate4d_process, interrupted
from standins import factories

import gate4d
from gate4d.cli.main import main
from gate4d.data import render_clip
from gate4d.geometry import matrix_to_quaternion
from gate4d.methods import export
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
    assert summary["dynamic_share_true"] == pytest.approx(float(clip.masks.float().mean()))


def test_poses_in_the_conventions_of_both_families():
    """World to camera with the scalar last, and camera to world with the scalar first, to the same matrices."""
    turn = torch.linalg.matrix_exp(torch.tensor([[0.0, -0.3, 0.2], [0.3, 0.0, -0.5], [-0.2, 0.5, 0.0]]).double())
    x, y, z, w = matrix_to_quaternion(turn).tolist()
    centre = torch.tensor([1.0, -2.0, 0.5]).double()
    vggt = torch.tensor([[[*(-turn.T @ centre).tolist(), -x, -y, -z, w, 1.0, 1.0]]]).double()
    cut3r = torch.tensor([[*centre.tolist(), w, x, y, z]]).double()
    for prediction in ({"pose_enc": vggt}, {"camera_pose": vggt[:, 0]}, {"camera_pose": cut3r}):
        result = gate4d.methods.Ttt3rResult([prediction], None, rates=torch.ones(1, 1, 4))
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
        ("more", {"start": -1}, "--start must be at least 0"),
        ("more", {"device": "cuda:99"}, "--device cuda:99 cannot be used"),
        ("more", {"option": "window"}, "--option must be NAME=VALUE"),
        ("more", {"option": "window=0"}, "window must be None or an int >= 1"),
        ("more", {"option": "speed=2"}, "more has no option speed; it has anchors, camera_pass, causal, window"),
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


# ---- what ends a run early, and what it leaves behind -------------------------------------------------------------


@pytest.mark.parametrize("existing", [False, True])
def test_ctrl_c_leaves_nothing_behind(existing, tmp_path, capsys):
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    arguments = ["run", "ttt3r", "--model", "standins.factories:dense_cut3r", "--frames", "rendered:3", "--out", out]
    process = gate4d_process([*arguments, "--max-frames", 100_000, "--patches", 6])
    begin = time.monotonic()
    wait = 5 * existing  # at once, or in the middle of the work
    interrupted(process, lambda: any(tmp_path.glob("**/.out-*")) and time.monotonic() > begin + wait)
    assert sorted(p.name for p in tmp_path.rglob("*")) == (["out"] if existing else [])
    assert run(tmp_path, "ttt3r", model="standins.factories:dense_cut3r") == 0  # and the folder can be used
    capsys.readouterr()


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("where", ["save_ply", "save_tum", "save_masks"])
def test_a_full_disk_leaves_nothing_behind(existing, where, tmp_path, capsys, monkeypatch):
    def full(path, *args):
        (path if where == "save_masks" else path.parent).mkdir(exist_ok=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(export, where, full)
    if existing:
        (tmp_path / "out").mkdir()
    assert run(tmp_path, "more") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == (["out"] if existing else [])


def test_an_empty_folder_is_filled_and_not_replaced(tmp_path, capsys):
    """It may be a mount point, or belong to somebody."""
    out = tmp_path / "out"
    out.mkdir()
    before = out.stat().st_ino
    assert run(tmp_path, "more") == 0
    assert out.stat().st_ino == before
    assert not list(tmp_path.rglob(".out-*"))
    assert str(out / "poses.txt") in capsys.readouterr().out


BAD_FACTORIES = """
import torch

def runtime():
    raise RuntimeError("the weights do not fit")

def key():
    return {}["backbone"]

def leaves():
    raise SystemExit(3)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.part = torch.nn.Linear(3)
"""


@pytest.mark.parametrize(
    ("factory", "said", "their_line"),
    [
        ("runtime", "mine:runtime() raised RuntimeError: the weights do not fit.", "in runtime"),
        ("key", "mine:key() raised KeyError: 'backbone'.", "in key"),
        ("leaves", "mine:leaves() exited with status 3.", "in leaves"),
        ("Model", "mine:Model() raised TypeError", "in __init__"),
        (None, "importing mine raised SyntaxError", "def runtime(:"),
        ("import", "importing mine raised ModuleNotFoundError: No module named 'no_such_package'.", "no_such_package"),
    ],
)
def test_exceptions_of_the_factory_are_theirs(factory, said, their_line, tmp_path, capsys, monkeypatch):
    text = BAD_FACTORIES if factory else BAD_FACTORIES.replace("runtime()", "runtime(")
    text = "import no_such_package\n" if factory == "import" else text
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert run(tmp_path, "more", model=f"mine:{factory or 'runtime'}") == 2
    sys.modules.pop("mine", None)
    paragraph, _, below = capsys.readouterr().err.partition("\n\nThe traceback of that code, which is not gate4d's:\n")
    assert "gate4d run: --model: " in paragraph
    assert said in " ".join(paragraph.split())
    assert their_line in below
    assert 'mine.py", line' in below
    assert "gate4d/cli" not in below
    assert not (tmp_path / "out").exists()


def test_what_the_model_raises_in_a_run_is_theirs(tmp_path, capsys):
    assert run(tmp_path, "more", model="standins.factories:failing_vggt") == 2
    err = capsys.readouterr().err
    assert "the model, while the method ran it, raised ZeroDivisionError" in err
    assert "in forward" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "meta"}, "--device meta cannot be used"),
        ({"fps": 0}, "--fps must be a number > 0"),
        ({"option": "layers=" + "[" * 5000}, "more has no option layers; it has"),
        ({"option": "nonsense=1"}, "more has no option nonsense; it has anchors, camera_pass, causal, window"),
        ({"model": ":make"}, "no module before the colon"),
        ({"model": "missing.safetensors"}, "no file missing.safetensors"),
    ],
)
def test_more_bad_input_is_one_paragraph(options, message, tmp_path, capsys):
    assert run(tmp_path, "more", **options) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["--model", "--frames"])
def test_pipes_are_refused_and_not_waited_for(what, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.pt")
    if what == "--frames":
        assert run(tmp_path, "more", frames=tmp_path / "pipe") == 2
        assert "is neither a file nor a folder" in capsys.readouterr().err
        return
    assert run(tmp_path, "more", model=tmp_path / "pipe") == 2
    assert "no file pipe" in capsys.readouterr().err
    assert run(tmp_path, "more", "--trust", model=tmp_path / "pipe.pt") == 2
    assert "there is no file" in capsys.readouterr().err


def test_a_clip_of_one_pixel_is_refused(tmp_path, capsys):
    (tmp_path / "clip").mkdir()
    for n in range(3):
        Image.fromarray(np.full((1, 1, 3), 90 * n, np.uint8)).save(tmp_path / "clip" / f"{n}.png")
    assert run(tmp_path, "more", model="alternating", frames=tmp_path / "clip") == 2
    assert "frames must be at least 4 pixels wide and high" in capsys.readouterr().err


# ---- times, checkpoints, options ----------------------------------------------------------------------------------


def test_poses_have_the_clips_times_or_seconds(tmp_path, capsys):
    def stamps(name, **options):
        assert run(tmp_path, "more", out=tmp_path / name, **options) == 0
        return np.loadtxt(tmp_path / name / "poses.txt")[:, 0]

    rate = render_clip(2, 28, 28).times[1]
    np.testing.assert_allclose(stamps("rendered"), np.arange(FRAMES) * float(rate), atol=1e-6)
    for folder, names, options, expected in (
        ("numbers", ("0", "1", "2", "3"), {"fps": 10, "stride": 2}, [0, 0.2]),
        ("tum", ("1341846313.592026", "1341846313.628014"), {}, [1341846313.592026, 1341846313.628014]),
    ):
        (tmp_path / folder).mkdir()
        for n, name in enumerate(names):
            Image.fromarray(np.full((30, 50, 3), 60 * n, dtype=np.uint8)).save(tmp_path / folder / f"{name}.png")
        np.testing.assert_allclose(
            stamps(f"{folder}-out", frames=tmp_path / folder, **options), expected, atol=2e-6, rtol=0
        )
    capsys.readouterr()


def test_random_weights_are_noted(tmp_path, capsys):
    assert run(tmp_path, "more") == 0
    assert "dense_vggt loaded no checkpoint" in " ".join(capsys.readouterr().out.split())
    assert run(tmp_path, "more", model="standins.factories:DenseSmall", out=tmp_path / "class") == 0
    assert "DenseSmall loaded no checkpoint" in " ".join(capsys.readouterr().out.split())
    before = torch.load, torch.nn.Module.load_state_dict
    assert run(tmp_path, "more", model="standins.factories:loaded_vggt", out=tmp_path / "loaded") == 0
    assert "no checkpoint" not in capsys.readouterr().out
    assert (torch.load, torch.nn.Module.load_state_dict) == before


def test_a_refinement_that_fails_is_a_note_and_everything_else_is_written(tmp_path, capsys):
    """Real VGGT with random weights: a field of view of 0."""
    pytest.importorskip("sklearn")
    assert run(tmp_path, "vggt4d", model="standins.factories:blind_vggt") == 0
    assert "the masks were not refined: intrinsics must be finite" in " ".join(capsys.readouterr().out.split())
    assert {"masks", "overlays", "scores.npz", "poses.txt", "summary.json"} == {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert "not refined" in " ".join(json.loads((tmp_path / "out" / "summary.json").read_text())["notes"])


def test_keep_says_what_is_written(tmp_path, capsys):
    model = "standins.factories:dense_cut3r"
    assert run(tmp_path, "ttt3r", "--option", "keep=camera_pose", model=model) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"scores.npz", "poses.txt", "summary.json"}
    assert run(tmp_path, "ttt3r", "--option", "keep=camera", model=model, out=tmp_path / "other") == 2
    assert "keep must name entries of the predictions" in capsys.readouterr().err


def test_frames_by_default(tmp_path, capsys):
    """All where they are read one by one; else 24, with a word about the rest."""
    clip = tmp_path / "clip"
    clip.mkdir()
    for i, frame in enumerate(render_clip(26, 28, 42, seed=1).frames):
        Image.fromarray(frame.numpy()).save(clip / f"{i:02}.png")

    def summary(method, out, *more, **options):
        command = [
            "run",
            method,
            "--frames",
            str(clip),
            "--device",
            "cpu",
            "--patches",
            "6",
            "--out",
            str(tmp_path / out),
        ]
        given = [str(x) for n, v in options.items() for x in (f"--{n}", v)]
        assert main([*command, *given, *more]) == 0, capsys.readouterr().err
        rows = np.loadtxt(tmp_path / out / "poses.txt")
        return json.loads((tmp_path / out / "summary.json").read_text()), rows

    found, _ = summary("more", "all", model="standins.factories:dense_vggt")
    assert found["frames"] == 26
    found, rows = summary(
        "more", "some", "--start", "4", "--stride", "3", "--fps", "10", model="standins.factories:dense_vggt"
    )
    assert found["frames"] == 8
    np.testing.assert_allclose(rows[:, 0], (4 + 3 * np.arange(8)) / 10)
    found, _ = summary("vggt4d", "once", model="standins.factories:deep_vggt")
    assert found["frames"] == 24
    assert any("vggt4d sees all frames at once, so the first 24 were read" in note for note in found["notes"])


def test_autocast(tmp_path):
    """The model runs in 16 bits: results differ by about their step."""
    poses = []
    for name, more in (("plain", ()), ("amp", ("--amp", "bf16"))):
        assert run(tmp_path, "more", *more, out=tmp_path / name) == 0
        poses.append(np.loadtxt(tmp_path / name / "poses.txt")[:, 1:])
    difference = np.abs(poses[0] - poses[1]).max()
    assert 0 < difference < 0.1
