"""torch's FlexAttention as a backend: the gate as a score_mod, visibility as blocks that follow from the intervals.

The mask of blocks costs a comparison for each pair of blocks of 128 queries and 128 keys; no mask of tokens is made.
Whatever decides the code is part of a shape class, which has one compiled object, dynamic in the numbers of tokens
where Inductor can do that; where it cannot (on the CPU), one for each size. Compiled and run on the CPU, not on a GPU.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..support import KERNEL_DTYPES, dtype_name, has_triton
from .op import Call, Request

BLOCK = 128
_KEPT_CLASSES = 64
_DEVICES = ("cuda", "xpu", "cpu")
# Found out once, on import: torch.compile could not trace the search.
HAS_COMPILER = shutil.which(os.environ.get("CXX") or "g++") is not None


def reasons(r: Request) -> list[str]:
    """Why FlexAttention cannot serve the request."""
    found = []
    if r.device_type not in _DEVICES:
        found.append(f"it needs CUDA, XPU or CPU tensors, got {r.device_type}")
    elif r.device_type != "cpu" and not has_triton():
        found.append("triton is not installed; pip install gate4d[triton]")
    if r.dtype not in KERNEL_DTYPES:
        found.append(f"it supports float32, bfloat16 and float16, got {dtype_name(r.dtype)}")
    if min(r.head_dim, r.value_dim) < 16:
        found.append(f"it supports head dimensions from 16 on, got {min(r.head_dim, r.value_dim)}")
    if r.row_stats:
        found.append("it returns no row statistics")
    if r.learned:
        found.append("it gives no gradient to the gate's scores")
    if r.device_type == "cpu":
        if not HAS_COMPILER:
            found.append("on the CPU torch compiles it with a C++ compiler, and g++ (or $CXX) was not found")
        if r.aux or not r.renormalize:
            found.append("on the CPU it returns no lse, which a gate without renormalisation needs too")
        if r.grad:
            found.append("on the CPU it has no backward")
    return found


# --- the mask of blocks


class Blocks(NamedTuple):
    """Which blocks of keys a block of queries sees in part and in full, bool ``[1 or B, query blocks, key blocks]``."""

    partial: Tensor
    full: Tensor


def blocks(
    bounds: Tensor | None,  # [1 or B, 3, Nq] int32: start, end, sink_end
    dropped: Tensor | None,  # [B, Nk] bool
    num_queries: int,
    num_keys: int,
    device: torch.device,
) -> Blocks:
    """From the intervals alone. A block at the end of the tokens is never full, as FlexAttention wants it."""
    if bounds is None:
        rows = torch.tensor([0, num_keys, 0], dtype=torch.int32, device=device)
        bounds = rows[None, :, None].expand(1, 3, num_queries)
    start, end, sink = bounds.clamp(max=num_keys).unbind(1)  # [1 or B, Nq]
    seen = start < end
    joined = seen & (sink >= start)  # sinks that touch the interval make it longer
    start, end = torch.where(joined, 0, start), torch.where(joined, torch.maximum(sink, end), end)
    start, end = torch.where(seen, start, num_keys), torch.where(seen, end, 0)

    def per_block(x: Tensor, padding: int, largest: bool) -> Tensor:  # [1 or B, query blocks, 1]
        x = torch.nn.functional.pad(x, (0, -num_queries % BLOCK), value=padding).unflatten(1, (-1, BLOCK))
        return (x.amax(2) if largest else x.amin(2))[..., None]

    first = torch.arange(0, num_keys, BLOCK, device=device)  # of the keys of a block
    last = first + BLOCK  # past the end for one at the end, which therefore is not full
    # Rows that pad the last block of queries see nothing: it is not full, and they add nothing to what is seen.
    any_sink = first < per_block(sink, 0, True)
    any_interval = (last > per_block(start, num_keys, False)) & (first < per_block(end, 0, True))
    all_sink = last <= per_block(sink, 0, False)
    all_interval = (first >= per_block(start, num_keys, True)) & (last <= per_block(end, 0, False))
    seen_any, full = any_sink | any_interval, all_sink | all_interval
    if dropped is not None:
        parts = torch.nn.functional.pad(dropped, (0, -num_keys % BLOCK), value=True).unflatten(1, (-1, BLOCK))
        seen_any = seen_any & ~parts.all(2)[:, None]
        full = full & ~parts.any(2)[:, None]
    return Blocks(seen_any & ~full, full)


# Of blocks seen in part, then in full: how many a row of blocks has, and which.
Lists = tuple[Tensor, Tensor, Tensor, Tensor]


def _listed(which: Tensor) -> tuple[Tensor, Tensor]:
    """Number of True blocks a row and their indices first, int32 ``[B, 1, rows]`` and ``[B, 1, rows, columns]``."""
    which = which[:, None]
    order = torch.argsort(which.to(torch.int8), dim=-1, descending=True, stable=True)
    return which.sum(-1, dtype=torch.int32), order.to(torch.int32)


# Lists of blocks of a bounds tensor, which layers share: (its version, number of keys, lists).
_lists: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _block_lists(c: Call) -> Lists:
    def make() -> Lists:
        found = blocks(c.bounds, c.dropped_keys, c.q.shape[2], c.k.shape[2], c.q.device)
        return *_listed(found.partial), *_listed(found.full)

    if c.bounds is None or c.dropped_keys is not None or torch.compiler.is_compiling() or c.bounds.is_inference():
        return make()
    key = c.bounds._version, c.k.shape[2]
    kept = _lists.get(c.bounds)
    if kept is None or kept[0] != key:
        kept = _lists[c.bounds] = key, make()
    return kept[1]


# --- the call


class ShapeClass(NamedTuple):
    """What decides the compiled code: all but the numbers of tokens, and of batch items and heads."""

    device: torch.device
    dtype: torch.dtype
    dims: tuple[int, int]
    gate: str  # "pairwise", "keys" or none
    bounds: bool
    shared_bounds: bool  # one item serves the whole batch
    dropped: bool
    lse: bool
    grad: bool
    scale: float
    strength: float
    sizes: tuple[int, ...] | None  # B, H, Nq, Nk; None where one code serves all


def _template(
    q: Tensor, k: Tensor, v: Tensor, query_score: Tensor | None, key_score: Tensor | None,
    dropped: Tensor | None, bounds: Tensor | None, lists: Lists | None,
    numbers: tuple[str, str], lse: bool,
):  # fmt: skip
    # As text, which a compiled function takes for constants: a float would become one of its inputs, and no mod of
    # FlexAttention may read those.
    scale, strength = float(numbers[0]), float(numbers[1])
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    score_mod = mask = None
    if key_score is not None:

        def gated(score, b, h, i, j):
            weight = 1 - (key_score[b, j] if query_score is None else query_score[b, i] * key_score[b, j])
            return score + strength * torch.log(weight)  # a weight of 0 leaves the row's softmax, as it should

        score_mod = gated
    if lists is not None:
        shared = bounds is None or bounds.shape[0] == 1

        def visible(b, h, i, j):
            item = torch.zeros_like(b) if shared else b
            found = i >= 0
            if bounds is not None:
                inside = (j >= bounds[item, 0, i]) & (j < bounds[item, 1, i])
                found = found & (inside | (j < bounds[item, 2, i]))
            if dropped is not None:
                found = found & ~dropped[b, j]
            return found

        mask = BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(q.shape[2], k.shape[2]),
            compute_q_blocks=q.requires_grad or k.requires_grad or v.requires_grad,
        )  # fmt: skip
    aux = AuxRequest(lse=True) if lse else None
    result = flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, return_aux=aux)
    if not lse:
        return result, None
    out, rest = result
    return out, rest.lse


_compiled: OrderedDict[ShapeClass, Callable] = OrderedDict()
_number = itertools.count()
_static_only: set[ShapeClass] = set()  # classes for which Inductor has no dynamic code


def compiled(shape_class: ShapeClass) -> Callable:
    """The compiled function of a shape class. Each has a code object of its own: Dynamo counts recompilations by code
    object and beyond its limit runs eagerly, which for FlexAttention means the whole map. ``fullgraph`` makes that an
    error."""
    found = _compiled.get(shape_class)
    if found is None:
        name = f"flex_{next(_number)}"
        own = FunctionType(_template.__code__.replace(co_name=name), _template.__globals__, name)
        found = _compiled[shape_class] = torch.compile(own, dynamic=shape_class.sizes is None, fullgraph=True)
        if len(_compiled) > _KEPT_CLASSES:
            _compiled.popitem(last=False)
    else:
        _compiled.move_to_end(shape_class)
    return found


def _call(shape_class: ShapeClass, sizes: tuple[int, ...], args: tuple) -> tuple[Tensor, Tensor | None]:
    from torch._inductor.exc import InductorError

    static = shape_class._replace(sizes=sizes)
    if shape_class.device.type == "cpu" or shape_class in _static_only:
        return compiled(static)(*args)
    try:
        return compiled(shape_class)(*args)
    except InductorError:
        result = compiled(static)(*args)  # an error of its own, if it is not the symbols
        _static_only.add(shape_class)
        return result


def run(c: Call, lse: bool = True) -> tuple[Tensor, Tensor | None, None]:
    """``(out, lse, None)``; lse is None on the CPU, where FlexAttention has none."""
    lse = lse and c.q.device.type != "cpu"
    gated = c.key_score is not None and c.strength != 0
    out, own = _attend(c, gated, lse or not c.renormalize)
    if c.renormalize or not gated:
        return out, own if lse else None, None
    assert own is not None
    return unnormalised(c, out, own)


def unnormalised(c: Call, out: Tensor, own: Tensor) -> tuple[Tensor, Tensor, None]:
    """The gated sum over the un-gated one: a second pass, over as few features of v as there may be, has the latter."""
    _, plain = _attend(c._replace(v=c.v[..., :16]), False, True)
    assert plain is not None
    share = torch.where(own == -torch.inf, 0.0, torch.exp(own - plain))
    return out * share[..., None].to(out.dtype), plain, None


def _attend(c: Call, gated: bool, lse: bool) -> tuple[Tensor, Tensor | None]:
    query_score, key_score = (c.query_score, c.key_score) if gated else (None, None)
    masked = c.bounds is not None or c.dropped_keys is not None
    if c.q.shape[2] == 0 or c.k.shape[2] == 0 or c.q.shape[0] * c.q.shape[1] == 0:
        empty = c.q.new_zeros(*c.q.shape[:3], c.v.shape[3])
        return empty, torch.full(c.q.shape[:3], -torch.inf, device=c.q.device)
    lists = _block_lists(c) if masked else None
    args = (
        c.q,
        c.k,
        c.v,
        query_score,
        key_score,
        c.dropped_keys,
        c.bounds,
        lists,
        (repr(c.scale), repr(c.strength)),
        lse,
    )
    if torch.compiler.is_compiling():  # part of the caller's graph
        return _template(*args)
    kind = "" if key_score is None else "keys" if query_score is None else "pairwise"
    shape_class = ShapeClass(
        c.q.device, c.q.dtype, (c.q.shape[3], c.v.shape[3]), kind, c.bounds is not None,
        c.bounds is not None and c.bounds.shape[0] == 1, c.dropped_keys is not None, lse,
        torch.is_grad_enabled() and any(x.requires_grad for x in (c.q, c.k, c.v)), c.scale,
        c.strength if gated else 1.0, None,
    )  # fmt: skip
    try:
        return _call(shape_class, (*c.q.shape[:3], c.k.shape[2]), args)
    except torch._dynamo.exc.FailOnRecompileLimitHit as e:
        raise RuntimeError(
            f"FlexAttention was compiled anew too often for calls of one kind ({shape_class}), the last with q "
            f"{list(c.q.shape)} and k {list(c.k.shape)}; raise torch._dynamo.config.recompile_limit, or name another "
            "backend. It is not run eagerly, which would hold the whole map."
        ) from e
