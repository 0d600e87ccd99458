"""Tensors that are made once a device and kept, and when one may be kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


def kept(cache: MutableMapping[Key, Tensor], key: Key, make: Callable[[], Tensor]) -> Tensor:
    """``cache[key]``, made on the first call. What lives for one trace alone is made and not kept.

    Under a dispatch mode (fake tensors, export, tracing) a new tensor belongs to the trace; ``torch.compile`` replays
    what is kept. In inference mode it would be one that autograd refuses ever after: it is made outside of that mode.
    """
    if torch.compiler.is_dynamo_compiling():
        if key in cache:
            return cache[key]
        made = make()
        if not torch.is_inference_mode_enabled():
            cache[key] = made
        return made
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return make()
    if key not in cache:
        with torch.inference_mode(False):
            cache[key] = make()
    return cache[key]
