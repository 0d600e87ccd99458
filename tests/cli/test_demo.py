"""The demo's model, its measurements and its demo_report."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from gate4d import TokenLayout, Visibility
from gate4d.benchmarks.measure.curves import Curve, Point, Study
from gate4d.benchmarks.measure.processes import Limits
from gate4d.benchmarks.models import SPECIAL_TOKENS, AlternatingStack
from gate4d.benchmarks.sequences import clip_stack
from gate4d.benchmarks.sequences.clip_stack import (
    IMPLEMENTATIONS,
    StackCase,
    dense_bias,
    frame_difference,
    gate4d_attention,
    pool_to_patches,
)
from gate4d.benchmarks.sequences.trained import reconstruct
from gate4d.cli import demo_report
from gate4d.cli.main import main
from gate4d.data import Clip, render_clip
from gate4d.models import build, load, save_weights

SMALL = {"heads": 2, "head_dim": 8, "patch": 4, "pairs": 2}


@pytest.fixture
def frames():
    return torch.randint(0, 256, (3, 8, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def motion():
    scores = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    scores[:, 0], scores[:, 1] = 0, 1
    return scores


# ---- model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (2, 1)])
def test_implementations_agree(frames, motion, strength, window, sinks):
    options = {"strength": strength, "window": window, "sinks": sinks}
    with torch.no_grad():
        exact = AlternatingStack(**SMALL).double()
        oracle = exact(frames, motion.double(), IMPLEMENTATIONS["maps"], **options)
        assert torch.isfinite(oracle).all()
        for implementation in IMPLEMENTATIONS.values():
            out = exact(frames, motion.double(), implementation, **options)
            assert (out - oracle).abs().max() < 1e-12 * oracle.abs().max()
        single = AlternatingStack(**SMALL)
        errors = {n: (single(frames, motion, f, **options) - oracle).abs().max() for n, f in IMPLEMENTATIONS.items()}
    rounding = torch.finfo(torch.float32).eps * oracle.abs().max()
    assert errors["gate4d"] <= 2 * errors["maps"] + rounding


def test_later_frames_change_nothing_before_them(frames, motion):
    model = AlternatingStack(**SMALL)
    changed = frames.clone()
    changed[2] = 255 - changed[2]
    with torch.no_grad():
        before, after = (model(x, motion, gate4d_attention) for x in (frames, changed))
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])


def test_static_tokens_do_not_see_dynamic_patches(frames):
    motion = torch.zeros(3, 6)
    motion[:, 1] = 1  # the patch of rows 0..3 and columns 4..7
    changed = frames.clone()
    changed[:, 0:4, 4:8] = 255 - changed[:, 0:4, 4:8]
    model = AlternatingStack(**SMALL)
    with torch.no_grad():
        gated = [model(x, motion, gate4d_attention) for x in (frames, changed)]
        plain = [model(x, motion, gate4d_attention, strength=0.0) for x in (frames, changed)]
    static = torch.arange(gated[0].shape[1]) != SPECIAL_TOKENS + 1
    assert torch.equal(gated[0][:, static], gated[1][:, static])
    assert not torch.equal(gated[0][:, ~static], gated[1][:, ~static])
    assert not torch.equal(plain[0][:, static], plain[1][:, static])


def test_dense_bias_by_hand():
    motion = torch.tensor([[0.0, 1.0, 0.5]])
    bias = dense_bias(motion, Visibility.frame_causal(TokenLayout(3, 1)), 2.0)[0, 0]
    inf = torch.inf
    expected = torch.tensor([[0, -inf, -inf], [0, 0, -inf], [0, 2 * np.log(0.5), 2 * np.log(0.75)]])
    torch.testing.assert_close(bias, expected.float())
    assert not dense_bias(motion, Visibility.full(), 0.0).isnan().any()


def test_weights_depend_on_the_seed_alone():
    first, second, other = (AlternatingStack(**SMALL, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


def test_patch_scores_follow_the_patch_embedding():
    motion = torch.zeros(1, 8, 12)
    motion[0, 4:8, 8:12] = 1
    motion[0, 0:2, 4:8] = 1
    assert pool_to_patches(motion, 4).tolist() == [[0, 0.5, 0, 0, 0, 1]]
    embed = AlternatingStack(**SMALL).embed
    tokens = embed(motion[:, None].expand(-1, 3, -1, -1)).flatten(2)[0].norm(dim=0)
    assert (tokens > 1e-3).tolist() == [False, True, False, False, False, True]


def test_frame_difference_finds_a_moving_square():
    clip = torch.full((5, 48, 48, 3), 90, dtype=torch.uint8)
    for t in range(5):
        clip[t, 20:28, 4 + 8 * t : 12 + 8 * t] = 230
    cue = frame_difference(clip, 4).view(5, 12, 12)
    assert cue.min() == 0
    assert cue.max() <= 1
    for t in range(1, 4):
        assert (cue[t, 5:7, 1 + 2 * t : 3 + 2 * t] == 1).all()
        assert cue[t].sum() == 4
    assert (frame_difference(clip[:1].expand(2, -1, -1, -1), 4) == 0).all()


# ---- measurement -------------------------------------------------------------------------------------------------


def test_measure_in_fresh_processes(frames, motion):
    case, limits = StackCase(model=SMALL), Limits(repeat_seconds=0.0, budget=600.0)
    steps = []
    names = ("SDPA + mask", "gate4d")
    study, gate_effect = clip_stack.measure(
        frames, motion, [2, 3], case, limits, lambda *step: steps.append(step), names
    )
    assert len(steps) == 6  # two first runs and a warm-up round at each count
    assert study.tokens_per_frame == 11
    assert list(study.differences) == [2, 3]
    assert study.differences[2] < 1e-5 < 1e-2 < gate_effect
    for curve in study.curves:
        assert [(p.frames, p.runs) for p in curve.points] == [(2, 1), (3, 1)]
        assert curve.stopped is None
        assert curve.points[0].fps > 0


def test_a_failing_implementation_fails_the_study(frames, motion):
    with pytest.raises(RuntimeError, match=r"nonsense did not start: KeyError: 'nonsense'"):
        clip_stack.measure(frames, motion, [2], StackCase(model=SMALL), Limits(), implementations=("nonsense",))


# ---- report ------------------------------------------------------------------------------------------------------


@pytest.fixture
def study():
    curves = [
        Curve("maps", [Point(2, (3.0,), 2**33)], "at 40 frames: out of memory, limit 2.0 GiB", "memory", 40),
        Curve("SDPA + mask", [Point(2, (0.001,) * 5, 2**20), Point(40, (1.0,), 2**40)]),
        Curve("gate4d", [Point(2, (2.0, 2.0), 2**20), Point(40, (10.0,), 2**21)]),
    ]
    return Study([2, 40], curves, {2: 1e-7, 40: 3e-7}, 1041, "measured", 2)


def test_table_fits_80_columns(study):
    lines = demo_report.speed_table(study)
    assert max(map(len, lines)) <= 80
    assert lines[-1].split() == ["40", "41640", "-", "-", "40.00", "1048576", "4.00", "2", "3.0e-07"]


def test_pictures_and_figures(tmp_path, study, motion):
    clip = Clip(torch.full((3, 8, 12, 3), 128, dtype=torch.uint8), "grey", torch.ones(3, 8, 12, dtype=torch.bool))
    demo_report.draw_curves(tmp_path / "curves.png", study, "subtitle")
    demo_report.draw_overlay(tmp_path / "overlay.png", clip, motion, 4, "a cue")
    for name in ("curves.png", "overlay.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)
        assert pixels.shape[0] > 200
        assert pixels.shape[1] > 300
        assert pixels.std() > 5
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 110)
    assert red.mean() > 0.1  # the true mask is everywhere
    data = json.loads(json.dumps(demo_report.figures(study, 0.3, clip, {"command": "gate4d demo"})))
    assert data["curves"]["gate4d"]["points"][1]["fps"] == 4.0
    assert data["curves"]["maps"]["stopped"].startswith("at 40")


def test_an_earlier_demo_is_replaced(tmp_path):
    out = tmp_path / "demo"
    for text in ("first", "second"):
        with demo_report.written_at_once(out) as folder:
            (folder / "figures.json").write_text(text)
    assert (out / "figures.json").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_failure_leaves_what_was_there(tmp_path):
    out = tmp_path / "demo"

    def interrupted():
        with demo_report.written_at_once(out) as folder:
            (folder / "curves.png").write_text("half")
            raise KeyboardInterrupt

    for expected in ([], ["demo"]):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert [p.name for p in tmp_path.iterdir()] == expected
        out.mkdir(exist_ok=True)
        (out / "figures.json").write_text("kept")
    assert [p.name for p in out.iterdir()] == ["figures.json"]


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name, error, what in (
        ("mine", FileExistsError, r"holds files that no demo wrote \(thesis.tex\)"),
        ("file", FileExistsError, "is not a folder"),
        ("link", FileExistsError, "is not a folder"),
        ("no/where", FileNotFoundError, "does not exist"),
    ):
        with pytest.raises(error, match=what), demo_report.written_at_once(tmp_path / name):
            pytest.fail("the body must not run")
    assert (tmp_path / "mine" / "thesis.tex").exists()


# ---- command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    """Of a small untrained model."""
    arguments = {"dim": 48, "heads": 2, "depth": 4, "widths": [8, 16]}
    torch.manual_seed(0)
    about = {"model": "alternating", "arguments": json.dumps(arguments)}
    save_weights(build("alternating", **arguments), tmp_path / "small.safetensors", about)
    return tmp_path / "small.safetensors"


def test_trained_model_beside_the_truth(tmp_path, weights):
    clip = render_clip(4, 32, 40, seed=1)
    outcomes = reconstruct(load(weights), clip, repeats=1)
    assert [o.name for o in outcomes] == ["no gates", "gates", "stream"]
    assert all(0 <= o.iou <= 1 and 0 < o.abs_rel < 10 and o.ate < 1 and o.fps > 0 for o in outcomes)
    np.testing.assert_array_equal(outcomes[0].masks, outcomes[1].masks)
    assert max(map(len, demo_report.trained_table(outcomes))) <= 80
    demo_report.draw_trained(tmp_path / "with.png", clip, outcomes)
    unknown = Clip(clip.frames, "unknown")
    outcomes = reconstruct(load(weights), unknown, repeats=1)
    assert outcomes[0].ate is outcomes[0].iou is None
    assert max(map(len, demo_report.trained_table(outcomes))) <= 80
    demo_report.draw_trained(tmp_path / "without.png", unknown, outcomes)
    sizes = [np.asarray(Image.open(tmp_path / n)).shape[0] for n in ("with.png", "without.png")]
    assert sizes[0] > sizes[1] > 300  # rows for the truth


def test_demo_command_on_a_folder(tmp_path, weights, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (28, 42, 3), dtype=np.uint8)).save(tmp_path / "in" / f"{i}.png")
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--frames", "2", "--window", "1", "--weights", str(weights)]
    assert main(["demo", str(tmp_path / "in"), *arguments]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[:-1])) <= 80  # the last line holds paths
    text = " ".join(text.split())
    assert "RANDOM WEIGHTS" in text
    assert "plain frame difference" in text
    assert "stream MoRe: frame by frame" in text
    assert sorted(p.name for p in out.iterdir()) == sorted(demo_report.FILES)
    data = json.loads((out / "figures.json").read_text())
    assert data["clip"]["tokens_per_frame"] == 11
    assert data["largest_relative_difference"]["2"] < 1e-4 < data["relative_difference_without_gate"]
    assert [run["name"] for run in data["trained"]["runs"]] == ["no gates", "gates", "stream"]
    assert data["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.mp4"], "nothing found at missing.mp4"),
        (["corrupt.mp4"], "corrupt.mp4 is not a readable video"),
        (["broken"], "frame 1 cannot be read, broken/1.png"),
        (["--frames", "1"], "--frames must be at least 2"),
        (["--window", "0"], "--window must be at least 1"),
        (["--strength", "-1"], "--strength must be finite and >= 0"),
        (["--strength", "nan"], "--strength must be finite"),
        (["--budget", "0"], "--budget must be positive"),
        (["--max-gib", "-2"], "--max-gib must be positive"),
        (["--weights", "nowhere.safetensors"], "name_or_path must be"),
        (["--weights", "corrupt.mp4"], "corrupt.mp4 is no intact safetensors file"),
        (["--out", "no/where"], "--out: the folder no does not exist"),
        (["--out", "broken"], "--out: broken holds files that no demo wrote"),
    ],
)
def test_bad_input_is_one_message_and_no_folder(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corrupt.mp4").write_bytes(b"nothing like a video" * 99)
    (tmp_path / "broken").mkdir()
    for i in range(3):
        Image.new("RGB", (28, 28)).save(tmp_path / "broken" / f"{i}.png")
    (tmp_path / "broken" / "1.png").write_bytes(b"oops")
    before = sorted(os.listdir())
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"gate4d demo: {message}" in error.replace("clip: ", "")
    assert "Traceback" not in error
    assert sorted(os.listdir()) == before


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "pip install 'gate4d[demo]'" in capsys.readouterr().err
