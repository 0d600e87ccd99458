"""The results file: what is written is read again, every committed file opens, and what is none is refused."""

import json
from pathlib import Path

import pytest

from gate4d.benchmarks import machine
from gate4d.benchmarks.report import documents, result_files
from gate4d.cli import eval as evaluation
from gate4d.cli.main import main

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
KINDS = {"baseline": "suite", "cpu-zen4-2t": "targets", "cpu-zen5-2t": "targets", "cpu-zen5-2t-systems": "systems",
         "eval-2026-11": "eval", "sequences-cpu-2t": "sequences"}  # fmt: skip
ENVELOPE = {"schema", "kind", "date", "command", "threads", "hardware", "versions", "environment"}


@pytest.mark.parametrize("file", COMMITTED, ids=lambda f: f.stem)
def test_committed_files_open(file):
    before, now = json.loads(file.read_text()), result_files.read(file)
    assert set(now) >= ENVELOPE
    assert now["schema"] == result_files.SCHEMA
    assert now["kind"] == KINDS.get(file.stem, now["kind"])
    assert set(now) >= set(result_files.KINDS[now["kind"]].contents)
    assert now["hardware"]["processor"]
    assert now["versions"]["torch"]
    for contents in ("rows", "backbones", "cases", "weights"):  # no figure is touched
        assert now.get(contents) == before.get(contents)


def test_what_is_written_is_read(tmp_path):
    result = result_files.envelope("suite", 3) | {"cases": {"a": {"ratio": 0.5}}}
    result_files.write(tmp_path / "r.json", result)
    assert result_files.read(tmp_path / "r.json") == result_files.read(tmp_path / "r.json", "suite", "eval") == result
    assert set(result) == ENVELOPE | {"cases"}
    assert result["threads"] == 3
    assert result["hardware"] == machine.hardware()
    with pytest.raises(ValueError, match=r"of `gate4d eval`: it is one of `gate4d bench suite`\."):
        result_files.read(tmp_path / "r.json", "eval")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("no JSON", "is not a results file of `gate4d bench`: Expecting value"),
        ("[1]", "is not a results file of `gate4d bench` with schema 2 or 1"),
        ('{"schema": 3, "kind": "targets"}', "with schema 2 or 1"),
        ('{"schema": 2, "kind": "nonsense"}', "with schema 2 or 1"),
        ('{"schema": 1, "surroundings": [], "errors": {}}', "with schema 2 or 1"),
        ('{"schema": 2, "kind": "suite", "date": "", "command": "", "threads": 1, "hardware": {}, "versions": {}, '
         '"environment": {}}', "`gate4d bench suite`: it has no cases"),
    ],
)  # fmt: skip
def test_what_is_no_results_file_is_refused(tmp_path, contents, message):
    file = tmp_path / "r.json"
    file.write_text(contents)
    with pytest.raises(ValueError, match=r"r\.json") as e:
        result_files.read(file)
    assert message in str(e.value)


def test_a_file_of_another_command_is_one_sentence(capsys):
    """It ended with a KeyError."""
    file = ROOT / "benchmarks" / "results" / "eval-2026-11.json"
    assert main(["bench", "--markdown", str(file)]) == 2
    assert "it is one of `gate4d eval`" in capsys.readouterr().err


def test_peers_of_the_first_schema(tmp_path):
    old = {"schema": 1, "kind": "peers", "date": "", "command": "", "effort": "full", "threads": 1, "backend": "cpu",
           "hardware": {}, "versions": {}, "row": {"id": "gated"}, "costs": {}}  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps(old))
    assert result_files.read(tmp_path / "r.json", "peers")["rows"] == [{"id": "gated"}]


def test_the_document_shows_the_committed_evaluation():
    text = (ROOT / "BENCHMARKS.md").read_text()
    shown = text.partition("<!-- begin: gate4d eval -->\n")[2].partition("<!-- end: gate4d eval -->")[0]
    evaluations = [result_files.read(f) for f in COMMITTED if f.stem.startswith("eval-")]
    assert shown in [evaluation.markdown(result) for result in evaluations]


def test_one_description_of_the_machine(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    about = result_files.envelope("targets", 1)
    assert facts["versions"] == about["versions"]
    assert facts["machine"] == {**about["hardware"], "threads": facts["machine"]["threads"]}
    assert about["hardware"]["cores"] == machine.usable_cores() > 0


def test_markers_of_every_kind(tmp_path):
    document = tmp_path / "DOC.md"
    for kind, (command, _) in result_files.KINDS.items():
        document.write_text(f"<!-- begin: gate4d {command} -->\n<!-- end: gate4d {command} -->\n")
        documents.write_into(document, "text\n", kind)
        assert document.read_text().splitlines()[1] == "text"
