"""Peak memory counted from shapes: a forward pass on tensors without data, every allocation and release followed.

The count is what the tensors of the pass need at its worst moment, model and inputs left out. The resident set adds
what an allocator keeps back and what kernels take for themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import backbones

STREAM_FRAMES = {"streaming": 16}  # the larger of the two sizes at which a stream is counted; 8 for the others


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations inside the mode made and that still live: ``live``, and ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def counted(make: Callable[[], Callable[[int], Iterable[Tensor]]], frames: int) -> int:
    """Peak bytes of ``make()(frames)`` beyond what ``make`` allocates, nothing computed."""
    with FakeTensorMode(), torch.inference_mode():
        run = make()
        with LiveBytes() as memory:
            parts = list(run(frames))
            peak = memory.peak
        del parts
    return peak


def memory_model(backbone: str, **case) -> Callable[[int], int]:
    """Peak bytes of a backbone of :mod:`.backbones` as a function of frames; ``case`` as for its setup.

    A clip is counted at its true size. A stream, whose memory grows by the same bytes with every frame, is counted at
    two sizes and continued in a straight line (a cache of pages: within a page).
    """

    def at(n: int) -> int:
        return counted(lambda: backbones.setup(backbone, **{**case, "frames": n}), n)

    if backbone == "alternating":
        return at
    more = STREAM_FRAMES.get(backbone, 8)
    fewer = more // 2
    low, high = at(fewer), at(more)
    return lambda n: high + (high - low) * (n - more) // (more - fewer)
