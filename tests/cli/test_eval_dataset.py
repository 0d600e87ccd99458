"""``gate4d eval --dataset`` on rendered clips in every data set's form: ideal scores, known errors, resuming."""

import json

import numpy as np
import pytest
import torch

from gate4d.cli.main import main
from gate4d.data import render_clip
from gate4d.data.datasets import DATASETS, Selection, read_dataset
from gate4d.evaluation.predict import Said, truth
from gate4d.evaluation.sequences import measure_sequence
from gate4d.methods.export import save_masks, save_tum
from gate4d.models import build, save_weights
from tests.helpers.datasets import write

# Frames of the fixtures that make a short clip of the protocol's: --stride 1, and Bonn's rows.
ALL = {"bonn": ["--start", "30"]}


@pytest.fixture(scope="module")
def clip():
    return render_clip(7, 32, 40, seed=6)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder, arguments = tmp_path_factory.mktemp("weights"), {}
    arguments["alternating"] = {"dim": 48, "heads": 2, "depth": 4, "widths": [8, 16]}
    arguments["recurrent"] = {"encoder": 1, "state": 4, "memory": 2, "widths": [8, 16]}
    for name, given in arguments.items():
        torch.manual_seed(0)
        about = {"model": name, "arguments": json.dumps(given), "step": "0", "seed": "0"}
        save_weights(build(name, **given), folder / f"{name}.safetensors", about)
    return folder


def evaluated(name, root, *words):
    """The results file of a command that must go well."""
    out = root.parent / "out.json"
    command = ["eval", "--dataset", name, "--root", str(root), "--json", str(out), "--stride", "1", *ALL.get(name, [])]
    assert main([*command, *map(str, words)]) == 0
    return json.loads(out.read_text())


def said_by(root, sequence, poses, depth=None, masks=None):
    """Files of a prediction."""
    folder = root / sequence
    folder.mkdir(parents=True)
    save_tum(folder / "poses.txt", poses)
    if depth is not None:
        (folder / "depth").mkdir()
        for n, x in enumerate(depth):
            np.save(folder / "depth" / f"{n:06d}.npy", x)
    if masks is not None:
        save_masks(folder / "masks", masks)
    return root


@pytest.mark.parametrize("name", DATASETS)
def test_the_truth_has_the_ideal_score(name, clip, tmp_path, capsys):
    write(name, clip, tmp_path / "set")
    result = evaluated(name, tmp_path / "set", "--predict", "truth")
    protocol, total = DATASETS[name].protocol, result["summary"]
    printed = capsys.readouterr().out
    for measure in protocol.measures:
        assert total["counted"][measure] == 1
    if "cameras" in protocol.measures:
        np.testing.assert_allclose(
            [total["cameras"][n] for n in ("ate", "rpe_translation", "rpe_rotation")], 0, atol=1e-6
        )
        assert "ATE" in printed
    for align in protocol.alignments if "depth" in protocol.measures else ():
        found = total["depth"][align]
        np.testing.assert_allclose([found[n] for n in ("abs_rel", "sq_rel", "rmse", "log_rmse")], 0, atol=2e-3)
        assert found["delta"] == found["delta2"] == found["delta3"] == 1
        assert f"depth, {align.replace('_', ' ')}" in printed
    if "masks" in protocol.measures:
        assert set(total["masks"].values()) == {1.0}
    assert protocol.source in printed


def test_known_perturbations_give_known_errors(clip, tmp_path):
    """Depth a tenth too large; masks of which half the rows are missing; one camera moved in a world of 3 times."""
    write("sintel", clip, tmp_path / "set")
    poses = clip.poses.clone()
    poses[:, :3, 3] *= 3
    said_by(tmp_path / "ideal", "alley_2", poses, clip.depth.numpy() * 1.1, torch.zeros_like(clip.masks))
    total = evaluated("sintel", tmp_path / "set", "--predictions", tmp_path / "ideal")["summary"]
    assert total["cameras"]["ate"] < 1e-6
    depth = total["depth"]
    np.testing.assert_allclose((depth["metric"]["abs_rel"], depth["metric"]["delta"]), (0.1, 1), rtol=1e-6)
    np.testing.assert_allclose(depth["metric"]["log_rmse"], np.log(1.1), rtol=1e-6)
    np.testing.assert_allclose(depth["scale"]["abs_rel"], 0, atol=1e-6)
    assert (clip.masks.any((1, 2))).all()
    assert (total["masks"]["jm"], total["masks"]["fm"]) == (0, 0)

    turn = clip.poses.clone()  # every second camera turned by 2 degrees about its axis: each step errs by 2
    angle = np.radians(2)
    about = torch.eye(4, dtype=torch.float64)
    about[:2, :2] = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn[::2] = turn[::2] @ about
    said_by(tmp_path / "turned", "alley_2", turn)
    result = evaluated("sintel", tmp_path / "set", "--predictions", tmp_path / "turned")
    np.testing.assert_allclose(result["summary"]["cameras"]["rpe_rotation"], 2, rtol=1e-5)
    assert result["summary"]["cameras"]["ate"] < 1e-6
    assert result["summary"]["depth"] is None  # nothing was said


def test_depth_of_another_size_is_scaled(clip, tmp_path):
    write("dycheck", clip, tmp_path)
    (sequence,) = read_dataset("dycheck", tmp_path, selection=Selection())
    protocol = DATASETS["dycheck"].protocol
    half = [np.full((16, 20), 2.0) for _ in range(7)]
    found = measure_sequence(sequence, Said(depth=half), protocol)["depth"]["metric"]
    true = clip.depth.double().numpy()
    np.testing.assert_allclose(found["abs_rel"], (np.abs(2 - true) / true).mean(), rtol=1e-12)
    with pytest.raises(ValueError, match="sequence apple: depth of 3 frames were predicted, there are 7"):
        measure_sequence(sequence, Said(depth=half[:3]), protocol)
    half[2] = half[2] * np.nan
    with pytest.raises(ValueError, match="sequence apple: predicted must be finite"):
        measure_sequence(sequence, Said(depth=half), protocol)


def test_lost_poses_and_cameras_on_a_line_do_not_count(clip, tmp_path):
    write("scannet", clip, tmp_path)
    (sequence,) = read_dataset("scannet", tmp_path, selection=Selection())
    protocol = DATASETS["scannet"].protocol
    sequence.poses[2] = -np.inf
    wrong = clip.poses.numpy().copy()
    wrong[2, :3, 3] = 99
    found = measure_sequence(sequence, Said(poses=wrong), protocol)["cameras"]
    assert found["ate"] < 1e-9
    assert found["poses"] == 6
    still = clip.poses.numpy().copy()
    still[:, :3, 3] = 1
    assert measure_sequence(sequence, Said(poses=still), protocol)["cameras"] is None
    kept = measure_sequence(sequence, Said(poses=still), protocol, skip_degenerate=False)
    assert kept["cameras"]["ate"] > 1e-3


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize(("model", "method"), [("alternating", None), ("recurrent", "ttt3r")])
def test_models_and_methods_run(name, model, method, clip, weights, tmp_path, capsys):
    write(name, clip, tmp_path / "set")
    words = ["--method", method] if method else []
    result = evaluated(name, tmp_path / "set", "--model", weights / f"{model}.safetensors", "--patches", "20", *words)
    total, protocol = result["summary"], DATASETS[name].protocol
    for measure in protocol.measures:
        assert total["counted"][measure] == 1, measure
    if "depth" in protocol.measures:
        assert 0 < total["depth"]["scale"]["abs_rel"] < 20
    if "masks" in protocol.measures:
        assert 0 <= total["masks"]["jm"] < 1
    if "cameras" in protocol.measures:
        assert total["cameras"]["ate"] > 0
    assert result["setup"]["method"] == method


def test_a_method_is_not_the_plain_model(clip, weights, tmp_path):
    write("bonn", clip, tmp_path / "set")
    model = ["--model", weights / "recurrent.safetensors"]
    plain, ttt3r = (evaluated("bonn", tmp_path / "set", *model, *w)["summary"] for w in ([], ["--method", "ttt3r"]))
    assert plain["depth"]["scale"]["abs_rel"] != ttt3r["depth"]["scale"]["abs_rel"]


def test_what_stopped_goes_on(clip, tmp_path, monkeypatch, capsys):
    """Two sequences; the second one's depth is broken, then mended: the first one is not measured again."""
    root, out = tmp_path / "set", tmp_path / "out.json"
    write("kitti", clip, root)
    (root / "val" / "2011_09_26_drive_0002_sync").rename(root / "val" / "2011_09_26_drive_0005_sync")
    (root / "2011_09_26" / "2011_09_26_drive_0002_sync").rename(root / "2011_09_26" / "2011_09_26_drive_0005_sync")
    write("kitti", clip, root)
    file = root / "val" / "2011_09_26_drive_0005_sync" / "proj_depth" / "groundtruth" / "image_02" / "0000000006.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:60])
    command = ["eval", "--dataset", "kitti", "--root", str(root), "--predict", "truth", "--json", str(out)]
    assert main(command) == 2
    assert str(file) in capsys.readouterr().err
    first = json.loads(out.read_text())["rows"]
    assert [row["sequence"] for row in first] == ["2011_09_26_drive_0002_sync_02"]
    file.write_bytes(whole)
    asked = []
    monkeypatch.setattr("gate4d.evaluation.predict.truth", lambda s: asked.append(s.name) or truth(s))
    assert main([*command, "--resume", "--stride", "2"]) == 2
    assert "is of another run: selection [0, 1, 110] there and [0, 2, 110] here" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    result = json.loads(out.read_text())
    assert asked == ["2011_09_26_drive_0005_sync_02"]
    assert result["rows"][0] == first[0]
    assert result["summary"]["counted"] == {"depth": 2}

    def interrupted(sequence):
        if sequence.name.endswith("0005_sync_02"):
            raise KeyboardInterrupt
        return truth(sequence)

    out.unlink()
    monkeypatch.setattr("gate4d.evaluation.predict.truth", interrupted)
    assert main([*command, "--resume"]) == 130
    assert "--resume goes on" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["rows"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predict", "truth"], "--dataset needs --root"),
        (["--root", "SET"], "needs one of --model, --predict truth and --predictions DIR, got none"),
        (["--root", "SET", "--predict", "truth", "--model", "recurrent"], "got --model and --predict"),
        (["--root", "SET", "--predict", "truth", "--method", "more"], "need --model"),
        (["--root", "SET", "--model", "recurrent", "--option", "a=1"], "it needs --method"),
        (["--root", "SET", "--predict", "truth", "--align", "scale"], "--align is of rendered clips"),
        (["--root", "SET", "--model", "recurrent", "--method", "ttt3r", "--option", "a=1"], "ttt3r has no option a"),
        (["--root", "SET", "--predict", "truth", "--resume"], "--resume needs --json"),
        (["--root", "SET", "--predict", "truth", "--stride", "0"], "--stride must be at least 1"),
        (["--root", "SET", "--predict", "truth", "--start", "6"], "leaves 1 frames"),
        (["--root", "SET", "--predict", "truth", "--sequences", "nothing"], "nothing"),
        (["--root", "nowhere", "--predict", "truth"], "there is no folder nowhere"),
        (["--root", "SET", "--predictions", "nowhere"], "must hold poses.txt"),
    ],
)
def test_bad_input(words, message, clip, tmp_path, capsys):
    write("sintel", clip, tmp_path)
    assert main(["eval", "--dataset", "sintel", *(w.replace("SET", str(tmp_path)) for w in words)]) == 2
    assert message in capsys.readouterr().err


def test_options_need_the_data_set(capsys):
    assert main(["eval", "--start", "0", "--resume"]) == 2
    assert "--start, --resume need --dataset NAME" in capsys.readouterr().err


def test_names_and_folders_of_other_sets(clip, tmp_path, capsys):
    write("sintel", clip, tmp_path)
    common = ["--root", str(tmp_path), "--predict", "truth"]
    assert main(["eval", "--dataset", "nyu", *common]) == 2
    assert "--dataset must be one of sintel" in capsys.readouterr().err
    assert main(["eval", "--dataset", "bonn", *common]) == 2
    assert "it looks like sintel" in capsys.readouterr().err
