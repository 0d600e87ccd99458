"""Ctrl-C in ``gate4d demo`` and ``gate4d eval``; that of ``gate4d run`` is beside its other tests."""

import errno
from pathlib import Path

import pytest
from helpers.processes import gate4d_process, group, interrupted

from gate4d.methods.export import save_text

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")


def test_the_demo_ends_with_its_processes_and_leaves_what_was_there(tmp_path):
    out = tmp_path / "demo"
    out.mkdir()
    (out / "figures.json").write_text("of an earlier demo")
    arguments = ["demo", "--frames", 4, "--patches", 24, "--budget", 200, "--out", out]
    process = gate4d_process(arguments)
    interrupted(process, lambda: len(group(process.pid)) == 4)  # itself and an implementation each
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["demo", "demo/figures.json"]
    assert (out / "figures.json").read_text() == "of an earlier demo"


def test_an_evaluation_leaves_an_earlier_file_as_it_was(tmp_path):
    file, log = tmp_path / "eval.json", tmp_path / "log"
    file.write_text("earlier results")
    with log.open("w") as stderr:
        process = gate4d_process(["eval", "--clips", 1000, "--json", file], stderr=stderr)
    interrupted(process, lambda: log.stat().st_size > 0, log)
    assert file.read_text() == "earlier results"
    assert {p.name for p in tmp_path.iterdir()} == {"eval.json", "log"}


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "eval.json"
    assert save_text(file, "first") == file
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        save_text(file, "second")
    assert file.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]
