"""Attention maps ``[B, H, Nq, Nk]`` that a model asks for: computed when they are read, or only their means."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .base import PatchedAttention
from .croco import mean_over_keys


def whole_map(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """``scale q_i . k_j + mask_ij``, ``[B, H, Nq, Nk]``, without a gradient, as upstream computes it."""
    logits = q.detach() @ k.detach().mT * scale
    return logits if mask is None else logits + mask


class DeferredMap(Tensor):
    """A map that is computed when it is first read; one that nobody reads costs no more than its q and k.

    Where a gradient or a graph is recorded, or autocast decides on the dtype, the map is a plain tensor at once.
    """

    _inputs: tuple | None
    _whole: Tensor | None

    @staticmethod
    def __new__(cls, q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if recorded or torch.is_autocast_enabled(q.device.type):
            return whole_map(q, k, scale, mask)
        deferred = Tensor._make_wrapper_subclass(cls, (*q.shape[:3], k.shape[2]), dtype=q.dtype, device=q.device)
        deferred._inputs, deferred._whole = (q, k, scale, mask), None
        return deferred

    @property
    def computed(self) -> bool:
        """Whether the map was read."""
        return self._whole is not None

    def whole(self) -> Tensor:
        """The map as a plain tensor."""
        if self._inputs is not None:
            self._whole, self._inputs = whole_map(*self._inputs), None
        return self._whole

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map_only(DeferredMap, DeferredMap.whole, (args, kwargs or {}))
        return func(*args, **kwargs)

    # What does not go through the dispatcher.

    def numpy(self, **kwargs: Any) -> Any:
        return self.whole().numpy(**kwargs)

    def tolist(self) -> list:
        return self.whole().tolist()

    def data_ptr(self) -> int:
        return self.whole().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.whole().untyped_storage()

    def __repr__(self, **kwargs: Any) -> str:
        return self.whole().__repr__(**kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.whole().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return copy.deepcopy(self.whole(), memo)


class Reader(Protocol):
    """Who knows what of the maps is read: see :class:`gate4d.integrations.readers.MapReaders`."""

    def map_of(self, attention: ReturnsMaps, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """What ``attention`` returns as its map."""


class ReturnsMaps(PatchedAttention):
    """An attention that returns its map when it is asked for.

    Attributes:
        reader: who decides between whole maps and their means; None: the whole map.
    """

    reader: Reader | None = None

    def map(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, H, Nq, Nk]``, or ``[B, H, Nq, 1]``, its mean over keys, where the reader says that this is enough."""
        return self.whole(q, k, mask) if self.reader is None else self.reader.map_of(self, q, k, mask)

    def whole(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        return DeferredMap(q, k, self.scale, mask)

    def mean(self, q: Tensor, k: Tensor) -> Tensor:
        return mean_over_keys(q, k, self.scale)
