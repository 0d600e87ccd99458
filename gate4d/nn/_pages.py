"""Memory of a frame cache: pages of slots, one frame a slot, allocated once and never moved."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a frame lies."""

    page: int
    slot: int


class Pages:
    """Pages of K and V. The frames of a page have one number of tokens; a free slot is the first one past those used.

    Attributes:
        tensors: of each page, ``k [B, H, slots * P, D]`` and ``v [B, H, slots * P, Dv]``.
        sizes: P of each page.
        ids: of each page, the frame id in each used slot.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """No page any more."""
        self.tensors: list[tuple[Tensor, Tensor]] = []
        self.sizes: list[int] = []
        self.ids: list[list[int]] = []

    @property
    def num_frames(self) -> int:
        return sum(map(len, self.ids))

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) * size for ids, size in zip(self.ids, self.sizes, strict=True))

    @property
    def frame_ids(self) -> tuple[int, ...]:
        """In storage order."""
        return tuple(i for ids in self.ids for i in ids)

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for page in self.tensors for x in page)

    def used(self) -> list[tuple[Tensor, Tensor]]:
        """The used part of each page, views."""
        counts = [len(ids) * size for ids, size in zip(self.ids, self.sizes, strict=True)]
        return [(k.narrow(2, 0, n), v.narrow(2, 0, n)) for (k, v), n in zip(self.tensors, counts, strict=True)]

    def find(self, frame: int) -> Place:
        """Where the frame of this id lies."""
        return next(Place(page, ids.index(frame)) for page, ids in enumerate(self.ids) if frame in ids)

    def view(self, place: Place) -> tuple[Tensor, Tensor]:
        """The memory of one slot: ``k [B, H, P, D]`` and ``v [B, H, P, Dv]``."""
        size = self.sizes[place.page]
        k, v = self.tensors[place.page]
        return k.narrow(2, place.slot * size, size), v.narrow(2, place.slot * size, size)

    def room(self, tokens: int) -> int | None:
        """A page of frames of this size with a free slot."""
        for page, ((k, _), size, ids) in enumerate(zip(self.tensors, self.sizes, self.ids, strict=True)):
            if size == tokens and len(ids) * size < k.shape[2]:
                return page
        return None

    def allocate(self, k: Tensor, v: Tensor, frames: int, dtype: torch.dtype) -> int:
        """A new page of ``frames`` slots for frames like k and v."""
        tokens = k.shape[2]
        new = [torch.empty((*x.shape[:2], frames * tokens, x.shape[3]), dtype=dtype, device=k.device) for x in (k, v)]
        return self.adopt(new[0], new[1], tokens, [])

    def adopt(self, k: Tensor, v: Tensor, tokens: int, ids: list[int]) -> int:
        """Tensors of somebody else as a page whose first slots hold the frames ``ids``."""
        self.tensors.append((k, v))
        self.sizes.append(tokens)
        self.ids.append(ids)
        return len(self.tensors) - 1

    def release(self, place: Place) -> None:
        """Free a slot for good: the page's last frame moves into it, and a page without frames goes."""
        page, slot = place
        ids, size = self.ids[page], self.sizes[page]
        last = len(ids) - 1
        for x in self.tensors[page]:
            x[:, :, slot * size : (slot + 1) * size] = x[:, :, last * size : (last + 1) * size].clone()
        ids[slot] = ids[last]
        ids.pop()
        if not ids:
            for held in (self.tensors, self.sizes, self.ids):
                del held[page]
