"""The README is true: its example runs, its commands and files exist."""

import json
import re
from pathlib import Path

import pytest
import torch
from standins import vggt

import gate4d
from gate4d import handle as registry
from gate4d.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


PYTHON = re.compile(r"```python\n(.*?)```", re.S)


def test_the_example_runs(capsys):
    example = PYTHON.findall(README)[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["out"].shape == (1, 16, 6 * 17, 64)
    assert torch.isfinite(names["out"]).all()
    assert torch.isfinite(names["aux"].entropy).all()
    assert "torch.Size([1, 16, 102, 64])" in capsys.readouterr().out


@pytest.mark.parametrize(
    "blocks", [PYTHON.findall(README)[1:], PYTHON.findall((ROOT / "docs/patching.md").read_text())]
)
def test_the_patch_examples_run(blocks):
    assert blocks
    torch.manual_seed(0)
    names = {"model": vggt.Vggt().eval(), "images": torch.rand(1, 2, 3, 28, 42), "gate4d": gate4d}
    plain = names["model"](names["images"])["depth"]
    for block in blocks:
        exec(compile(block, "example", "exec"), names)
        assert torch.isfinite(names["out"]["depth"]).all()
        gated = "method" in block
        assert torch.allclose(names["out"]["depth"], plain, rtol=1e-4, atol=1e-5) != gated
    assert torch.equal(names["model"](names["images"])["depth"], plain)
    registry._registered.pop("quiet keys", None)


def test_commands_and_files_exist():
    for document in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        targets = set(re.findall(r"\bmake (\w+)", document)) - {"virtual"}
        makefile = (ROOT / "Makefile").read_text()
        assert targets
        assert not {t for t in targets if not re.search(rf"^{t}:", makefile, re.M)}
        assert set(re.findall(r"`gate4d (\w+)", document)) <= set(COMMANDS)
        links = [x for x in re.findall(r"\]\(([^)]+)\)", document) if not x.startswith("http")]
        folders = re.findall(r"`((?:\w+/)+)`", document)
        for path in [*links, *folders]:
            if path != "demo/":  # written by the demo
                assert (ROOT / path).exists(), path


# A line of README's table: its beginning, then the rows of the results file that its figures are.
CLAIMS = {
    "C1 ": ["gated forward float32 / SDPA"],
    "C2 ": ["gated forward bfloat16 / SDPA"],
    "C3 ": ["gated forward / FlexAttention"],
    "C4 ": ["forward + backward / SDPA's"],
    "C5 ": ["30 % of keys dropped / no gate"],
    "C6 ": ["frame-causal, 8 frames / full", "window of 2 frames / full"],
    "C7 ": ["memory, forward, 30 % of keys dropped", "memory, forward + backward"],  # the first is the worst forward
    "C8 row": ["row statistics on / off, no gate", "row statistics on / off, gated"],
    "C8 gate": ["gate on / off"],
    "C9 ": ["attention received / one forward"],
    "C10 ": ["saliency online / maps, time", "saliency online / maps, memory"],
    "C11 ": ["TTT3R cue / decoder step"],
    "C12 ": ["call - SDPA's, no gate, H = 1", "call - SDPA's, gate, H = 1"],
}
COLUMNS = {"Zen 4": "cpu-zen4-2t.json", "Zen 5": "cpu-zen5-2t.json"}


def results(column):
    return json.loads((ROOT / "benchmarks" / "results" / COLUMNS[column]).read_text())["rows"]


def cells(start):
    (line,) = [x for x in README.splitlines() if x.startswith(f"| {start}")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("start", CLAIMS)
def test_claims_are_the_committed_results(start, column):
    rows = {row["what"]: row for row in results(column)}
    named = dict(zip(cells("what | target"), cells(start), strict=True))
    target, measured = named["target"], named[column]
    figures = re.findall(r"(?<![\w.])\d+(?:\.\d+)?", measured)
    claimed = [rows[what] for what in CLAIMS[start]]
    assert len(figures) == len(claimed)
    for figure, part, row in zip(figures, measured.split(";"), claimed, strict=True):
        digits = len(figure.partition(".")[2])
        assert f"{row['ratio']:.{digits}f}" == figure, row["what"]
        assert ("missed" in part) == (not row["passed"]), row["what"]
    limits = {float(x) for x in re.findall(r"<= (\d+(?:\.\d+)?)", target)}
    assert limits == {row["target"] for row in claimed}


@pytest.mark.parametrize("column", COLUMNS)
def test_every_measured_target_is_claimed_and_every_miss_is_said(column):
    rows = results(column)
    claimed = {what for whats in CLAIMS.values() for what in whats}
    assert {row["id"] for row in rows if row["what"] in claimed} == {row["id"] for row in rows}
    assert {row["what"] for row in rows if row["passed"] is False} <= claimed
