"""Direct calls of the operators with arguments that do not fit, for a process of their own.

Prints the name of each call before it is made and ``refused`` or ``accepted`` after it: the last line of a process that
dies names the call that killed it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import gate4d  # noqa: F401  (registers the operators)

B, H, NQ, NK, D, DV = 2, 3, 70, 130, 16, 24
OPS = torch.ops.gate4d


def good() -> dict[str, dict[str, Any]]:
    """Arguments that fit, by operator and name."""
    q, k, v = torch.randn(B, H, NQ, D), torch.randn(B, H, NK, D), torch.randn(B, H, NK, DV)
    a, b, drop = torch.rand(B, NQ), torch.rand(B, NK), torch.rand(B, NK) < 0.3
    start = torch.randint(0, NK, (1, NQ))
    bounds = torch.stack((start, start + 1, torch.full_like(start, 5)), 1).to(torch.int32)
    gate = {"query_score": a, "key_score": b, "dropped_keys": drop, "bounds": bounds}
    settings = {"scale": 0.25, "strength": 1.5, "renormalize": True}
    forward = {"q": q, "k": k, "v": v, **gate, **settings, "row_stats": True}
    out, lse, _ = OPS.attention_forward(*forward.values())
    backward = {
        "grad_out": torch.randn_like(out), "grad_lse": torch.randn_like(lse), "q": q, "k": k, "v": v, "out": out,
        "lse": lse, **gate, **settings, "score_grads": True,
    }  # fmt: skip
    OPS.attention_backward(*backward.values())
    received = {
        "q": q,
        "k": k,
        "lse": lse,
        "query_score": a,
        "key_score": b,
        "bounds": bounds,
        "scale": 0.25,
        "strength": 1.5,
    }
    OPS.received_attention(*received.values())
    x = torch.randn(B, H, NQ, D)
    cross = {"x": [x, x[:, :1]], "y": torch.randn(B, NK, 4 * D), "centre": torch.randn(B, 4 * D)}
    OPS.cross_moments(*cross.values())
    return {
        "attention_forward": forward, "attention_backward": backward, "received_attention": received,
        "cross_moments": cross,
    }  # fmt: skip


def other_tensors(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What is not x: another rank, size, dtype, device or layout, no memory."""
    yield "a rank lower", x[0]
    yield "a rank higher", x[None]
    yield "a scalar", x.flatten()[0]
    yield "empty", x.new_empty(0)
    for d in range(x.dim()):
        for name, n in (("shorter", x.shape[d] - 1), ("none", 0), ("longer", x.shape[d] + 1), ("one", 1)):
            # One layer of bounds serves any batch, and a head of x may have any size as long as the features fit.
            if n != x.shape[d]:
                index = torch.arange(n).clamp(max=max(x.shape[d] - 1, 0))
                yield f"{name} along {d}", x.index_select(d, index)
    yield "transposed", x.mT if x.dim() > 1 else x[None]
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8,
                  torch.bool, torch.complex64):  # fmt: skip
        if dtype != x.dtype:
            yield f"in {dtype}", x.to(dtype)
    yield "on meta", x.to("meta")
    yield "sparse", x.to_sparse()
    lost = x.clone()
    lost.untyped_storage().resize_(0)
    yield "without memory", lost


def calls() -> Iterator[tuple[str, str, list[Any]]]:
    """``(name, operator, arguments)``, none of which fits."""
    for operator, arguments in good().items():
        for name, value in arguments.items():

            def with_value(other: Any, arguments=arguments, name=name) -> list[Any]:
                return list({**arguments, name: other}.values())

            if isinstance(value, Tensor):
                for what, other in other_tensors(value):
                    if (operator, name, what) not in HARMLESS:
                        yield f"{operator}: {name} {what}", operator, with_value(other)
            if name in ("scale", "strength"):
                for bad in (float("nan"), float("inf"), -float("inf"), 1e39, -1e300) + (
                    (-1.0,) if name == "strength" else ()
                ):
                    yield f"{operator}: {name} {bad}", operator, with_value(bad)
            if name in ("query_score", "key_score"):
                for bad in (-0.01, 1.01, float("nan"), float("inf")):
                    other = value.clone()
                    other[1, -1] = bad
                    yield f"{operator}: {name} with {bad}", operator, with_value(other)
            if name == "bounds":
                for row, bad in (
                    (0, -1),
                    (1, -1),
                    (2, -1),
                    (1, NK + 1),
                    (2, NK + 1),
                    (1, 10**7),
                    (2, 2**31 - 1),
                    (0, -(2**31)),
                ):
                    for query in (0, NQ - 1):
                        other = value.clone()
                        other[0, row, query] = bad
                        yield f"{operator}: bounds row {row} with {bad} at {query}", operator, with_value(other)
                yield f"{operator}: bounds of 3 batch items", operator, with_value(value.expand(3, -1, -1))
    yield from pairs()


def pairs() -> Iterator[tuple[str, str, list[Any]]]:
    """Several arguments that agree with each other and still do not fit."""
    every = good()
    f = every["attention_forward"]
    many = torch.zeros(1, 1, 1, 4)
    for n in (2**31 - 1, 2**31, 2**32 + 7):
        keys = many.expand(1, 1, n, 4)
        yield f"{n} keys", "attention_forward", [many, keys, keys, None, None, None, None, 1.0, 1.0, True, False]
        yield f"{n} keys received", "received_attention", [many, keys, torch.zeros(1, 1, 1), None, None, None, 1.0, 1.0]
        yield f"{n} rows", "cross_moments", [[many], many[0, 0].expand(1, n, 4), torch.zeros(1, 4)]
    wide = torch.zeros(1, 1, 1, 1).expand(1, 1, 1, 2**20)
    yield "a wide head", "attention_forward", [wide, wide, many, None, None, None, None, 1.0, 1.0, True, False]
    yield "wide values", "attention_forward", [many, many, wide, None, None, None, None, 1.0, 1.0, True, False]
    yield "a wide row", "cross_moments", [[torch.zeros(1).expand(1, 2**13, 1, 2**13)], wide[0, 0], wide[0, 0]]
    for dtype in (torch.float64, torch.int32, torch.complex64):
        x = {**f, **{n: f[n].to(dtype) for n in "qkv"}}
        yield f"all in {dtype}", "attention_forward", list(x.values())
    no_queries = {n: (x[:, :, :0] if n in ("q", "lse") else x) for n, x in every["received_attention"].items()}
    no_queries["query_score"], no_queries["bounds"] = no_queries["query_score"][:, :0], no_queries["bounds"][..., :0]
    yield "no queries received", "received_attention", list(no_queries.values())
    c = every["cross_moments"]
    yield "no parts", "cross_moments", [[], c["y"], c["centre"]]
    for what, other in other_tensors(c["x"][1]):
        if what not in ("empty",):
            yield f"cross_moments: a part {what}", "cross_moments", [[c["x"][0], other], c["y"], c["centre"]]
            yield f"cross_moments: the first part {what}", "cross_moments", [[other, c["x"][1]], c["y"], c["centre"]]


# Changes that no other argument contradicts.
HARMLESS = {
    *((operator, "bounds", "longer along 0") for operator in good()),
    *(("attention_forward", "v", f"{n} along 3") for n in ("shorter", "none", "longer", "one")),
    *(("cross_moments", "y", f"{n} along 1") for n in ("shorter", "longer", "one")),
}


def main() -> None:
    torch.manual_seed(0)
    for name, operator, arguments in calls():
        print(name, end=": ", flush=True)
        try:
            getattr(OPS, operator)(*arguments)
        except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as e:
            text = str(e)
            ours = text.startswith("gate4d: ") or "gate4d::" in text
            print("refused" if ours else f"refused by others: {text.splitlines()[0][:100]}", flush=True)
        else:
            print("accepted", flush=True)


if __name__ == "__main__":
    main()
