"""Triton's interpreter with a matrix product that adds its terms one after another, as the instructions of a GPU do.

The interpreter's own product is numpy's. There the order of the terms depends on the processor and on which operand is
transposed, so that the logits of a backward pass could differ from those of its forward pass by roundings that no
device makes. It also reads bfloat16 as integers.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def sequential_products() -> None:
    """Replace the interpreter's product, for this process."""
    InterpreterBuilder.create_dot = _dot


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    left, right = _widened(a, d), _widened(b, d)
    total = np.zeros(d.data.shape, d.data.dtype)
    for i in range(left.shape[-1]):
        total += left[..., :, i : i + 1] * right[..., i : i + 1, :]
    return TensorHandle(total + d.data, d.dtype.scalar)


def _widened(x: TensorHandle, like: TensorHandle) -> np.ndarray:
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32).astype(like.data.dtype)
    return x.data.astype(like.data.dtype)
