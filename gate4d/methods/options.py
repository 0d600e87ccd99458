"""Options of the methods as people write them: refused where they match nothing, never silently without effect."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

Layers = str | int | Collection[int] | None
Keep = Callable[[Any], Any] | str | Collection[str] | None

_RANGE = re.compile(r"(\d+)\s*(?:-|\.\.|to)\s*(\d+)")
_PYTHON = re.compile(r"range\(\s*(?:(\d+)\s*,\s*)?(\d+)\s*(?:,\s*(\d+)\s*)?\)")
_FORMS = "such as 3, '0-6' (both ends included), '0,2,4', 'range(7)', [0, 1] or 'all', None to gate none"


def layer_indices(name: str, value: Layers, there: Collection[int], *, auto: Collection[int] = ()) -> tuple[int, ...]:
    """Indices of layers, in order.

    Args:
        name: of the option, for errors.
        value: an index; a collection of them; a string: ``"0-6"`` (both ends included, counted from 0), ``"0,2,4-6"``,
            ``"range(7)"`` (as in Python: without its end), ``"all"``, ``"auto"``; None for no layer, on purpose.
        there: indices that the model has.
        auto: what ``"auto"`` stands for, as far as the model has it.

    Raises:
        ValueError: the value is none of these, names no layer, or one that the model lacks.
    """
    if value is None:
        return ()
    have = sorted(there)
    if isinstance(value, str):
        text = value.strip()
        if text in ("auto", "all"):
            chosen = [n for n in have if text == "all" or n in auto]
        else:
            chosen = [n for part in _parts(text) for n in _indices(name, value, part)]
    elif isinstance(value, int) and not isinstance(value, bool):
        chosen = [value]
    else:
        try:
            chosen = list(value)
        except TypeError:
            chosen = [None]
    if any(isinstance(n, bool) or not isinstance(n, int) for n in chosen):
        raise ValueError(f"{name} must be layers {_FORMS}, got {value!r}.")
    if not chosen:
        raise ValueError(f"{name} must name at least one layer {_FORMS}, got {value!r}: nothing would be gated.")
    lacking = sorted(set(chosen) - set(have))
    if lacking:
        raise ValueError(f"{name} must be layers that the model has, {_span(have)}, got {value!r}: no layer {lacking}.")
    return tuple(sorted(set(chosen)))


def keeper(keep: Keep) -> Callable[[Any], Any]:
    """A function from a frame's prediction to what a run keeps of it.

    Args:
        keep: None for the whole prediction; a function of it; or names of its entries: one, several with commas between
            them, or a collection. Then a dict of those alone is kept, without the memory that they share with others.

    Raises:
        TypeError: keep is something else. The function it returns raises ValueError for a name that a prediction lacks.
    """
    if keep is None:
        return lambda prediction: prediction
    if callable(keep):
        return keep
    names = _parts(keep) if isinstance(keep, str) else keep
    if not isinstance(names, Collection) or not names or not all(isinstance(n, str) for n in names):
        raise TypeError(f"keep must be None, a function of the prediction or names of its entries, got {keep!r}.")

    def chosen(prediction: Any) -> dict[str, Any]:
        found = prediction if isinstance(prediction, Mapping) else {}
        if missing := [n for n in names if n not in found]:
            raise ValueError(f"keep must name entries of the predictions, {sorted(found)}, got {missing}.")
        return {n: _alone(found[n]) for n in names}

    return chosen


def names_of(value: str | Collection[str]) -> tuple[str, ...]:
    """Names in a collection, or in a string with commas between them."""
    return tuple(_parts(value) if isinstance(value, str) else value)


def _alone(x: Any) -> Any:
    """A tensor that does not keep alive more memory than its own."""
    return x.clone() if isinstance(x, Tensor) and x.untyped_storage().nbytes() > x.nbytes else x


def _parts(text: str) -> list[str]:
    """Between commas, but for those inside parentheses; brackets around all of them do not count."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text.strip().strip("[]"))]


def _indices(name: str, value: str, part: str) -> Collection[int]:
    if part.isdecimal():
        return [int(part)]
    if found := _RANGE.fullmatch(part):
        first, last = (int(n) for n in found.groups())
        if first <= last < 10**6:
            return range(first, last + 1)
    if (found := _PYTHON.fullmatch(part)) and int(found[2]) < 10**6:
        return range(int(found[1] or 0), int(found[2]), int(found[3] or 1) or 1)
    raise ValueError(f"{name} must be layers {_FORMS}, got {value!r}.")


def _span(have: list[int]) -> str:
    if not have:
        return "of which there is none"
    return f"{have[0]} to {have[-1]}" if have == list(range(have[0], have[-1] + 1)) else str(have)
