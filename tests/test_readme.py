"""The README is true: its example runs, its commands and files exist."""

import re
from pathlib import Path

import pytest
import torch
from standins import vggt

import gate4d
from gate4d.cli.main import COMMANDS
from gate4d.integrations import registry

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
    registry._METHODS.pop("quiet keys", None)


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
