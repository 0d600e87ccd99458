"""The rows of the statistics: checked, timed and measured at tiny sizes, in this process."""

import importlib

import pytest

from gate4d.benchmarks import check
from gate4d.benchmarks.measure import memory
from gate4d.benchmarks.rows import statistics_rows, target

TINY = target.Effort(
    "tiny", heads=2, frame_tokens=33, seconds=0.0, min_rounds=2, max_rounds=2, memory_tokens=(64,), memory_heads=1
)
CONDITIONS = target.Conditions(TINY, threads=1)


@pytest.fixture(autouse=True)
def small_and_in_this_process(monkeypatch):
    monkeypatch.setattr(statistics_rows, "_WIDTH", 96)

    def peak_growth(setup, *, threads, **arguments):
        module, function = setup.split(":")
        step = getattr(importlib.import_module(module), function)(**arguments)
        assert all(x.isfinite().all() for x in step())
        return {"extra_bytes": 1000}  # calls this small grow nothing that could be measured

    monkeypatch.setattr(memory, "peak_growth", peak_growth)


@pytest.mark.parametrize(
    ("measure", "ids"),
    [
        (statistics_rows.attention_received, ["C9", "C9"]),
        (statistics_rows.gram_saliency, ["C10", "C10"]),
        (statistics_rows.state_update_cue, ["C11"]),
    ],
)
def test_rows(measure, ids):
    found = measure(CONDITIONS)
    assert [row.id for row in found] == ids
    assert all(row.error is None and row.ratio > 0 and row.target > 0 for row in found)
    assert found[0].peak_memory
    assert all(len(row.what) <= 40 for row in found)


def test_a_wrong_statistic_is_caught(monkeypatch):
    monkeypatch.setattr(statistics_rows, "state_confidence", lambda q, k: q[0].mean((1, 3)).sigmoid())
    with pytest.raises(check.WrongResult, match="beta is off by"):
        statistics_rows.state_update_cue(CONDITIONS)
