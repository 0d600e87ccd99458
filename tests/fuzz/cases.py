"""A case is a handful of numbers; everything else of a call follows from them and the seed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gate4d

from .oracle import PRECISIONS, Problem

GATES = ("none", "pairwise", "keys", "queries", "drop_keys", "static_to_dynamic", "general")
VISIBLE = ("full", "per_frame", "frame_causal", "packed", "intervals")
SCORES = ("uniform", "hard", "edges", "near_one")
VALUES = ("normal", "large", "equal", "zero", "offset")
_DIMS = (4, 4, 3, 3, 1, 1, 0.1)
POISONS = ("none", "q", "k", "v", "grad_out", "hidden_k", "hidden_v", "outside")


@dataclass(frozen=True)
class Case:
    """The default is the simplest case: shrinking goes towards it, field by field.

    Attributes:
        frames: sequences, frames or distinct intervals of a visibility.
        window, sinks: of frame-causal visibility, 0 for none; ``sinks`` also of intervals.
        scores: motion scores; ``edges`` mixes in exact 0 and 1, ``near_one`` lies within a few roundings of 1.
        values: distribution of q, k and v.
        magnitude: typical size of a logit.
        scale: argument of the call, 0 for None.
        poison: where NaN (``infinite``: infinity) lies; ``hidden_*``: keys that no query sees.
        order: permutation of (B, H, N, D) in memory; ``gap``: NaN between rows; ``step``: last stride.
    """

    seed: int = 0
    backend: str = "cpu"
    dtype: str = "float32"
    batch: int = 1
    heads: int = 1
    queries: int = 1
    keys: int = 1
    dim: int = 1
    value_dim: int = 1
    gate: str = "none"
    scores: str = "uniform"
    strength: float = 1.0
    renormalize: bool = True
    visible: str = "full"
    frames: int = 1
    window: int = 0
    sinks: int = 0
    values: str = "normal"
    magnitude: float = 1.0
    scale: float = 0.0
    poison: str = "none"
    infinite: bool = False
    order: tuple[int, ...] = (0, 1, 2, 3)
    gap: int = 0
    step: int = 1
    threads: int = 1

    def code(self) -> str:
        """As Python, without what is the default."""
        shown = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Case({', '.join(shown)})"


def random_case(seed: int, backends: tuple[str, ...] = ("cpu",)) -> Case:
    """The case of a seed."""
    rng = np.random.default_rng([seed, 1])

    def pick(*options: Any, weights: tuple[float, ...] | None = None) -> Any:
        p = None if weights is None else np.array(weights) / sum(weights)
        return options[int(rng.choice(len(options), p=p))]

    def size() -> int:
        ranges = pick((0, 3), (1, 20), (20, 130), (130, 420), weights=(1, 4, 5, 2))
        return int(rng.integers(*ranges))

    low, high = pick((1, 17), (17, 100), (32, 33), (64, 65), (128, 129), (100, 257), (0, 1), weights=_DIMS)
    dim = int(rng.integers(low, high))
    special = rng.random() < 0.3
    other = round(rng.uniform(0, 5), 3), round(rng.uniform(5, 60), 2)
    return Case(
        seed=seed,
        backend=pick(*backends),
        dtype=pick("float32", "bfloat16", "float16", weights=(2, 1, 1)),
        batch=int(pick(1, 2, 3, weights=(4, 3, 1))),
        heads=int(pick(1, 2, 3, 5, weights=(4, 3, 2, 1))),
        queries=size(),
        keys=size(),
        dim=dim,
        value_dim=dim if rng.random() < 0.7 else int(rng.integers(0, 100)),
        gate=pick(*GATES, weights=(2, 3, 2, 1, 1, 2, 3)),
        scores=pick(*SCORES, weights=(3, 2, 4, 1)),
        strength=float(pick(0.0, 0.5, 1.0, 2.0, 3.0, *other, weights=(1, 2, 3, 2, 1, 3, 1))),
        renormalize=bool(rng.random() < 0.7),
        visible=pick(*VISIBLE, weights=(2, 2, 3, 2, 3)),
        frames=int(pick(1, 2, 3, 5, 9)),
        window=int(pick(0, 1, 2, 3)),
        sinks=int(pick(0, 0, 1, 2)),
        values=pick(*VALUES, weights=(8, 1, 1, 1, 1)),
        magnitude=float(pick(1.0, 0.01, 5.0, 30.0, 200.0, weights=(6, 1, 2, 1, 0.5))),
        scale=float(pick(0.0, round(rng.uniform(-1, 1), 3), 10.0, 1e-3, weights=(6, 2, 1, 1))),
        poison=pick(*POISONS[1:]) if special else "none",
        infinite=bool(special and rng.random() < 0.2),
        order=tuple(int(i) for i in rng.permutation(4)) if rng.random() < 0.5 else (0, 1, 2, 3),
        gap=int(pick(0, 1, 3)),
        step=int(pick(1, 2, weights=(5, 1))),
        threads=int(pick(1, 2, 3)),
    )


@dataclass
class Drawn:
    """The call of a case and, for the oracle, the same as numbers."""

    tensors: dict[str, Tensor]  # q, k, v, and what the gate is made of: the leaves of the gradients
    buffers: list[Tensor]  # that q, k and v lie in
    visible: gate4d.Visibility | None
    sees: np.ndarray  # bool [1 or B, Nq, Nk]
    grad_out: Tensor
    grad_lse: Tensor
    masks: tuple[Tensor, Tensor] | None  # bool [B, Nq], [B, Nk]


def draw(case: Case) -> Drawn:
    """The inputs of a case, the same wherever it is drawn."""
    rng = np.random.default_rng([case.seed, 2])
    visible, sees, queries, keys = _visible(case, rng)
    dtype = getattr(torch, case.dtype)
    batch, heads = case.batch, case.heads
    shapes = {"q": (queries, case.dim), "k": (keys, case.dim), "v": (keys, case.value_dim)}
    arrays = {name: _values(case, rng, (batch, heads, *shape), name) for name, shape in shapes.items()}
    grad_out = rng.standard_normal((batch, heads, queries, case.value_dim))
    grad_lse = rng.standard_normal((batch, heads, queries))
    _poison(case, rng, arrays, grad_out, sees)
    laid = {name: _lay_out(case, x, dtype) for name, x in arrays.items()}
    tensors = {name: view for name, (view, _) in laid.items()}
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    for name, n in (("query_motion", queries), ("key_motion", keys), ("output_scale", queries)):
        tensors[name] = torch.from_numpy(_scores(case, rng, (batch, n))).to(wide)
    masks = tuple(torch.from_numpy(rng.random((batch, n)) < 0.4) for n in (queries, keys))
    out = torch.from_numpy(grad_out).to(dtype)
    if case.seed % 7 == 0 and case.poison == "none":  # what sum().backward() hands over
        out = torch.ones((), dtype=dtype).expand_as(out)
    return Drawn(tensors, [b for _, b in laid.values()], visible, sees, out, torch.from_numpy(grad_lse).to(wide), masks)


def make_gate(case: Case, x: Drawn) -> gate4d.MotionGate | None:
    """The gate of a case from its leaves."""
    query, key = x.tensors["query_motion"], x.tensors["key_motion"]
    if case.gate == "none":
        return None
    if case.gate == "pairwise":
        return gate4d.MotionGate.pairwise(query, key, strength=case.strength)
    if case.gate == "keys":
        return gate4d.MotionGate.keys(key, strength=case.strength)
    if case.gate == "queries":
        return gate4d.MotionGate.queries(query, strength=case.strength)
    if case.gate == "drop_keys":
        return gate4d.MotionGate.drop_keys(x.masks[1])
    if case.gate == "static_to_dynamic":
        return gate4d.MotionGate.static_to_dynamic(*x.masks, renormalize=case.renormalize)
    return gate4d.MotionGate(
        query, key, x.tensors["output_scale"], x.masks[1], strength=case.strength, renormalize=case.renormalize
    )


def problem(case: Case, x: Drawn) -> Problem:
    """The numbers of the call, by the formulas of the gates' definitions."""
    names = "q", "k", "v", "query_motion", "key_motion", "output_scale"
    q, k, v, query, key, c = (x.tensors[n].detach().double().numpy() for n in names)
    scale = case.scale or max(case.dim, 1) ** -0.5
    p = Problem(q, k, v, x.sees, scale, PRECISIONS[case.dtype], fused=case.backend != "reference")
    query_mask, key_mask = (m.numpy() for m in x.masks)
    # 1 - g is rounded to the scores' dtype where the gate is made.
    work = np.float64 if case.dtype == "float64" else np.float32
    static = (work(1) - query.astype(work)).astype(np.float64)
    if case.gate == "pairwise":
        return replace(p, query_score=static, key_score=key, strength=case.strength)
    if case.gate == "keys":
        return replace(p, key_score=key, strength=case.strength)
    if case.gate == "queries":
        return replace(p, output_scale=static**case.strength)
    if case.gate == "drop_keys":
        return replace(p, dropped=key_mask)
    if case.gate == "static_to_dynamic":
        scores = (~query_mask).astype(float), key_mask.astype(float)
        return replace(p, query_score=scores[0], key_score=scores[1], renormalize=case.renormalize)
    if case.gate == "general":
        return replace(
            p, query_score=query, key_score=key, output_scale=c, dropped=key_mask, strength=case.strength,
            renormalize=case.renormalize,
        )  # fmt: skip
    return p


def _values(case: Case, rng: np.random.Generator, shape: tuple[int, ...], name: str) -> np.ndarray:
    x = rng.standard_normal(shape)
    if case.values == "equal":
        x = np.broadcast_to(x[..., :1, :], shape).copy() if shape[2] else x
    elif case.values == "zero":
        x = np.zeros(shape)
    elif case.values == "offset":
        x = x + 3
    elif case.values == "large" and name == "v":
        x = x * 500
    if name == "q":  # the logits of normal q and k have a standard deviation of scale sqrt(D)
        usual = abs(case.scale or max(case.dim, 1) ** -0.5) * max(case.dim, 1) ** 0.5
        x = x * (case.magnitude / usual)
    return np.clip(x, -60000, 60000)


def _scores(case: Case, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    x, kind = rng.random(shape), rng.random(shape)
    if case.scores == "hard":
        return (x < 0.5).astype(float)
    if case.scores == "near_one":
        return 1 - np.exp2(-rng.integers(8, 25, shape).astype(float)) * (kind < 0.8)
    if case.scores == "edges":
        return np.where(kind < 0.2, 0.0, np.where(kind > 0.8, 1.0, x))
    return x


def _poison(case: Case, rng: np.random.Generator, arrays: dict[str, np.ndarray], grad_out: np.ndarray, sees) -> None:
    if case.poison in ("none", "outside"):  # what lies outside the views is NaN in every case
        return
    bad = np.inf if case.infinite else np.nan
    name = case.poison.removeprefix("hidden_")
    x = grad_out if name == "grad_out" else arrays[name]
    if not x.size:
        return
    if case.poison.startswith("hidden_"):
        for b, hidden in enumerate(np.broadcast_to(~sees.any(1), (len(x), x.shape[2]))):
            x[b][:, hidden] = bad
        return
    for _ in range(int(rng.integers(1, 4))):
        at = tuple(int(rng.integers(n)) for n in x.shape)
        if rng.random() < 0.5:
            x[at[:3]] = bad  # a whole row
        else:
            x[at] = bad


def _lay_out(case: Case, x: np.ndarray, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A view with the values of ``x``, and its buffer, which is NaN everywhere else."""
    sizes = [n + case.gap for n in x.shape[:3]] + [case.step * x.shape[3] + case.gap]
    buffer = torch.full([sizes[i] for i in case.order], torch.nan, dtype=dtype)
    whole = buffer.permute(tuple(int(i) for i in np.argsort(case.order)))
    first = case.gap // 2
    view = whole[tuple(slice(first, first + n) for n in x.shape[:3])]
    view = view[..., first : first + case.step * x.shape[3] : case.step]
    view.copy_(torch.from_numpy(x))
    return view, buffer


def _visible(case: Case, rng: np.random.Generator):
    """The visibility, what it means as a mask, and the numbers of queries and keys that fit it."""
    queries, keys, make = case.queries, case.keys, gate4d.Visibility
    if case.visible == "full":
        return None, np.ones((1, queries, keys), bool), queries, keys
    if case.visible in ("per_frame", "frame_causal"):
        sizes = _lengths(rng, max(keys, case.frames), case.frames, least=1)
        frame = np.repeat(np.arange(case.frames), sizes)
        layout = gate4d.TokenLayout(case.frames, [int(n) for n in sizes])
        if case.visible == "per_frame":
            return make.per_frame(layout), (frame[:, None] == frame)[None], len(frame), len(frame)
        first = int(rng.integers(case.frames)) if case.frames > 1 and rng.random() < 0.5 else 0
        visible = make.frame_causal(layout, case.window or None, case.sinks, first)
        of_query = frame[frame >= first][:, None]
        near = frame > of_query - case.window if case.window else True
        sees = (frame <= of_query) & (near | (frame < case.sinks))
        return visible, sees[None], len(of_query), len(frame)
    if case.visible == "packed":
        lengths = [_lengths(rng, n, case.frames) for n in (queries, keys)]
        number = [np.repeat(np.arange(case.frames), n) for n in lengths]
        visible = make.packed(*([0, *map(int, np.cumsum(n))] for n in lengths))
        return visible, (number[0][:, None] == number[1])[None], queries, keys
    rows = case.batch if rng.random() < 0.5 else 1
    start, end = rng.integers(0, keys + 1, (2, rows, queries))
    if case.frames < 9:  # as many distinct intervals as frames, so that whole tiles agree
        start, end = (x[:, np.sort(rng.integers(0, min(case.frames, max(queries, 1)), queries))] for x in (start, end))
    sink = np.minimum(rng.integers(0, case.sinks * 8 + 1, (rows, queries)), keys)
    j = np.arange(keys)
    sees = (j < sink[..., None]) | ((j >= start[..., None]) & (j < end[..., None]))
    return make.intervals(*(torch.from_numpy(x) for x in (start, end, sink))), sees, queries, keys


def _lengths(rng: np.random.Generator, total: int, parts: int, least: int = 0) -> np.ndarray:
    """``parts`` numbers that add up to ``total``, none below ``least``."""
    cuts = np.sort(rng.integers(0, total - least * parts + 1, parts - 1))
    return np.diff(np.concatenate(([0], cuts, [total - least * parts]))) + least
