"""Measured rows for people: an 80-column table, Markdown, and documents whose marked parts are replaced."""

from __future__ import annotations

import textwrap
from pathlib import Path

from gate4d.terminal import markdown_table, wrapped
from gate4d.terminal import table as lines_of

from ..measure.resident import MIB
from .result_files import KINDS

_COLUMNS = "<4 <37 >11 >7 >13 >8"


def verdict(row: dict) -> str:
    """pass, MISS, FAILED or nothing."""
    if row["error"] is not None:
        return "FAILED"
    return {True: "pass", False: "MISS", None: ""}[row["passed"]]


def figure(value: float | None, unit: str) -> str:
    """A ratio with three digits, memory and microseconds with one."""
    if value is None:
        return ""
    return f"{value:.1f} {unit}" if unit else f"{value:.3f}"


def duration(seconds: float) -> str:
    """With a unit that keeps three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.1f} us"


def details(row: dict) -> list[str]:
    """Everything of a row that is not in its table line: times, peers, memory, note or error."""
    lines = []
    if row["error"] is not None:
        return row["error"].splitlines()
    if row["medians"]:
        lines.append(", ".join(f"{name} {duration(t)}" for name, t in row["medians"].items()))
    for name, value in row["peers"].items():
        lines.append(f"{name}: {value}" if isinstance(value, str) else f"/ {name}: {value:.3f}")
    if row["peak_memory"]:
        shown = (
            f"{k}: {v}" if isinstance(v, str) else f"{k}: {v / MIB:.1f} MiB" for k, v in row["peak_memory"].items()
        )
        lines.append("; ".join(shown))
    if row["note"]:
        lines.append(row["note"])
    return lines


def table(result: dict) -> list[str]:
    """The lines of the table of rows, at most 80 characters each."""
    rows: list = ["", ("#", "what", "measured", "+-", "target", "result"), None]
    for row in result["rows"]:
        spread = "" if row["spread"] is None else f"{row['spread']:.{1 if row['unit'] else 3}f}"
        limit = "" if row["target"] is None else f"<= {figure(row['target'], row['unit'])}"
        what, measured = textwrap.shorten(row["what"], 36, placeholder=".."), figure(row["ratio"], row["unit"])
        rows.append((row["id"], what, measured, spread, limit, verdict(row)))
        rows += [line for detail in details(row) for line in wrapped(detail, " " * 6, " " * 8)]
    verdicts = [verdict(row) for row in result["rows"]]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("pass", "MISS", "FAILED") if v in verdicts)
    without = "no targets to meet" if result["rows"] else "nothing was measured"
    return lines_of(_COLUMNS, [*rows, None, counts or without])


def heading(result: dict) -> list[str]:
    """Where and how it was measured."""
    hardware, versions = result["hardware"], result["versions"]
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    lines = [
        f"{hardware['processor']}, {hardware['cores']} cores, {hardware['capability']}; {threads}",
        f"gate4d {versions['gate4d']} (backend {result['backend']}), torch {versions['torch']}, "
        f"Python {versions['python']}, {result['date'][:10]}",
        f"command: {result['command']}",
    ]
    if result["effort"] != "full" and result["kind"] != "sequences":
        lines.append(f"effort {result['effort']}: fewer heads, repetitions, lengths and frames")
    return lines


def markdown(result: dict) -> str:
    """The rows as Markdown, for the documents."""
    rows = []
    for row in result["rows"]:
        spread = f" ± {figure(row['spread'], '')}" if row["spread"] is not None and not row["unit"] else ""
        limit = "" if row["target"] is None else f"<= {figure(row['target'], row['unit'])}"
        measured = figure(row["ratio"], row["unit"]) + spread
        rows.append((row["id"], row["what"], measured, limit, verdict(row), "; ".join(details(row))))
    head = ("#", "what", "measured", "target", "result", "details")
    return "\n".join([*(f"- {line}" for line in heading(result)), "", *markdown_table(head, rows)]) + "\n"


def write_into(document: Path, text: str, kind: str) -> None:
    """Replace what stands between the two marker lines of ``document`` that name the command of a kind.

    Raises:
        ValueError: the markers are not there.
    """
    command = KINDS[kind].command
    first, last = f"<!-- begin: gate4d {command} -->", f"<!-- end: gate4d {command} -->"
    before, begin, rest = document.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{document} must have the lines {first!r} and {last!r} around the table.")
    document.write_text(f"{before}{first}\n{text}{last}{after}")
