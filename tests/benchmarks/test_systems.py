"""``gate4d bench systems``: it compares what is the same and prints what was measured; and VGGT4D's memory."""

import json

import pytest
import torch
from helpers.upstream import PeakBytes

from gate4d.benchmarks import check
from gate4d.benchmarks.measure import memory
from gate4d.benchmarks.rows import catalogue, system_rows, target
from gate4d.cli import main as cli

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

TINY = target.Effort("tiny", 2, 33, 0.0, 1, 1, (64,), 1)


@pytest.fixture
def peaks(monkeypatch):
    """Fresh processes take seconds each: 100 bytes of results beside what a variant is said to need."""
    needs = {"plain": 1000, "authors' way": 5000, "gate4d": 1100}
    monkeypatch.setattr(
        memory, "peak_growth", lambda *_, variant, **__: {"extra_bytes": needs[variant], "result_bytes": 100}
    )


@pytest.mark.parametrize("id", system_rows.SYSTEMS)
def test_rows(id, peaks):
    time, space = catalogue.run_target(catalogue.load_targets()[id], target.Conditions(TINY, 1))
    assert time.error is None, time.error
    assert set(time.medians) == {"plain", "authors' way", "gate4d"}
    assert time.ratio == pytest.approx(time.medians["gate4d"] / time.medians["authors' way"])
    assert space.ratio == pytest.approx(100 / 4000)
    assert "authors' way +0.0 MiB" in space.note


@pytest.mark.parametrize("id", system_rows.SYSTEMS)
def test_a_wrong_system_is_not_timed(id, peaks, monkeypatch):
    name, build, names = system_rows.SYSTEMS[id]

    def spoilt(size, dtype=torch.float32):
        steps = build(size, dtype)
        right = steps["gate4d"]
        return {**steps, "gate4d": lambda: (*right()[:-1], right()[-1] + 1e-3)}

    monkeypatch.setitem(system_rows.SYSTEMS, id, (name, spoilt, names))
    with pytest.raises(check.WrongResult, match=f"gate4d: {names[-1]} is off"):
        catalogue.load_targets()[id].measure(target.Conditions(TINY, 1))


def test_command(peaks, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(target, "QUICK", TINY)
    path = tmp_path / "systems.json"
    assert cli.main(["bench", "systems", "--quick", "--threads", "1", "--only", "S1,S6", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "over plain: authors' way" in printed
    result = json.loads(path.read_text())
    assert [r["id"] for r in result["rows"]] == ["S1", "S1", "S6"]
    assert cli.main(["bench", "--markdown", str(path)]) == 0
    assert "| S6 | VGGT4D, 12 frames: peak / plain | 1.091 |" in capsys.readouterr().out
    document = tmp_path / "DOC.md"
    document.write_text("<!-- begin: gate4d bench systems -->\n<!-- end: gate4d bench systems -->\n")
    assert cli.main(["bench", "systems", "--markdown", str(path), "--into", str(document)]) == 0
    assert document.read_text().count("| S1 |") == 2
    assert cli.main(["bench", "--only", "list"]) == 0
    assert "S1" not in capsys.readouterr().out
    assert cli.main(["bench", "--only", "S1"]) == 2


def test_one_peak_in_a_fresh_process():
    found = memory.peak_growth(
        "gate4d.benchmarks.rows.system_rows:system_step", threads=1, system="S5", variant="gate4d", depth=2, width=192,
        tokens=33, heads=2, grid=(4, 5),
    )  # fmt: skip
    assert found["result_bytes"] > 0


def test_vggt4d_needs_little_more_than_the_plain_model():
    """All tensors made in a run, exactly: at most a tenth more than the unpatched model's."""
    held = {}
    for variant in ("plain", "gate4d"):
        step = system_rows.long_clip_step(variant, frames=10, grid=4)
        with PeakBytes() as tracker:
            step()
        held[variant] = tracker.peak
    assert held["gate4d"] <= 1.10 * held["plain"], held
