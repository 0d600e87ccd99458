"""What operators with a hand-written backward share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def first_derivative_only(
    name: str, grads: Sequence[Tensor | None], sources: Sequence[Tensor | None], instead: str = ""
) -> tuple[Tensor | None, ...]:
    """``grads`` of a backward that has no derivative itself, tied to the tensors they depend on.

    Differentiating them again raises. ``once_differentiable`` alone ties them to nothing: a second derivative that is
    asked for together with other terms would silently be 0, as would any inside ``torch.func``.

    Args:
        sources: everything the gradients depend on, the incoming gradient included.
        instead: sentence for the error: who has second derivatives.
    """
    if not torch.is_grad_enabled():  # the usual backward, without create_graph
        return tuple(grads)
    given = [g for g in grads if g is not None]
    message = f"{name} has first derivatives only; its gradient cannot be differentiated again. {instead}".rstrip()
    tied = iter(_Refuse.apply(message, len(given), *given, *(s for s in sources if s is not None)))
    return tuple(None if g is None else next(tied) for g in grads)


class _Refuse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):
        raise NotImplementedError(ctx.message)
