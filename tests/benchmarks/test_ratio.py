"""The two rules of a ratio, by hand and against every ratio in the committed results, from their raw times."""

from pathlib import Path

import pytest

from gate4d.benchmarks.measure.ratio import faster_half, paired, paired_difference, separate
from gate4d.benchmarks.measure.rounds import Comparison
from gate4d.benchmarks.report import result_files

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROWS = [
    pytest.param(row, id=f"{file.stem} {row['id']} {row['what']}")
    for file in sorted(RESULTS.glob("cpu-*.json"))
    for row in result_files.read(file, "targets", "systems")["rows"]
    if len(row["times"]) > 1
]


def test_paired_by_hand():
    assert paired([1.0, 2.0, 30.0], [2.0, 4.0, 40.0]) == (0.5, 0.0625)
    assert paired([3.0], [2.0]) == (1.5, 0.0)
    assert paired_difference([3.0, 5.0, 9.0], [1.0, 1.0, 1.0]) == (4.0, 1.5)
    with pytest.raises(ValueError):
        paired([1.0], [1.0, 2.0])


def test_separate_by_hand():
    assert faster_half([5.0, 1.0, 9.0, 3.0]) == 2.0
    assert faster_half([5.0, 1.0, 9.0]) == 3.0
    assert separate([1.0, 9.0], [2.0, 4.0, 100.0]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("row", ROWS)
def test_paired_ratios_of_committed_rows(row):
    of, to, *_ = row["times"]
    timed = Comparison(row["times"], row["waits"])
    if row["unit"] == "us":
        assert timed.difference(of, to).median * 1e6 == pytest.approx(row["ratio"], rel=1e-12)
        return
    ratio = timed.ratio(of, to)
    share = ratio.median / row["ratio"]  # C10's peer does the work of one frame, counted as often as a clip needs it
    assert share == pytest.approx(9.0 if row["id"] == "C10" else 1.0, rel=1e-12)
    assert ratio.spread == pytest.approx(row["spread"] * share)
    for peer in row["times"]:
        if peer in row["peers"]:
            assert timed.ratio(of, peer).median == pytest.approx(row["peers"][peer], rel=1e-12)


def test_separate_ratios_of_committed_curves():
    count = 0
    for data in result_files.read(RESULTS / "sequences-cpu-2t.json", "sequences")["backbones"].values():
        times = {c: {p["frames"]: p["times"] for p in curve["points"]} for c, curve in data["curves"].items()}
        for peer, ratios in data["time_ratios"].items():
            for frames, ratio in ratios.items():
                n = int(frames)
                assert separate(times["gate4d"][n], times[peer][n]) == pytest.approx(ratio, rel=1e-12)
                count += 1
    assert count > 50
