"""``patch`` and what it returns, over the families of :mod:`.integrations` and the systems of :mod:`.methods`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Protocol

from torch import nn

from .functional import refuse_context_parallel
from .integrations.base import PATCHING, Options, PatchedAttention
from .integrations.maps import ReturnsMaps
from .integrations.table import PARTS, AttentionTable, inspect


class Method(Protocol):
    """What a patched model runs with.

    Created as ``factory(model, table, **options)`` after the modules were patched; it sets ``gate``, ``visible`` and
    ``observers`` of ``row.control`` for the rows of the table it needs; ValueError if the model lacks them.
    """

    def run(self, frames: Any) -> Any:
        """Run the whole method on a clip."""

    def close(self) -> None:
        """Undo what the method changed outside the patched modules; they are restored anyway."""


# Classes of :mod:`.methods`, which is imported when one is asked for.
METHODS = {"easi3r": "Easi3r", "more": "More", "mut3r": "Mut3r", "ttt3r": "Ttt3r", "vggt4d": "Vggt4d"}
_registered: dict[str, Callable[..., Method]] = {}


def register_method(name: str) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Decorator: makes a method of your own available as ``patch(model, method=name)``.

    It is called as ``factory(model, table, **options)``. An attribute ``takes`` of it, a tuple of names, lists those
    options of :func:`patch` (``window``, ``anchors``) that it has itself; the others go to the adapters.
    """

    def register(factory: Callable[..., Method]) -> Callable[..., Method]:
        _registered[name] = factory
        return factory

    return register


class Handle:
    """A patched model: ``remove()`` or leaving the ``with`` block restores it exactly.

    Attributes:
        model: the model.
        table: the :class:`AttentionTable` of its attention modules; ``row.control`` is where gates are set.
        method: the running method, or None.
    """

    def __init__(self, model: nn.Module, table: AttentionTable, replaced: list[tuple[nn.Module, str, Any]]):
        self.model = model
        self.table = table
        self._replaced = replaced  # (owner, attribute, what was put there)
        self.method: Method | None = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, failed: type[BaseException] | None, *exc_info: object) -> None:
        if failed is None:
            self._warn_of_idle_gates()
        self.remove()

    def _warn_of_idle_gates(self) -> None:
        # A block of which nothing was called did not run: only a part of the model did.
        ran = {row.name.rpartition(".")[0] for row in self.table.rows if row.tokens is not None}
        idle = [r.name for r in self.table.uncalled if r.control.is_set and r.name.rpartition(".")[0] in ran]
        if idle:
            warnings.warn(
                f"gate4d.patch: a gate, visibility, cache or observer on {', '.join(idle)} did nothing: the model ran "
                "and never called these modules, it goes around their forward.",
                stacklevel=3,
            )

    def remove(self) -> None:
        """Restore the model; does nothing the second time.

        Raises:
            RuntimeError: somebody replaced a patched method since; nothing is restored.
        """
        with PATCHING:
            lost = [(o, n) for o, n, new in self._replaced if o.__dict__.get(n) not in (new, None)]
            if lost:
                what = ", ".join(sorted({f"{n} of {type(o).__name__}" for o, n in lost}))
                raise RuntimeError(f"somebody replaced {what} after the patch: undo that first, nothing was restored.")
            _take_back(self._replaced)
        if self.method is not None:
            self.method, method = None, self.method
            method.close()

    def run(self, frames: Any) -> Any:
        """Run the method on a clip.

        Raises:
            RuntimeError: the model was patched without a method, or the patch was removed.
        """
        if self.method is None:
            raise RuntimeError(
                "run() needs a method: use patch(model, method=...); without one, call the model itself."
            )
        return self.method.run(frames)


def patch(model: nn.Module, method: str | None = None, **options: Any) -> Handle:
    """Replaces the attention of a model by gate4d's, on the instance, reversibly.

    Without a method the outputs stay the same (1e-4 relative in fp32), only time and memory change: no attention map is
    materialised, what upstream reduces from maps comes from closed forms, dense causal masks become intervals and
    growing caches become a :class:`gate4d.nn.FrameKVCache`. Parameters, state_dict, hooks and classes are not touched;
    ``copy.deepcopy``, ``pickle``, ``model.half()`` and ``torch.compile`` work on the patched model. Either all
    attention modules are replaced or none.

    Args:
        model: any model with attention modules of a known structure; see :func:`gate4d.inspect`.
        method: name of a registered method, or None.
        **options: ``window``, ``anchors`` (frames that StreamVGGT's cache keeps while it streams, see
            :class:`gate4d.nn.FrameKVCache`), or ``budget``, ``policy``, ``anchors``, ``specials`` (tokens it keeps, see
            :class:`gate4d.nn.TokenKVCache`); others, and those that the method has itself, go to the method.

    Raises:
        TypeError: an option is unknown.
        ValueError: the method is unknown, an option is out of range or has no effect on this model, or the model does
            not fit; the message lists what was found.
        RuntimeError: the model is patched already, or torch.distributed's context parallel is active.

    Warns:
        UserWarning: modules of an unknown kind attend, and stay as they are; the table lists them.
    """
    factory = None if method is None else _method(method)
    names = {f.name for f in fields(Options) if f.init} - set(getattr(factory, "takes", ()))
    own = Options(**{n: v for n, v in options.items() if n in names})
    rest = {n: v for n, v in options.items() if n not in names}
    if rest and factory is None:
        raise TypeError(f"unknown options {sorted(rest)}; without a method there are {sorted(names)}.")
    with PATCHING:
        return _install(model, own, factory, rest)


def _install(model: nn.Module, own: Options, factory: Callable[..., Method] | None, rest: dict[str, Any]) -> Handle:
    refuse_context_parallel()
    table = inspect(model)
    if _patched(model):
        raise RuntimeError("the model is patched already: use handle.remove() or gate4d.unpatch(model) first.")
    if table.problems or not table.rows:
        what = "it has no attention that is known" if not table.rows and not table.problems else "it does not fit"
        raise ValueError(f"model cannot be patched: {what}. Found:\n{table}")
    bounded = own.window is not None or own.budget is not None
    if bounded and not any(row.adapter.windowed(row.module) for row in table.rows):
        raise ValueError(
            "window and budget need a model with a key/value cache that they bound (StreamVGGT's attention with "
            f"positions), found {list(table.families)}; STream3R's session has a window of its own, mode='window'."
        )
    new = [(row.module, row.adapter.attribute, row.adapter(row.module, row.traits, own)) for row in table.rows]
    for _, _, replacement in new:
        if isinstance(replacement, ReturnsMaps):
            replacement.reader = table.reader
    new += [(owner, part.attribute, part(owner)) for owner, part in table.parts]
    try:
        for owner, attribute, replacement in new:
            owner.__dict__[attribute] = replacement
        handle = Handle(model, table, new)
        if factory is not None:
            handle.method = factory(model, table, **rest)
    except BaseException:
        _take_back(new)
        raise
    if table.unpatched:
        warnings.warn(
            f"gate4d.patch: {len(table.unpatched)} modules attend in a way that is not known and stay as they are, no "
            f"gate reaches them: {'; '.join(table.unpatched[:4])}{'; ...' if len(table.unpatched) > 4 else ''}. "
            "The outputs do not change; print(handle.table) lists all of them.",
            stacklevel=3,
        )
    return handle


def unpatch(model: nn.Module) -> None:
    """Restores a patched model, also one that was copied or unpickled and so has no handle."""
    with PATCHING:
        for owner, name in _patched(model):
            owner.__dict__.pop(name, None)


def _take_back(replaced: list[tuple[nn.Module, str, Any]]) -> None:
    for owner, name, new in replaced:
        if owner.__dict__.get(name) is new:
            del owner.__dict__[name]


def _patched(model: nn.Module) -> list[tuple[nn.Module, str]]:
    kinds = (PatchedAttention, *PARTS)
    return [(m, name) for m in model.modules() for name, value in m.__dict__.items() if isinstance(value, kinds)]


def _method(name: str) -> Callable[..., Method]:
    if name in _registered:
        return _registered[name]
    if name not in METHODS:
        raise ValueError(f"method must be one of {sorted({*METHODS, *_registered})} or None, got {name!r}.")
    from . import methods

    return getattr(methods, METHODS[name])
