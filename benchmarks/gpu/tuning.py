"""Tile shapes tried in turns, one row a pass and head dimension, and the table that one run yields.

A tuned table is a list of rows for ``kernels/_triton/triton_tuned.json``, which is shipped, or for a user's own table,
which ``gate4d tune`` writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import torch

import gate4d
from gate4d import MotionGate
from gate4d.kernels.support import TileShape, dtype_name, tile_shape

from . import attention_works
from .work import Setup, Variant, Variants, Work, check_gradients, check_rows

TILES = {
    "forward": ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (64, 64, 4, 3)),
    "grad_query": ((64, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 4, 2)),
    "grad_key": ((32, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 2), (64, 64, 4, 2)),
    "received": ((64, 128, 8, 2), (128, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 3)),
}  # fmt: skip
GAIN = 1.02  # a replacement must be this much faster than what the table has


def _name(tile: tuple[int, ...]) -> str:
    return "block_m={} block_n={} num_warps={} num_stages={}".format(*tile)


def config_of(name: str) -> dict[str, int]:
    """The configuration that a variant's name says."""
    return {key: int(value) for key, value in (part.split("=") for part in name.split())}


def _step(s: Setup, kind: str, tokens: int) -> tuple[Variant, Callable[[], None]]:
    """What runs the pass, and the check of its result."""
    q, k, v, motion = attention_works.inputs(s, tokens // s.unit, grad=kind.startswith("grad"))
    gate = MotionGate.pairwise(motion)
    attend = partial(gate4d.gated_attention, gate=gate, backend=s.kernel)
    if kind == "forward":
        return partial(attend, q, k, v), lambda: check_rows(attend(q, k, v), q, k, v, gate, None)
    if kind == "received":
        _, aux = gate4d.gated_attention(q, k, v, return_aux=True)
        check = attention_works._received(s, tokens)[2]
        return partial(gate4d.received_attention, q, k, aux.lse, over=("queries",)), check
    out, grad = attend(q, k, v), torch.randn(q.shape, device=s.device, dtype=s.dtype)
    step = partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)
    return step, lambda: check_gradients(s, attend(q, k, v), q, k, v, motion, ("q", "k", "v"))


def _variants(s: Setup, kind: str, tokens: int) -> Variants:
    """The table's configuration against others; one that is wrong or does not compile is recorded with its error."""
    step, check = _step(s, kind, tokens)
    wrong: dict[str, str] = {}

    def with_tile(tile: tuple[int, ...], run: Callable[[], object]) -> object:
        name = _name(tile)
        if name in wrong:
            raise RuntimeError(wrong[name])
        with tile_shape(kind, TileShape(*tile)):
            return run()

    def check_all() -> None:
        check()
        for tile in TILES[kind]:
            try:
                with_tile(tile, check)
            except Exception as e:  # recorded as the variant's result
                wrong[_name(tile)] = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"

    others = {_name(tile): partial(with_tile, tile, step) for tile in TILES[kind]}
    return {"table": step}, others, check_all


def plan(s: Setup) -> list[Work]:
    """A row each pass at head dimensions 64 and 128: the table's time over the fastest other's."""
    works = []
    for dim in (s.dim, 2 * s.dim):
        for kind in TILES:
            at = replace(s, dim=dim)
            build = partial(_variants, at, kind, 16384)
            works.append(Work(f"T1 tiles of {kind}, D={dim}", None, build, 60))
    return works


def tuned(result: dict) -> list[dict]:
    """Rows for the tuned table out of the rows of a results file. Only a plain gate was measured: with more, a tile
    may need more registers than there are."""
    found = []
    for row in result["rows"]:
        if row["id"] != "T1" or row["error"] or not row["medians"]:
            continue
        kind, dim = row["what"].removeprefix("tiles of ").split(", D=")
        medians = row["medians"]
        best = min(medians, key=medians.__getitem__)
        if best == "table" or medians["table"] < GAIN * medians[best]:
            continue
        capability = list(torch.cuda.get_device_capability()) if torch.cuda.is_available() else [0, 0]
        config = asdict(TileShape(**config_of(best)))
        found.append(
            {"pass": kind, "capability": capability, "dtype": dtype_name(torch.bfloat16), "width": int(dim),
             "features": ["gate"], "config": config}
        )  # fmt: skip
    return found
