"""Tile shapes and variants per pass, architecture, type and head dimension.

The defaults follow from registers and shared memory of the compiled code; :mod:`.tuned` has measured replacements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import tuned
from .runtime import AMD

# Of a call: a gate; a weight other than the plain 1 - ab; intervals; dropped keys.
FEATURES = ("gate", "power", "bounds", "drop")
PASSES = ("forward", "forward_stats", "grad_query", "grad_key", "received", "cross")


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int = 0  # limit a thread; where the assembler is left to choose, it may spill one to fit another block
    descriptors: bool = False  # forward: load K and V through tensor descriptors (the copy engine from Hopper on)

    @property
    def options(self) -> dict[str, int]:
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


# (pass, bytes per element) -> by width of the widest head: block_m, block_n, warps, stages and sometimes a limit
# of registers. For each, the largest tile whose compiled code needs no local memory in any combination of gate,
# visibility and dropped keys; or by what the tile has room for, words of FEATURES, the least first.
Entry = tuple[int, ...]
Table = dict[tuple[str, int], dict[int, Entry | dict[str, Entry]]]
_AMPERE: Table = {
    ("forward", 2): {
        64: {"gate bounds": (128, 64, 8, 3), "gate power bounds drop": (128, 32, 8, 3, 255)},
        128: (128, 32, 8, 2),
        256: (64, 64, 8, 2),
    },
    ("forward_stats", 2): {64: (128, 32, 8, 3), 128: (128, 16, 8, 2), 256: (32, 64, 8, 2)},
    ("grad_query", 2): {
        64: (128, 32, 8, 2),
        128: {"gate": (128, 32, 8, 2), "gate power bounds drop": (128, 16, 8, 2)},
        256: (64, 32, 8, 1),
    },
    ("grad_key", 2): {
        64: {"gate bounds": (32, 128, 8, 2), "gate power bounds drop": (16, 128, 8, 2)},
        128: (32, 32, 8, 1),
        256: (32, 32, 8, 1),
    },
    ("received", 2): {64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (64, 64, 8, 1)},
    ("forward", 4): {64: (32, 32, 8, 1), 128: (32, 16, 8, 2), 256: (32, 32, 8, 2)},
    ("forward_stats", 4): {64: (32, 32, 8, 1), 128: (32, 16, 8, 2), 256: (32, 32, 8, 2)},
    ("grad_query", 4): {64: (32, 32, 8, 1, 128), 128: (32, 16, 8, 1, 255), 256: (16, 16, 8, 1, 255)},
    ("grad_key", 4): {64: (16, 32, 8, 1, 255), 128: (16, 32, 8, 1), 256: (16, 32, 8, 1, 255)},
    ("received", 4): {64: (32, 32, 8, 1, 128), 128: (32, 32, 8, 1, 128), 256: (16, 32, 8, 1)},
    ("cross", 2): {64: (64, 128, 8, 3)},
    ("cross", 4): {64: (64, 64, 8, 2)},
}
_HOPPER: Table = {
    ("forward", 2): {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
    ("forward_stats", 2): {64: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (128, 16, 8, 2)},
    ("grad_query", 2): {
        64: {"gate bounds": (128, 64, 8, 2), "gate power bounds drop": (128, 32, 8, 2)},
        128: (128, 32, 8, 2),
        256: (64, 32, 8, 1),
    },
    ("grad_key", 2): {64: (32, 128, 8, 2), 128: (32, 64, 8, 1), 256: (32, 32, 8, 1)},
    ("grad_key", 4): {64: (32, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 32, 8, 1)},
    ("cross", 2): {64: (128, 128, 8, 3)},
}
_BLACKWELL: Table = {
    **_HOPPER,
    ("forward_stats", 2): {64: (64, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 64, 8, 2)},
    ("forward", 2): {64: (128, 64, 8, 3, 255), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    ("grad_query", 2): {64: (64, 64, 8, 2), 128: (64, 64, 8, 2, 255), 256: (64, 32, 8, 1)},
    ("grad_key", 2): {64: (32, 128, 8, 2, 255), 128: (32, 64, 8, 1, 255), 256: (32, 32, 8, 1)},
    ("received", 2): {64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (64, 64, 8, 1, 255)},
    ("forward", 4): {64: (32, 32, 8, 1, 255), 128: (32, 16, 8, 2), 256: (32, 32, 8, 2)},
    ("forward_stats", 4): {64: (32, 32, 8, 1, 255), 128: (32, 16, 8, 2), 256: (32, 32, 8, 2)},
    ("received", 4): {64: (32, 32, 8, 1, 128), 128: (32, 32, 8, 1, 128), 256: (16, 32, 8, 1, 255)},
}
# On consumer cards (8.6, 8.9, 12.x: 99 KiB of shared memory a block and no tensor memory), over Ampere's.
_CONSUMER: Table = {
    ("forward", 2): {
        64: {"gate": (128, 64, 8, 3), "gate power bounds drop": (128, 32, 8, 3, 255)},
        128: (128, 32, 8, 2),
        256: (64, 32, 8, 2),
    },
    ("grad_key", 2): {64: (32, 32, 8, 2, 255), 128: (32, 32, 8, 1), 256: (32, 32, 8, 1)},
    ("forward", 4): {64: (32, 32, 8, 1), 128: (32, 16, 8, 2), 256: (16, 32, 8, 2)},
    ("forward_stats", 4): {64: (32, 32, 8, 1), 128: (32, 16, 8, 2), 256: (16, 32, 8, 2)},
    ("grad_key", 4): {64: (16, 32, 8, 1, 255), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1, 255)},
    ("received", 4): {64: (32, 32, 8, 1, 128), 128: (32, 32, 8, 1, 255), 256: (16, 32, 8, 1, 255)},
}
# AMD's, over Ampere's: 64 KiB of shared memory a block on CDNA3 and RDNA3, and no limit of registers to be given.
_AMD: Table = {
    ("forward", 2): {64: (128, 64, 4, 1), 128: (64, 64, 4, 1), 256: (64, 32, 4, 1)},
    ("forward_stats", 2): {64: (128, 64, 4, 1), 128: (64, 64, 4, 1), 256: (64, 32, 4, 1)},
    ("grad_query", 2): {64: (64, 64, 4, 1), 128: (64, 32, 4, 1), 256: (64, 32, 4, 1)},
    ("grad_key", 2): {64: (32, 64, 4, 1), 128: (32, 32, 4, 1), 256: (32, 32, 4, 1)},
    ("received", 2): {64: (64, 64, 4, 1), 128: (64, 64, 4, 1), 256: (32, 32, 4, 1)},
    ("forward", 4): {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
    ("forward_stats", 4): {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
    ("grad_query", 4): {64: (32, 32, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)},
    ("grad_key", 4): {64: (16, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)},
    ("received", 4): {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 32, 4, 1)},
    ("cross", 2): {64: (64, 64, 4, 1)},
    ("cross", 4): {64: (64, 64, 8, 1)},
}
_UNALIGNED: dict[tuple[str, int], Entry] = {
    ("forward", 2): (128, 16, 8, 2, 255),
    ("forward_stats", 2): (128, 16, 8, 2, 255),
}
_override: dict[str, Config] = {}


def config(
    kind: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    aligned: bool = True,
    features: frozenset[str] = frozenset(FEATURES),
) -> Config:
    """The configuration of a pass; ``width`` is the widest head dimension, padded; ``features`` those of the call."""
    if kind in _override:
        return _override[kind]
    for row in tuned.rows():
        if (row["pass"], tuple(row["capability"]), row["dtype"], row["width"]) == (
            kind, capability, str(dtype).removeprefix("torch."), width,
        ) and features <= set(row.get("features", FEATURES)):  # fmt: skip
            return Config(**row["config"])
    key = (kind, 4 if dtype == torch.float32 else 2)
    if capability == AMD:
        table = _AMD[key]
        block_m, block_n, warps, stages = _entry(table[max(64, width)] if aligned else table[max(table)], features)
        return Config(block_m, block_n, warps, stages)
    newer = _CONSUMER if capability in ((8, 6), (8, 9)) or capability >= (12, 0) else {}
    if (9, 0) <= capability < (12, 0):
        newer = _HOPPER if capability < (10, 0) else _BLACKWELL
    table = newer.get(key, _AMPERE[key])
    # Rows that Triton does not know to be aligned are loaded element by element, with an address each.
    entry = _entry(table[max(64, width)] if aligned else _UNALIGNED.get(key, table[256]), features)
    block_m, block_n, warps, stages, registers = (*entry, 0)[:5]
    return Config(block_m, block_n, warps, stages, registers)


def _entry(entry: Entry | dict[str, Entry], features: frozenset[str]) -> Entry:
    """The first that has room for the features of the call."""
    if isinstance(entry, tuple):
        return entry
    return next(tile for room, tile in entry.items() if features <= set(room.split()))


@contextmanager
def override(kind: str, base: Config, **changes: Any) -> Iterator[Config]:
    """Within the context ``kind`` uses ``base`` with ``changes``: how benchmarks try variants."""
    chosen = replace(base, **changes)
    previous = dict(_override)
    _override[kind] = chosen
    try:
        yield chosen
    finally:
        _override.clear()
        _override.update(previous)
