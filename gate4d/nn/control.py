"""What can be set from outside on one attention, and the two ways to set it for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..functional import gated_attention
from ..gates import MotionGate
from ..visibility import Visibility
from .cache import FrameKVCache, Slot

Gate = MotionGate | Callable[[Tensor, Tensor], MotionGate | None] | None
Visible = Visibility | Callable[[Tensor, Tensor], Visibility | None] | None
Observer = Callable[[Tensor, Tensor, float], None]


class AttentionControl:
    """What can be set from outside on one attention: its gate, its visibility, who observes it.

    Attributes:
        gate: a :class:`MotionGate`, or a function of ``q [B, H, Nq, D]`` and ``k [B, H, Nk, D]`` that returns one (or
            None), or None.
        visible: a :class:`Visibility`, or a function of q and k that returns one (or None), or None for what the model
            itself asks for.
        cache: a :class:`FrameKVCache`, or a function that returns the one of the call at hand, or None. With it a call
            is one frame of a stream, and the cache holds what is visible: ``visible``, of the call or here, does not
            apply.
        observers: called as ``observer(q, k, scale)`` after norm and RoPE, before the attention. With a cache, ``k``
            holds the keys of the current frame.
        backend: passed to :func:`gate4d.gated_attention`.
        tokens: ``(Nq, Nk)`` of the last call, None before the first.
    """

    def __init__(self) -> None:
        self.gate: Gate = None
        self.visible: Visible = None
        self.cache: FrameKVCache | Callable[[], FrameKVCache] | None = None
        self.observers: list[Observer] = []
        self.backend = "auto"
        self.tokens: tuple[int, int] | None = None

    @property
    def is_set(self) -> bool:
        """Whether anything is set here that shows in what is computed or observed."""
        return bool(self.observers) or not (self.gate is None and self.visible is None and self.cache is None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
        """:meth:`attention` with the heads concatenated: ``[B, Nq, H * Dv]``."""
        return self.attention(q, k, v, **call).transpose(1, 2).flatten(2)

    def attention(
        self,
        q: Tensor,  # [B, H, Nq, D]
        k: Tensor,  # [B, H, Nk, D]
        v: Tensor,  # [B, H, Nk, Dv]
        *,
        scale: float | None = None,
        gate: Gate = None,
        visible: Visibility | None = None,
        cache: FrameKVCache | Slot | None = None,
    ) -> Tensor:
        """Attention of normed and rotated q and k: ``[B, H, Nq, Dv]``.

        ``gate`` and ``visible`` are what the model's own call asks for. With ``cache``, k and v are one frame that is
        appended to it, and q attends to everything the cache holds; a :class:`Slot` of a cache holds them already.

        Raises:
            ValueError: the call brings a gate or a visibility and another one is set here.
        """
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        for observe in self.observers:
            observe(q, k, scale)
        gate = _one("gate", gate, self.gate)
        if callable(gate):
            gate = gate(q, k)
        if self.cache is None:
            visible = _one("visible", visible, self.visible)
            if callable(visible):
                visible = visible(q, k)
        else:
            visible, cache = None, _one("cache", cache, self.cache)
            cache = cache() if callable(cache) else cache
        if cache is None:
            keys = k.shape[2]
            out = gated_attention(q, k, v, gate=gate, visible=visible, scale=scale, backend=self.backend)
        else:
            if visible is not None:
                raise ValueError("visible cannot be combined with a cache: the cache holds what is visible.")
            if isinstance(cache, Slot):
                cache = cache.commit()
            else:
                cache.append(k, v)
            keys = cache.num_tokens
            out = cache.attend(q, gate=gate, scale=scale, backend=self.backend)
        self.tokens = (q.shape[2], keys)
        return out


def _one(name: str, asked, controlled):
    if asked is not None and controlled is not None:
        raise ValueError(f"{name} is set on this attention, and the model's own call brings one: unset one of them.")
    return controlled if asked is None else asked


def control_of(module: nn.Module) -> AttentionControl | None:
    """Where gate, visibility and observers of an attention are set: of its patch, else its own; None if it has none."""
    own = module.__dict__.get("control")
    for found in (*(value for value in module.__dict__.values() if value is not own), own):
        if isinstance(found, AttentionControl):
            return found
    return None


@contextmanager
def observing(observers: Iterable[tuple[AttentionControl, Observer]]) -> Iterator[None]:
    """Within the context each observer watches its attention; afterwards none does, whatever happened."""
    added = []
    try:
        for control, observer in observers:
            control.observers.append(observer)
            added.append((control, observer))
        yield
    finally:
        for control, observer in added:
            if observer in control.observers:  # somebody may have cleared them
                control.observers.remove(observer)


@contextmanager
def gating(gates: Iterable[tuple[AttentionControl, Gate]]) -> Iterator[None]:
    """Within the context each gate is set on its attention; afterwards what was set before is again."""
    before = []
    try:
        for control, gate in gates:
            before.append((control, control.gate))
            control.gate = gate
        yield
    finally:
        for control, gate in reversed(before):
            control.gate = gate


@contextmanager
def standing_in(module: nn.Module, attribute: str, value: Any) -> Iterator[None]:
    """Within the context an attribute of this instance is ``value``; afterwards it is as it was, hidden again if it was
    the class's own."""
    missing = object()
    own = module.__dict__.get(attribute, missing)
    module.__dict__[attribute] = value
    try:
        yield
    finally:
        if own is missing:
            del module.__dict__[attribute]
        else:
            module.__dict__[attribute] = own
