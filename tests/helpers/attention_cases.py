"""Cases of gated attention, and their check against the float64 reference: values, statistics and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gate4d
from gate4d import MotionGate, TokenLayout, Visibility
from gate4d.functional import ROW_STATS
from helpers.accuracy import assert_accurate, assert_accurate_gradient
from helpers.torch_attention import torch_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    gate: str = "pairwise"
    visible: str = "full"
    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: int = 2
    queries: int = 111  # taken where the visibility leaves it open
    keys: int = 111
    dim: int = 32
    value_dim: int | None = None
    memory: str = "contiguous"
    logit_scale: float = 1.0

    def __str__(self) -> str:
        """Test id: the fields that are not the default."""
        shown = [str(getattr(self, f)).removeprefix("torch.") for f in ("gate", "visible", "dtype", "memory")]
        sizes = f"{self.batch}x{self.heads}x{self.queries}x{self.keys}x{self.dim}"
        return "-".join([*shown, sizes + (f"x{self.value_dim}" if self.value_dim is not None else "")])


# --- gates: name -> (leaves drawn for a case, the gate made from them) ------------------------------------------------


def motion(batch: int, tokens: int) -> Tensor:
    """Motion scores ``[B, N]`` with some exact 0 (special tokens) and some exact 1."""
    score = torch.rand(batch, tokens)
    pick = torch.rand(batch, tokens)
    return torch.where(pick < 0.15, 0.0, torch.where(pick > 0.9, 1.0, score))


def _pairwise(strength: float) -> Callable[..., MotionGate]:
    return lambda query, key, mask: MotionGate.pairwise(query, key, strength=strength)


def _general(query: Tensor, key: Tensor, mask: tuple[Tensor, Tensor]) -> MotionGate:
    return MotionGate(1 - query, key, 1 - 0.5 * query, mask[1], strength=1.7, renormalize=False)


GATES: dict[str, Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], MotionGate | None]] = {
    "none": lambda query, key, mask: None,
    "pairwise": _pairwise(1.0),
    "pairwise_0": _pairwise(0.0),
    "pairwise_half": _pairwise(0.5),
    "pairwise_2": _pairwise(2.0),
    "pairwise_3": _pairwise(3.0),
    "pairwise_1.7": _pairwise(1.7),
    "keys": lambda query, key, mask: MotionGate.keys(key),
    "queries": lambda query, key, mask: MotionGate.queries(query, strength=0.5),
    "drop_keys": lambda query, key, mask: MotionGate.drop_keys(mask[1]),
    "static_to_dynamic": lambda query, key, mask: MotionGate.static_to_dynamic(*mask),
    "static_to_dynamic_renormalized": lambda query, key, mask: MotionGate.static_to_dynamic(*mask, renormalize=True),
    "zeroed_after_softmax": lambda query, key, mask: MotionGate(1 - query, key, renormalize=False),
    "dropped_and_gated": lambda query, key, mask: MotionGate(1 - query, key, dropped_keys=mask[1]),
    "general": _general,
}


# --- visibility: name -> (queries, keys, batch) -> the visibility and the number of queries it describes --------------


def _frames(tokens: int) -> int:
    return next(t for t in (3, 4, 1) if tokens % t == 0)


def _ragged(tokens: int) -> TokenLayout:
    """Frames of 1, 2, 3, ... tokens, the rest in the last."""
    sizes = [1]
    while sum(sizes) + len(sizes) + 1 <= tokens:
        sizes.append(len(sizes) + 1)
    sizes[-1] += tokens - sum(sizes)
    return TokenLayout(len(sizes), sizes)


def _uniform(tokens: int) -> TokenLayout:
    return TokenLayout(_frames(tokens), tokens // _frames(tokens))


def _window(queries: int, keys: int, batch: int) -> Visibility:
    layout = _ragged(keys)
    return Visibility.frame_causal(layout, window=2, sinks=2, first_query_frame=min(3, layout.frames - 1))


def _packed(queries: int, keys: int, batch: int) -> Visibility:
    """Five sequences: one without keys, one without queries."""
    q, k = queries, keys
    return Visibility.packed([0, q // 3, q // 2, q // 2, q - q // 5, q], [0, k // 2, k // 2, k - k // 3, k - 1, k])


def _intervals(queries: int, keys: int, batch: int, sinks: bool = True) -> Visibility:
    """Per batch item, some empty, some reaching into the sinks."""
    start, end = torch.randint(0, keys + 1, (2, batch, queries))
    return Visibility.intervals(start, end, torch.randint(0, keys // 3 + 1, (batch, queries)) if sinks else 0)


def _overlapping_sinks(queries: int, keys: int, batch: int) -> Visibility:
    start = torch.arange(queries) * keys // max(1, queries) // 2
    return Visibility.intervals(start, (start + keys // 3).clamp(max=keys), keys // 4)


def _empty(queries: int, keys: int, batch: int) -> Visibility:
    """Most queries see nothing, in whole tiles of queries."""
    rows = torch.arange(queries)
    sees = rows % 97 == 5
    return Visibility.intervals(torch.where(sees, keys // 2, keys), torch.where(sees, keys, 0))


VISIBLE: dict[str, Callable[[int, int, int], Visibility | None]] = {
    "full": lambda q, k, b: None,
    "per_frame": lambda q, k, b: Visibility.per_frame(_uniform(k)),
    "ragged": lambda q, k, b: Visibility.per_frame(_ragged(k)),
    "frame_causal": lambda q, k, b: Visibility.frame_causal(_uniform(k)),
    "window": _window,
    "packed": _packed,
    "intervals": _intervals,
    "intervals_without_sinks": lambda q, k, b: _intervals(q, k, b, sinks=False),
    "overlapping_sinks": _overlapping_sinks,
    "empty": _empty,
}


# --- memory: how q, k and v lie ---------------------------------------------------------------------------------------


def _nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def lay_out(qkv: list[Tensor], memory: str) -> tuple[list[Tensor], list[Tensor]]:
    """Views with the values of ``qkv`` (``expanded``: of their first batch item and head), and the buffers they
    lie in, which hold NaN wherever no view looks."""
    if memory == "contiguous":
        return qkv, qkv
    dtype = qkv[0].dtype
    if memory == "qkv":  # qkv(x).reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4), inside a longer sequence
        batch, heads, tokens, dim = qkv[0].shape
        buffer = _nan(batch, tokens + 2, 3, heads, dim, dtype=dtype)
        views = list(buffer[:, 1:-1].permute(2, 0, 3, 1, 4))
        buffers = [buffer]
    else:
        buffers, views = [], []
        for x in qkv:
            batch, heads, tokens, dim = x.shape
            if memory == "heads_last":
                buffers.append(_nan(batch, tokens + 2, heads, dim, dtype=dtype))
                views.append(buffers[-1][:, 1:-1].transpose(1, 2))
            elif memory == "odd_rows":  # rows that start at odd addresses
                buffers.append(_nan(batch, heads, tokens + 2, dim + 3, dtype=dtype))
                views.append(buffers[-1][:, :, 1:-1, 1 : dim + 1])
            elif memory == "last_stride_2":
                buffers.append(_nan(batch, heads, tokens, 2 * dim, dtype=dtype))
                views.append(buffers[-1][..., ::2])
            elif memory == "expanded":
                buffers.append(x[:1, :1].clone())
                views.append(buffers[-1].expand_as(x))
                continue
            else:
                raise ValueError(memory)
    if memory != "expanded":
        for view, x in zip(views, qkv, strict=True):
            view.copy_(x)
    return views, buffers


# --- the check --------------------------------------------------------------------------------------------------------

Attend = Callable[..., tuple[Tensor, Any]]
Results = tuple[dict[str, Tensor], dict[str, Tensor | None]]  # values and gradients, by name
# A gradient that hangs on one rounding has an error like a normal variable. The largest of 8 drawn for torch lets 0.8 %
# of equally accurate computations exceed twice its size (1 % measured: torch's own orders against each other, gradients
# of the motion scores at 30 times the usual logits), the largest of 32 lets 0.015 %.
ORDERS = 32
ROUNDING: dict[str, dict[str, Any]] = {
    "lse": {"magnitude": 1.0},
    "entropy": {"magnitude": 1.0},
    "sum_sq": {"degree": 2},
}


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    query_motion: Tensor
    key_motion: Tensor
    masks: tuple[Tensor, Tensor]
    visible: Visibility | None
    grad_out: Tensor
    grad_lse: Tensor
    buffers: list[Tensor]


def draw(case: Case) -> Inputs:
    """The inputs of a case; the visibility decides how many queries there are."""
    visible = VISIBLE[case.visible](case.queries, case.keys, case.batch)
    queries = case.queries if visible is None else visible.bounds.shape[2]
    batch, heads, keys, dim = case.batch, case.heads, case.keys, case.dim
    value_dim = dim if case.value_dim is None else case.value_dim
    shapes = (queries, dim), (keys, dim), (keys, value_dim)
    qkv = [torch.randn(batch, heads, *s) for s in shapes]
    qkv[0] *= case.logit_scale
    views, buffers = lay_out([x.to(case.dtype) for x in qkv], case.memory)
    grad_out = torch.randn(batch, heads, queries, value_dim).to(case.dtype)
    if case.memory == "expanded":  # what sum().backward() hands over
        grad_out = torch.ones((), dtype=case.dtype).expand_as(grad_out)
    masks = torch.rand(batch, queries) < 0.4, torch.rand(batch, keys) < 0.4
    return Inputs(
        *views, motion(batch, queries), motion(batch, keys), masks, visible,
        grad_out, torch.randn(batch, heads, queries), buffers,
    )  # fmt: skip


def evaluate(attend: Attend, x: Inputs, gate: str, convert: Callable[[Tensor], Tensor] = Tensor.detach) -> Results:
    """All values and gradients of one implementation, by name."""
    named = {n: convert(getattr(x, n)).requires_grad_() for n in ("q", "k", "v", "query_motion", "key_motion")}
    q, k, v, query, key = named.values()
    out, aux = attend(q, k, v, gate=GATES[gate](query, key, x.masks), visible=x.visible)
    values = {"out": out.detach(), "lse": aux.lse.detach(), **{s: getattr(aux, s) for s in ROW_STATS}}
    grads = torch.autograd.grad(
        (out, aux.lse),
        list(named.values()),
        (x.grad_out.to(out.dtype), x.grad_lse.to(aux.lse.dtype)),
        allow_unused=True,
    )
    return values, dict(zip(named, grads, strict=True))


def exact(x: Inputs, gate: str) -> Results:
    """The float64 reference."""
    call = _caller("reference")
    return evaluate(
        call, replace(x, q=x.q.double(), k=x.k.double(), v=x.v.double()), gate, lambda t: t.detach().double()
    )


def _caller(backend: str) -> Attend:
    def call(q: Tensor, k: Tensor, v: Tensor, **options: Any):
        return gate4d.gated_attention(q, k, v, row_stats=ROW_STATS, return_aux=True, backend=backend, **options)

    return call


def check(case: Case, backend: str | Attend, x: Inputs | None = None) -> None:
    """Assert that ``backend`` (or a function called like torch_attention) computes the case as accurately as torch does
    at that precision.

    Torch's error is the worst over up to ``ORDERS`` orders of summation, all equally valid, drawn as long as the first
    ones do not already allow the error: in a small case a single order can be exact.
    """
    x = draw(case) if x is None else x
    before = [b.clone() for b in x.buffers]
    got = evaluate(_caller(backend) if isinstance(backend, str) else backend, x, case.gate)
    assert all(torch.equal(_bits(a), _bits(b)) for a, b in zip(x.buffers, before, strict=True)), "an input was changed"
    assert got[0]["out"].dtype == case.dtype
    reference = exact(x, case.gate)
    baselines = []
    for order in range(ORDERS):
        baselines.append(evaluate(partial(torch_attention, running=order > 0), x, case.gate))
        try:
            return _compare(case, got, reference, baselines)
        except AssertionError:
            if order == ORDERS - 1:
                raise


def _compare(case: Case, got: Results, reference: Results, baselines: list[Results]) -> None:
    (values, grads), (exact_values, exact_grads) = got, reference
    for name, value in values.items():
        others = (b[0][name] for b in baselines)
        assert_accurate(name, value, exact_values[name].double(), *others, **ROUNDING.get(name, {}))
    for name, expected in exact_grads.items():
        if expected is None:
            unused = grads[name] is None or not grads[name].any()
            assert unused, f"{name} has a gradient although the result does not depend on it"
            continue
        others = (b[1][name] for b in baselines)
        assert_accurate_gradient(f"grad of {name}", grads[name], expected, *others, dtype=case.dtype)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)
