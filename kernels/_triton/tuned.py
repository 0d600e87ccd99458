"""Tables of measured tile shapes: the one that is shipped, and one that a user's own GPU gave.

``gate4d tune`` writes the user's, ``$GATE4D_TUNED`` or ``tuned.json`` in the cache directory. It counts only with the
Triton version and the kernels that it was measured with: another assembler or kernel may spill what these did not.
"""

from __future__ import annotations

import json
import os
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from .._verify import source_hash
from .._verify import tile_table as path

SHIPPED = Path(__file__).with_name("triton_tuned.json")
_INTEGERS = ("block_m", "block_n", "num_warps", "num_stages", "registers")


@cache
def rows() -> list[dict[str, Any]]:
    """The rows in use, the user's first: the first that fits a call counts."""
    own, reason = read(path())
    if reason is not None:
        warnings.warn(f"gate4d: the table of tile shapes {path()} is not used: {reason}.", stacklevel=2)
    return own + (json.loads(SHIPPED.read_text()) if SHIPPED.exists() else [])


def read(file: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of a table that fits, and why others are not used; neither where there is no file."""
    if not file.exists() and "GATE4D_TUNED" not in os.environ:
        return [], None
    try:
        table = json.loads(file.read_text())
        found = [_checked(row) for row in table["rows"]]
        made = {name: table[name] for name in _versions()}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        return [], f"it cannot be read ({type(e).__name__}: {e})"
    for name, here in _versions().items():
        if made[name] != here:
            return [], f"it was measured with {name} {made[name]}, here is {here}; run gate4d tune again"
    return found, None


def write(file: Path, gpu: str, found: list[dict[str, Any]]) -> None:
    """A table measured here, in one step."""
    text = json.dumps({"gpu": gpu, **_versions(), "rows": [_checked(row) for row in found]}, indent=1) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(file.name + ".new")
    new.write_text(text)
    new.replace(file)


def about() -> str:
    """For ``gate4d info``."""
    own, reason = read(path())
    if reason is not None:
        return f"{path()} is not used: {reason}"
    return f"{len(own)} measured on this machine, {path()}" if own else "the shipped ones (gate4d tune measures others)"


def _versions() -> dict[str, str]:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {"triton": triton, "kernels": source_hash()}


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    config, major_minor = row["config"], row["capability"]
    if not {"pass", "capability", "dtype", "width", "config"} <= row.keys() <= {
        "pass", "capability", "dtype", "width", "config", "features",
    } or len(major_minor) != 2:  # fmt: skip
        raise ValueError(f"a row is {row}")
    for name, value in config.items():
        if not (isinstance(value, bool) if name == "descriptors" else name in _INTEGERS and isinstance(value, int)):
            raise ValueError(f"a tile has {name}={value!r}")
    return row
