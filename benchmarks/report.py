"""Results as JSON, as an 80-column table and as Markdown; the surroundings they were measured in."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import gate4d
from gate4d.cli.info import processor
from gate4d.kernels.attention.backends import Request, explain, select

from .memory import MIB
from .rows import Row, Settings

SCHEMA = 1
KINDS = {  # kind of a results file: the command of its marker
    "targets": "bench",
    "systems": "bench systems",
    "sequences": "bench sequences",
}


def surroundings(settings: Settings, command: list[str]) -> dict:
    """Hardware, versions, threads and command, for the JSON file."""
    request = Request("cpu", torch.float32, 64, 64, True, False, False)
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "effort": settings.effort.name,
        "threads": settings.threads,
        "backend": select(settings.backend, request).name,
        "backends": explain(request).splitlines(),
        "hardware": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "memory_bytes": _memory_bytes(),
        },
        "versions": {
            "gate4d": gate4d.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "rich": _version("rich"),
        },
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(("OMP_", "KMP_", "MKL_", "GATE4D_"))
        },
    }


def to_json(about: dict, rows: list[Row]) -> str:
    """The results file."""
    return json.dumps({**about, "rows": [row.as_dict() for row in rows]}, indent=1) + "\n"


def load(path: Path) -> dict:
    """Read a results file of ``gate4d bench``; errors as :func:`read`."""
    return read(path, "gate4d bench", SCHEMA, lambda result: bool({"rows", "backbones"} & set(result)))


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is no JSON, or no file but a pipe, which would wait for a writer.
        FileNotFoundError: there is nothing.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not {what}: it is no file.")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not {what}: {e}.") from None
    except RecursionError:
        raise ValueError(f"{path} is not {what}: it is nested too deeply.") from None


def read(path: Path, command: str, schema: int, fits: Callable[[dict], bool]) -> dict:
    """Read a results file of a command, of which ``fits`` must be true.

    Raises:
        ValueError: it is not one, or one of another schema.
    """
    result = read_json(path, f"a results file of `{command} --json`")
    if not isinstance(result, dict) or result.get("schema") != schema or not fits(result):
        raise ValueError(f"{path} is not a results file of `{command} --json` with schema {schema}.")
    return result


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
    if result["effort"] != "full" and kind(result) != "sequences":
        lines.append(f"effort {result['effort']}: fewer heads, repetitions, lengths and frames")
    return lines


def kind(result: dict) -> str:
    """Which part of a document a results file belongs into, a key of :data:`KINDS`."""
    if "backbones" in result:
        return "sequences"
    return "systems" if any(row["id"].startswith("S") for row in result.get("rows", ())) else "targets"


def markdown(result: dict) -> str:
    """The results as Markdown, for the documents."""
    if kind(result) == "sequences":
        from . import sequences

        return sequences.markdown(result, heading(result))
    lines = [*(f"- {line}" for line in heading(result)), "", "| # | what | measured | target | result | details |"]
    lines.append("|---|---|---|---|---|---|")
    for row in result["rows"]:
        spread = f" ± {figure(row['spread'], '')}" if row["spread"] is not None and not row["unit"] else ""
        limit = "" if row["target"] is None else f"<= {figure(row['target'], row['unit'])}"
        measured = figure(row["ratio"], row["unit"]) + spread
        cells = (row["id"], row["what"], measured, limit, verdict(row), "; ".join(details(row)))
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write_into(document: Path, text: str, command: str = "bench") -> None:
    """Replace what stands between the two marker lines of ``document`` that name the command.

    Raises:
        ValueError: the markers are not there.
    """
    first, last = f"<!-- begin: gate4d {command} -->", f"<!-- end: gate4d {command} -->"
    before, begin, rest = document.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{document} must have the lines {first!r} and {last!r} around the table.")
    document.write_text(f"{before}{first}\n{text}{last}{after}")


def command_line() -> list[str]:
    """The command as a user types it."""
    return ["gate4d", *sys.argv[1:]]


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
