"""The results file: one envelope for every kind of measurement, and the one reader of it.

A file is a JSON object. The envelope says what it is and where it comes from: ``schema``, ``kind``, ``date``,
``command``, ``threads``, ``hardware``, ``versions`` and ``environment`` (see :mod:`gate4d.benchmarks.machine`).
Beside it lie the contents, whose keys depend on the kind. The reader opens files of the first schema as well, whose
envelopes differed from kind to kind.
"""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gate4d import MotionGate, Visibility, explain, gated_attention
from gate4d.methods.export import save_text

from .. import machine

SCHEMA = 2
_ENVELOPE = ("schema", "kind", "date", "command", "threads", "hardware", "versions", "environment")


class Kind(NamedTuple):
    """What writes files of a kind, and the contents that each of them has at least."""

    command: str
    contents: tuple[str, ...]


KINDS = {
    "targets": Kind("bench", ("effort", "backend", "rows")),
    "systems": Kind("bench systems", ("effort", "backend", "rows")),
    "sequences": Kind("bench sequences", ("effort", "backend", "backbones", "max_bytes", "pictures")),
    "peers": Kind("bench peers", ("effort", "backend", "rows", "costs")),
    "suite": Kind("bench suite", ("cases",)),
    "eval": Kind("eval", ("rows", "weights")),
    "dataset": Kind("eval --dataset", ("setup", "rows", "summary")),
    "demo": Kind("demo", ("clip", "curves")),
    "gpu": Kind("benchmarks.gpu", ("rows",)),
}


def envelope(kind: str, threads: int, *, command: str | None = None) -> dict[str, Any]:
    """Where and when this process measures ``kind`` with so many threads; the caller adds the contents."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["gate4d", *sys.argv[1:]]) if command is None else command,
        "threads": threads,
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "environment": machine.environment(),
    }


def served_by(backend: str, visible: Visibility | None = None) -> dict[str, Any]:
    """Contents: the backend that serves a gated call of 64 channels in fp32 here, and what every backend says of it.

    Raises:
        ValueError, NotImplementedError: as :func:`gate4d.gated_attention` for ``backend``.
    """
    x, gate = torch.zeros(1, 1, 1, 64), MotionGate.pairwise(torch.zeros(1, 1))
    gated_attention(x, x, x, gate=gate, visible=visible, backend=backend)
    auto, *reasons = explain(x, x, x, gate=gate, visible=visible).splitlines()
    chosen = auto.removeprefix("auto takes ").removesuffix(":") if backend == "auto" else backend
    return {"backend": chosen, "backends": reasons}


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a results file."""
    save_text(path, json.dumps(result, indent=1) + "\n")


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


def read(path: Path, *kinds: str) -> dict[str, Any]:
    """A results file in the form of today, whenever it was written.

    Args:
        kinds: those that the caller can use; none for all.

    Raises:
        ValueError: it is no results file, one of another schema, or one of another kind.
    """
    wanted = " or ".join(f"`gate4d {KINDS[k].command}`" for k in kinds or ("targets",))
    result = read_json(path, f"a results file of {wanted}")
    if isinstance(result, dict) and result.get("schema") == 1:
        result = _from_first_schema(result)
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or result.get("kind") not in KINDS:
        raise ValueError(f"{path} is not a results file of {wanted} with schema {SCHEMA} or 1.")
    kind = KINDS[result["kind"]]
    if missing := [name for name in (*_ENVELOPE, *kind.contents) if name not in result]:
        raise ValueError(f"{path} is not a results file of `gate4d {kind.command}`: it has no {', '.join(missing)}.")
    if kinds and result["kind"] not in kinds:
        raise ValueError(f"{path} is not a results file of {wanted}: it is one of `gate4d {kind.command}`.")
    return result


def _from_first_schema(old: dict[str, Any]) -> dict[str, Any]:
    """Targets and systems had no kind, evaluations no hardware and versions of their own."""
    new = {"environment": {}, **old, "schema": SCHEMA}
    if old.get("kind") == "gate4d eval":
        names = {"gate4d": "gate4d", "torch": "torch", "triton": "triton", "numpy": "numpy", "python": "python",
                 "platform": "system"}  # fmt: skip
        new["versions"] = {name: new.pop(before) for before, name in names.items() if before in old}
        new["hardware"] = {"processor": new.pop("processor", None)}
        new["kind"] = "eval"
    elif "kind" not in old and "backbones" in old:
        new["kind"] = "sequences"
    elif "kind" not in old and "rows" in old:
        systems = any(str(row.get("id", "")).startswith("S") for row in old["rows"])
        new["kind"] = "systems" if systems else "targets"
    elif old.get("kind") == "peers" and "row" in old:
        new["rows"] = [new.pop("row")]
    return new
