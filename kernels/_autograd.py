"""What operators with a hand-written backward share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def first_derivative_only(
    name: str, grads: Sequence[Tensor | None], sources: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """``grads`` of a backward that has no derivative itself, tied to the tensors they depend on.

    Differentiating them again raises. ``once_differentiable`` alone ties them to nothing: a second derivative that is
    asked for together with other terms would silently be 0.
    """
    if not torch.is_grad_enabled():  # the usual backward, without create_graph
        return tuple(grads)
    given = [g for g in grads if g is not None]
    tied = iter(_Refuse.apply(name, len(given), *given, *(s for s in sources if s is not None)))
    return tuple(None if g is None else next(tied) for g in grads)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):
        raise RuntimeError(f"{ctx.name} has first derivatives only; its gradient cannot be differentiated again.")
