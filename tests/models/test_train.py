"""Training: it learns, it resumes exactly, and it stops before it is ruined."""

import csv
import json

import pytest
import torch

from gate4d.data import procedural
from gate4d.models import WeightsError, load, metadata, save_weights, train
from gate4d.models.train import Config, Training, TrainingDiverged

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

TINY = Config(
    steps=200, size=(16, 24), batch_frames=4, lengths=(2,), warmup=10, cooldown=50, lr=3e-3, bf16=False,
    arguments='{"dim": 16, "heads": 1, "depth": 2, "trunk": 1, "widths": [8, 8]}',
)  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Clips are rendered once for all tests here."""
    return tmp_path_factory.mktemp("clips")


@pytest.fixture
def single_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(training):
    return {**training.model.state_dict(), **{f"average {i}": x for i, x in enumerate(training.average)}}


def test_200_steps_lower_the_loss(tmp_path, stored, single_thread):
    training = Training(TINY, tmp_path, cache=stored)
    rows = [training.advance() for _ in range(200)]
    first, last = (torch.tensor([[r["motion"], r["depth"]] for r in part]).mean(0) for part in (rows[:20], rows[-20:]))
    assert (last < 0.8 * first).all(), (first, last)
    assert all(torch.isfinite(torch.tensor(list(r.values()))).all() for r in rows)


def test_resuming_gives_the_bits_of_an_uninterrupted_training(tmp_path, stored, single_thread):
    whole = Training(TINY, tmp_path / "whole", cache=stored)
    whole.run(stop=6)
    part = Training(TINY, tmp_path / "part", cache=stored)
    part.run(stop=3)
    again = Training(TINY, tmp_path / "part", cache=stored)
    assert not torch.equal(next(again.model.parameters()), next(part.model.parameters()))
    again.load()
    assert again.step == 3
    again.run(stop=6)
    for name, x in weights(whole).items():
        assert torch.equal(weights(again)[name], x), name
    assert [r["step"] for r in again.rows] == [3, 6]
    with pytest.raises(ValueError, match="lr must be"):
        Training(Config(**{**vars(TINY), "lr": 1e-3}), tmp_path / "part").load()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, stored, monkeypatch):
    training = Training(TINY, tmp_path, cache=stored)
    training.run(stop=2)
    kept, before = training.checkpoint.read_bytes(), {n: x.clone() for n, x in weights(training).items()}
    monkeypatch.setattr(train, "losses", poisoned(train.losses))
    with pytest.raises(TrainingDiverged, match=r"loss nan.* at step 2.*last\.pt"):
        training.run(stop=4)
    assert training.checkpoint.read_bytes() == kept
    assert all(torch.equal(x, before[n]) for n, x in weights(training).items())


def poisoned(function):
    def losses(*args):
        loss, terms, predictions = function(*args)
        return loss * float("nan"), terms, predictions

    return losses


def test_a_training_begins_with_what_two_models_share(tmp_path):
    whole = Training(TINY, tmp_path / "a")
    whole.export(tmp_path / "a.safetensors")
    widths = {"dim": 192, "heads": 3, "encoder": 1, "decoder": 1, "state": 4, "memory": 2, "widths": [8, 8]}
    other = Config(**{**vars(TINY), "model": "recurrent", "arguments": json.dumps(widths), "seed": 1})
    second = Training(other, tmp_path / "b")
    names = second.start_from(tmp_path / "a.safetensors")
    assert {"patch_embed.fine.weight", "matching.change.weight", "motion_head.out.weight"} <= set(names)
    own = second.model.state_dict()["matching.change.weight"]
    assert torch.equal(own, whole.model.aggregator.matching.change.weight.detach().bfloat16().float())
    save_weights(torch.nn.Linear(2, 2), tmp_path / "c.safetensors", {})
    with pytest.raises(WeightsError, match="no parameter in common"):
        second.start_from(tmp_path / "c.safetensors")


def test_clips_depend_on_seed_and_step_alone(stored):
    a, b, other = (train.clips(TINY, step) for step in (5, 5, 6))
    assert a[1] == b[1]
    assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    assert not torch.equal(a[0].images, other[0].images)
    first, again = (train.clips(TINY, 5, stored)[0] for _ in range(2))  # written, then read
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert (first.images - a[0].images).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(first.depth, a[0].depth)


def test_the_command_trains_resumes_and_exports(tmp_path, stored, capsys):
    common = ["--out", str(tmp_path), "--cache", str(stored), "--fp32", "--size", "16", "24", "--lengths", "2"]
    common += ["--batch-frames", "4", "--arguments", TINY.arguments, "--warmup", "2", "--cooldown", "1"]
    train.main([*common, "--steps", "2"])
    weights = tmp_path / "weights.safetensors"
    train.main([*common, "--steps", "3", "--resume", "--export", str(weights)])
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [r["step"] for r in rows] == ["2", "3"]
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert metadata(weights)["step"] == "3"
    assert "--resume" in metadata(weights)["command"]
    batch = next(procedural.evaluation_clips(3, 16, 24))
    assert torch.isfinite(load(weights)(batch.images)["motion"]).all()
    with pytest.raises(ValueError, match="model must be one of"):
        train.main([*common, "--model", "unknown"])
