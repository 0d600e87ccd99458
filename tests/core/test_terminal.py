"""Tables and progress: what is shown with and without a terminal."""

import io
import sys

import pytest

from gate4d import terminal


def test_table_aligns_rules_and_lets_lines_be():
    lines = terminal.table("<4 >6 ^5", [("a", 1.5, "b"), None, "a line longer than the table", ("long name", "", 7)])
    assert lines == ["a      1.5  b", "-" * 15, "a line longer than the table", "long name        7"]


def test_rows_may_end_early():
    assert terminal.table(">3 >3 >3", [(1,), (1, 2)]) == ["  1", "  1  2"]


def test_markdown_table_keeps_its_cells_apart():
    lines = terminal.markdown_table(("a", "b"), [("x | y", 1)], "<>")
    assert lines == ["| a | b |", "|---|---:|", "| x / y | 1 |"]


def test_fields_go_on_below_the_value():
    lines = terminal.field("name", "word " * 30)
    assert lines[0].startswith("name       word")
    assert all(line.startswith(" " * 11 + "word") for line in lines[1:])
    assert max(map(len, lines)) <= 80


def test_without_a_terminal_every_new_text_is_a_line(capsys):
    with terminal.progress("begin", total=3) as show:
        show("first", done=0)
        show("round 1", passing=True)
        show("first")
        show("second", done=2)
        show(advance=1)
        show("last", total=4)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["[1/3] begin", "[1/3] first", "[3/3] second", "[4/4] last"]
    assert captured.out == ""


def test_an_unknown_total_is_not_shown(capsys):
    with terminal.progress("reading") as show:
        show("running", total=2, done=0)
    assert capsys.readouterr().err.splitlines() == ["reading", "[1/2] running"]


def test_a_terminal_gets_a_bar(monkeypatch):
    pytest.importorskip("rich")
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with terminal.progress("begin", total=4) as show:
        show("running", done=1)
        show(advance=2)
        show("round 5 of a name much too long for the line of a terminal", passing=True)
    text = screen.getvalue()
    assert "3/4" in text
    assert "round 5" in text


def test_without_rich_lines_serve(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with terminal.progress("begin") as show:
        show("end")
    assert capsys.readouterr().err.splitlines() == ["begin", "end"]
