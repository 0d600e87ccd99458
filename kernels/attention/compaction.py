"""Dropped keys as a gather: the kept keys first, in their order, so that a kernel visits only those.

Nothing here reads a value on the host: the number of kept keys stays on the device, and a CUDA graph can record it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """Kept keys in their order, then the dropped ones.

    Attributes:
        order: int64 ``[B, Nk]``, a permutation of the keys.
        number: int32 ``[B]``, number of kept keys.
        before: int64 ``[B, Nk + 1]``, number of kept keys before each key.
    """

    order: Tensor
    number: Tensor
    before: Tensor

    @classmethod
    def of(cls, dropped_keys: Tensor) -> Kept:
        """From the bool mask ``dropped_keys [B, Nk]``."""
        before = torch.nn.functional.pad((~dropped_keys).cumsum(1), (1, 0))
        count = before[:, -1:]
        key = torch.arange(dropped_keys.shape[1], device=dropped_keys.device)
        position = torch.where(dropped_keys, count + key - before[:, :-1], before[:, :-1])
        order = torch.empty_like(position).scatter_(1, position, key.expand_as(position))
        return cls(order, count.squeeze(1).to(torch.int32), before)

    def gather(self, x: Tensor) -> Tensor:
        """Reorder the keys of ``x [B, H, Nk, D]`` or ``[B, Nk]``."""
        if x.dim() == 2:
            return x.gather(1, self.order)
        return x.gather(2, self.order[:, None, :, None].expand_as(x))

    def bounds(self, bounds: Tensor) -> Tensor:
        """Bounds (start, end, sink_end) ``[1 or B, 3, Nq]`` as positions among the kept keys, ``[B, 3, Nq]``."""
        batch, num_keys = self.order.shape
        index = bounds.clamp(max=num_keys).to(torch.int64).expand(batch, -1, -1)
        return self.before.gather(1, index.flatten(1)).view_as(index).to(torch.int32)
