"""Modules that attend although nothing here knows how: recognised by what their code calls and what they project."""

from __future__ import annotations

import dis
import re
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType

from torch import nn

# Functions that compute attention, by the names that the libraries give them.
_ATTENTION = re.compile(
    r"scaled_dot_product_attention|memory_efficient_attention|flex_attention|flash_attn\w*_func|sageattn\w*"
    r"|varlen_attn"
)
_SOFTMAX = {"softmax", "log_softmax"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
# Parts of the names of projections: projq, q_proj, to_q, wq, query, in_proj_qkv, ...
_QUERIES = {"q", "wq", "qw", "projq", "qproj", "toq", "query", "queries", "qk", "qkv", "wqkv", "kv"}


def attends(module: nn.Module) -> str | None:
    """Why the module's own methods are attention, or None.

    What is read is the code of its class (up to torch's own base classes) and of the functions that it calls by name,
    two levels deep: it calls a known attention function, or it projects queries, takes a softmax and multiplies
    matrices.
    """
    names, product = _uses(type(module))
    called = sorted(n for n in names if _ATTENTION.fullmatch(n))
    if called:
        return f"it calls {called[0]}"
    softmax = _SOFTMAX & names or any(isinstance(m, nn.Softmax) for m in module.children())
    if not (softmax and product):
        return None
    query = next((n for n, m in _near(module) if hasattr(m, "weight") and _QUERIES & set(_words(n))), None)
    return None if query is None else f"its own code takes a softmax and multiplies matrices, beside {query}"


def _near(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Its children and theirs: a block may go around the forward of its attention."""
    yield from module.named_children()
    for name, child in module.named_children():
        yield from ((f"{name}.{n}", m) for n, m in child.named_children())


def _words(name: str) -> list[str]:
    return name.lower().rpartition(".")[2].split("_")


@lru_cache(maxsize=4096)
def _uses(cls: type) -> tuple[frozenset[str], bool]:
    """Names that the methods of a class use, and whether they multiply matrices."""
    names: set[str] = set()
    product = False
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins", "abc", "typing"):
            continue
        for name, function in vars(base).items():
            if isinstance(function, FunctionType) and name != "__init__":
                for code in _codes(function, 2, set()):
                    names.update(code.co_names)
                    product = product or any(
                        i.opname == "BINARY_MATRIX_MULTIPLY" or i.argrepr == "@" for i in dis.get_instructions(code)
                    )
    return frozenset(names), product or bool(_PRODUCTS & names)


def _codes(function: FunctionType, depth: int, seen: set[CodeType]) -> Iterator[CodeType]:
    """The code of a function, of the functions inside it and of those it calls by name in its module."""
    inside = [function.__code__]
    for code in inside:
        if code in seen:
            continue
        seen.add(code)
        yield code
        inside += [c for c in code.co_consts if isinstance(c, CodeType)]
        called = (function.__globals__.get(name) for name in code.co_names) if depth else ()
        for other in called:
            if isinstance(other, FunctionType) and not other.__module__.startswith("torch."):
                yield from _codes(other, depth - 1, seen)
