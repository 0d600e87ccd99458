"""``gate4d eval``: what it measures, with systems that know the truth, and what it prints, with untrained models."""

import json

import numpy as np
import pytest
import torch

from gate4d.cli.eval import LEGEND, table
from gate4d.cli.main import main
from gate4d.data.procedural import evaluation_clips
from gate4d.evaluation import recipe
from gate4d.evaluation.study import measure
from gate4d.evaluation.systems import Prediction, System, _full, _masked, systems, token_causal
from gate4d.methods.segmentation import patch_masks
from gate4d.models import build, save_weights

SMALL = {"dim": 48, "heads": 2, "depth": 4, "widths": [8, 16]}


def small(seed=0):
    torch.manual_seed(seed)
    return build("alternating", **SMALL).eval()


@pytest.fixture(scope="module")
def clips():
    return list(evaluation_clips(6, 32, 40, count=6))[3:]


@pytest.fixture
def weights(tmp_path):
    """Files of untrained models by name."""
    arguments = {"alternating": SMALL, "recurrent": {"encoder": 1, "state": 4, "memory": 2, "widths": [8, 16]}}
    paths = {name: tmp_path / f"{name}.safetensors" for name in arguments}
    for name, path in paths.items():
        torch.manual_seed(0)
        about = {"model": name, "arguments": json.dumps(arguments[name]), "step": "0", "seed": "0"}
        save_weights(build(name, **arguments[name]), path, about)
    return paths


def knowing(scale=3.0, **changes):
    """A system that says the truth in another world and unit, but for the changes."""

    def run(model, clip):
        world = np.linalg.inv(clip.poses[0, 0].double().numpy())
        poses = world @ clip.poses[0].double().numpy()
        poses[:, :3, 3] *= scale
        truth = Prediction(poses, clip.depth[0].numpy() * scale, clip.masks[0].numpy())
        return truth._replace(**{name: change(getattr(truth, name)) for name, change in changes.items()})

    return System("test", "knowing", "none", run, causal=True)


def test_the_truth_has_no_error(clips):
    short, row = measure(knowing(), None, clips, [3, 6])
    for r in (short, row):
        np.testing.assert_allclose([r.ate, r.rpe_translation, r.rpe_rotation, r.abs_rel], 0, atol=1e-4)
        assert r.delta == r.iou == 1
        assert len(r.per_clip["ate"]) == 3
    assert (short.frames, row.frames) == (3, 6)


def test_errors_are_those_put_in(clips):
    def shifted(poses):
        poses = poses.copy()
        poses[::2, :3, 3] += 0.4
        return poses

    (row,) = measure(knowing(depth=lambda d: d * np.where(d > np.median(d), 1.5, 1.0)), None, clips, [6])
    assert row.ate < 1e-4
    assert 0.1 < row.abs_rel < 0.6
    (row,) = measure(knowing(poses=shifted), None, clips, [6])
    assert row.ate > 1e-3
    assert row.rpe_rotation < 1e-4
    (row,) = measure(knowing(masks=np.logical_not), None, clips, [6])
    assert row.iou == 0
    (row,) = measure(knowing(masks=lambda m: None), None, clips, [6])
    assert np.isnan(row.iou)
    with pytest.raises(ValueError, match="knowing: predicted must be finite"):
        measure(knowing(depth=lambda d: d * np.nan), None, clips, [6])


def test_a_still_camera_has_no_trajectory_error(clips):
    still = clips[0]._replace(poses=clips[0].poses[:, :1].expand(-1, 6, -1, -1).clone())
    (row,) = measure(knowing(), None, [still], [6])
    assert np.isnan(row.ate)
    assert np.isfinite(row.rpe_rotation)
    assert row.as_dict()["ate"] is None
    (both,) = measure(knowing(), None, [still, clips[1]], [6])
    assert np.isfinite(both.ate)


def test_causal_systems_run_once_and_others_for_each_length(clips):
    seen = []
    for causal in (True, False):
        inner = knowing()

        def run(model, clip, inner=inner):
            seen.append(clip.images.shape[1])
            return inner.run(model, clip)

        measure(System("test", "t", "none", run, causal), None, clips[:1], [2, 6])
    assert seen == [6, 6, 2]


def test_token_causal_blocks_see_no_later_token(clips):
    model, images = small(), clips[0].images
    block = model.aggregator.global_blocks[0]
    tokens = model.aggregator.layout(images).num_tokens
    x = torch.randn(1, tokens, SMALL["dim"], generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, tokens // 2] *= -1
    with torch.no_grad(), token_causal(model, images):
        moved = (block.select(x, None) != block.select(changed, None)).any(-1)[0]
    assert not moved[: tokens // 2].any()
    assert moved[tokens // 2 :].all()
    assert "select" not in block.__dict__


@torch.no_grad()
def test_true_masks_drop_what_moves(clips):
    model, clip = small(), clips[0]
    plain = _full(model, clip)
    nothing = _masked(model, clip._replace(masks=torch.zeros_like(clip.masks)), true=True)
    np.testing.assert_allclose(nothing.poses, plain.poses, atol=1e-6)
    assert np.abs(_masked(model, clip, true=True).poses - plain.poses).max() > 1e-6


def test_command_measures_skips_and_says_so(weights, tmp_path, capsys):
    out, doc = tmp_path / "eval.json", tmp_path / "doc.md"
    common = ["eval", "--clips", "2", "--frames", "4", "--long-clips", "1", "--lengths", "2,4", "--size", "32", "40"]
    files = [word for name, path in weights.items() for word in (f"--{name}", str(path))]
    assert main([*common, *files, "--json", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in printed if str(out) not in line) <= 80
    assert any(line.startswith("skipped, --unforced names no weights") for line in printed)
    result = json.loads(out.read_text())
    rows = {row["system"]: row for row in result["rows"]}  # of a recurrent system, the longest
    for system in systems():
        row = rows[system.name]
        if not system.weights:
            assert row["abs_rel"] > 0
        elif "forced" not in system.weights:
            assert row["skipped"] is None
            assert row["frames"] == 4
            assert 0 < row["abs_rel"] < 10
            assert 0 <= row["iou"] <= 1
            assert len(row["per_clip"]["rpe_rotation"]) == (1 if system.weights == "recurrent" else 2)
        else:
            assert f"--{system.weights} names no weights" in row["skipped"]
    gated = [row for row in result["rows"] if row["system"] in ("CUT3R-style", "MUT3R") and row["frames"] == 4]
    assert gated[0]["per_clip"]["abs_rel"] != gated[1]["per_clip"]["abs_rel"]
    assert rows["early masking, true masks"]["iou"] == 1
    doc.write_text("a\n<!-- begin: gate4d eval -->\nold\n<!-- end: gate4d eval -->\nz\n")
    assert main(["eval", "--markdown", str(out), "--into", str(doc)]) == 0
    text = doc.read_text()
    assert text.startswith("a\n<!-- begin")
    assert "old" not in text
    assert all(f"| {name} |" in text for name in rows)


def test_the_row_without_a_model(clips):
    row = measure(systems()[0], None, clips, [6])[0]
    moved = clips[1].poses[0, :, :3, 3] / clips[1].depth[0, 0].mean()
    spread = (moved - moved.mean(0)).square().sum(1).mean().sqrt()
    np.testing.assert_allclose(row.per_clip["ate"][1], spread, rtol=1e-4)
    assert row.iou == 0


def test_recipe_search_finds_the_map_that_shows_motion(clips):
    """Keys of moving patches are made alike, so their mean products stand out in the block where that was done."""
    model = small()

    def show(q, k, scale):
        layout = model.aggregator.layout(clips[0].images)
        moving = patch_masks(clips[0].masks[0], (4, 5))
        tokens = layout.token_scores(moving[None].float()).bool()
        k[:, :, tokens[0]] = 3.0

    model.aggregator.global_blocks[2].attn.control.observers.append(show)
    best = recipe.search(model, clips[:1])
    assert best[0][1] > 0.95
    assert any("kk" in name and "2" in name for name, _ in best[0][2])
    with pytest.raises(ValueError, match="moving and resting"):
        recipe.search(model, clips[1:2])


def test_weights_of_another_model_are_refused(weights, capsys):
    assert main(["eval", "--recurrent", str(weights["alternating"]), "--only", "TTT3R"]) == 2
    assert "--recurrent" in capsys.readouterr().err


def test_nothing_to_measure_is_status_1(capsys):
    assert main(["eval", "--only", "no forcing"]) == 1
    assert "skipped, --unforced names no weights" in capsys.readouterr().out


def test_quick_is_short_and_says_how_depth_was_aligned(weights, tmp_path, capsys):
    """Few clips and frames, whatever is not asked for; every alignment; the means of the masks."""
    out = tmp_path / "out.json"
    common = ["eval", "--quick", "--json", str(out), "--alternating", str(weights["alternating"])]
    common += ["--recurrent", str(weights["recurrent"]), "--size", "16", "24"]
    assert main([*common, "--align", "scale_and_shift"]) == 0
    assert "aligned once a clip (scale and shift)" in " ".join(capsys.readouterr().out.split())
    result = json.loads(out.read_text())
    assert (result["clips"], result["long_clips"], result["align"]) == (3, 1, "scale_and_shift")
    measured = [row for row in result["rows"] if not row["skipped"]]
    assert {row["frames"] for row in measured} == {8, 10}
    assert {s.name for s in systems() if "forc" not in s.name} == {row["system"] for row in measured}
    for row in measured:
        for name in ("iou_frames", "iou_sequences", "iou_recall"):
            assert 0 <= row[name] <= 1
    assert main(["eval", "--markdown", str(out)]) == 0
    assert "| JM f | JM s | JR |" in capsys.readouterr().out
    assert main([*common, "--clips", "2", "--only", "MoRe, frame-causal"]) == 0
    assert json.loads(out.read_text())["clips"] == 2


def test_depth_of_a_row_is_weighted_by_valid_pixels(clips):
    """A clip without truth in most of its pixels counts less; masks are averaged in three ways."""
    first = clips[0]._replace(depth=clips[0].depth.clone())
    first.depth[:, :, 4:] = torch.inf
    off = knowing(depth=lambda d: np.where(np.isfinite(d), d, 1.0) * np.linspace(1, 2, d.size).reshape(d.shape))
    row = measure(off, None, [first, clips[1]], [6], align="metric")[0]
    pixels = [int(first.depth.isfinite().sum()), clips[1].depth.numel()]
    assert pixels[0] < pixels[1]
    np.testing.assert_allclose(row.abs_rel, np.average(row.per_clip["abs_rel"], weights=pixels))
    assert row.abs_rel != pytest.approx(np.mean(row.per_clip["abs_rel"]))
    assert row.iou == row.iou_frames == row.iou_sequences == row.iou_recall == 1


def test_table_fits_whatever_the_figures():
    row = {"group": "alternating model", "frames": 300, "note": "", "skipped": None}
    figures = dict.fromkeys(("ate", "rpe_translation"), 0.9999) | {"rpe_rotation": 179.99, "abs_rel": 12.345}
    rows = [{**row, "system": s.name, **figures, "delta": 1.0, "iou": None, "fps": 1234.5} for s in systems()]
    unequal = {"alternating": {"step": "9", "text": "step 9"}, "unforced": {"step": "8", "text": "step 8"}}
    lines = table({"rows": rows, "weights": unequal})
    assert "are of 9 and 8 steps: their rows cannot be compared" in " ".join(lines)
    equal = {kind: {"step": "9", "text": ""} for kind in unequal}
    assert "cannot be compared" not in " ".join(table({"rows": rows, "weights": equal}))
    twins = {**unequal, "forced": {"step": "8", "text": ""}}
    assert "cannot be compared" not in " ".join(table({"rows": rows, "weights": twins}))
    assert max(map(len, lines)) <= 80
    assert all(word in " ".join(lines) for word in LEGEND[0].split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clips", "0"], "--clips must be at least 1"),
        (["--frames", "3"], "--frames must be at least 4"),
        (["--lengths", "10,x"], "--lengths"),
        (["--size", "30", "40"], "--size"),
        (["--only", "nonsense"], "--only"),
        (["--into", "x.md"], "--into needs --markdown"),
        (["--unforced", "nowhere.safetensors", "--only", "no forcing"], "nowhere.safetensors"),
        (["--markdown", "pyproject.toml"], "not a results file"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err
