"""A user's table of tile shapes: read, refused, part of what a verdict depends on; and the command that writes it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from gate4d.cli.main import main
from gate4d.kernels import _verify
from gate4d.kernels._triton import tuned
from gate4d.kernels._triton.configurations import config

TILE = {"block_m": 64, "block_n": 16, "num_warps": 4, "num_stages": 2, "registers": 0, "descriptors": False}
ROW = {"pass": "forward", "capability": [9, 0], "dtype": "bfloat16", "width": 64, "features": ["gate"], "config": TILE}
PLAIN, EVERYTHING = frozenset({"gate"}), frozenset({"gate", "power", "bounds", "drop"})


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the user's table is."""
    monkeypatch.setenv("GATE4D_TUNED", str(tmp_path / "deep" / "tuned.json"))
    forget()
    yield tmp_path / "deep" / "tuned.json"
    forget()


def forget() -> None:
    tuned.rows.cache_clear()
    _verify._software.cache_clear()


def test_a_row_counts_for_what_it_was_measured_with(table: Path) -> None:
    with pytest.warns(UserWarning, match="FileNotFoundError"):
        default = config("forward", (9, 0), torch.bfloat16, 64, features=PLAIN)
    tuned.write(table, "a GPU", [ROW])
    forget()
    found = config("forward", (9, 0), torch.bfloat16, 64, features=PLAIN)
    assert (found.block_m, found.block_n, found.num_warps) == (64, 16, 4)
    assert found != default
    for other in (
        config("forward", (9, 0), torch.bfloat16, 64, features=EVERYTHING),
        config("forward", (8, 0), torch.bfloat16, 64, features=PLAIN),
        config("forward", (9, 0), torch.float16, 64, features=PLAIN),
        config("received", (9, 0), torch.bfloat16, 64, features=PLAIN),
    ):
        assert other.block_n != 16 or other.num_warps != 4
    assert "1 measured on this machine" in tuned.about()


def test_without_a_table_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GATE4D_TUNED")
    monkeypatch.setenv("GATE4D_CACHE_DIR", str(tmp_path))
    assert tuned.path() == tmp_path / "tuned.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.rows() == json.loads(tuned.SHIPPED.read_text())
    assert "the shipped ones" in tuned.about()


def test_tables_that_do_not_count(table: Path) -> None:
    """Of other kernels, damaged, or named and missing: one warning, and the shipped shapes."""
    tuned.write(table, "a GPU", [ROW])
    good = json.loads(table.read_text())
    cases = {
        "measured with triton 1.0": {**good, "triton": "1.0"},
        "measured with kernels old": {**good, "kernels": "old"},
        r"cannot be read \(KeyError": {"rows": [ROW]},
        r"cannot be read \(TypeError": [1],
        r"a tile has threads=4": {**good, "rows": [{**ROW, "config": {**TILE, "threads": 4}}]},
        r"a tile has block_m='big'": {**good, "rows": [{**ROW, "config": {**TILE, "block_m": "big"}}]},
        r"a row is": {**good, "rows": [{**ROW, "speed": 3}]},
    }
    default = json.loads(tuned.SHIPPED.read_text())
    for message, content in cases.items():
        table.write_text(json.dumps(content))
        forget()
        with pytest.warns(UserWarning, match=f"is not used: .*{message}"):
            assert tuned.rows() == default
        assert "is not used" in tuned.about()
    for text in ("{", "[" * 10_000):
        table.write_text(text)
        forget()
        with pytest.warns(UserWarning, match="cannot be read"):
            tuned.rows()
    table.unlink()
    forget()
    with pytest.warns(UserWarning, match="FileNotFoundError"):
        tuned.rows()


def test_verdicts_depend_on_the_table(table: Path) -> None:
    """A kernel of another shape is another kernel: it is tried again."""
    seen = {json.dumps(_verify._software())}
    for tile in (TILE, {**TILE, "block_m": 32}):
        tuned.write(table, "a GPU", [{**ROW, "config": tile}])
        forget()
        seen.add(json.dumps(_verify._software()))
    assert len(seen) == 3


def test_the_command(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    out = tmp_path / "rows" / "t.json"
    assert main(["tune", "--dry-run", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"of 8 shapes are replaced: {out}" in " ".join(said.split())
    assert all(f"tiles of {kind}" in said for kind in ("forward", "grad_query", "grad_key", "received"))
    rows, reason = tuned.read(out)
    assert reason is None
    assert all(row["features"] == ["gate"] for row in rows)
    assert not table.exists()
    assert main(["tune", "--dry-run"]) == 2
    assert "--dry-run needs --out FILE" in capsys.readouterr().err
    assert main(["tune", "--minutes", "0"]) == 2
    assert "--minutes must be positive, got 0" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["tune"]) == 2
        assert "needs a GPU" in capsys.readouterr().err
