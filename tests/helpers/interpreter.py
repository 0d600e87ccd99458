"""Triton's interpreter with a matrix product that adds its terms one after another, as the instructions of a GPU do.

The interpreter's own product is numpy's. There the order of the terms depends on the processor and on which operand is
transposed, so that the logits of a backward pass could differ from those of its forward pass by roundings that no
device makes. It also multiplies bfloat16 as integers, and cuts fp32 off to bfloat16 where a GPU rounds to the nearest.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def sequential_products() -> None:
    """Replace the interpreter's product, and its rounding to bfloat16, for this process."""
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.create_fp_trunc = _truncate


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


def _truncate(self, src: TensorHandle, dst_type):
    if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
        return self.cast_impl(src, dst_type)
    bits = src.data.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # half to even
    rounded = np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded)
    return TensorHandle(rounded, dst_type.scalar)


def checked_addresses() -> None:
    """From now on a load or store outside of the kernel's tensors is an error. What lies between the rows of a tensor
    counts as inside."""
    InterpreterBuilder.create_masked_load = _checked(InterpreterBuilder.create_masked_load, 1)
    InterpreterBuilder.create_masked_store = _checked(InterpreterBuilder.create_masked_store, 2)
    GridExecutor._init_args_hst = _noting_tensors(GridExecutor._init_args_hst)


_extents = np.zeros((0, 2), np.uint64)  # first and one past the last byte of every tensor of the running kernel


def _noting_tensors(prepare):
    def noting(self, args, kwargs):
        global _extents
        result = args, kwargs = prepare(self, args, kwargs)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.numel()]
        last = [sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) for x in tensors]
        ends = [x.data_ptr() + (n + 1) * x.element_size() for x, n in zip(tensors, last, strict=True)]
        _extents = np.array([[x.data_ptr(), end] for x, end in zip(tensors, ends, strict=True)], np.uint64)
        return result

    return noting


def _checked(access, mask_at: int):
    """``access(self, pointers, ...)`` after a look at the pointers; its argument ``mask_at`` is the mask."""

    def checked(self, pointers, *rest):
        mask = np.broadcast_to(rest[mask_at - 1].data, pointers.data.shape)
        at = pointers.data[mask].astype(np.uint64)
        size = np.uint64(max(8, pointers.get_element_ty().primitive_bitwidth) // 8)
        inside = np.zeros(at.shape, bool)
        for start, end in _extents:
            inside |= (at >= start) & (at + size <= end)
        if not inside.all():
            raise IndexError(f"{access.__name__}: {(~inside).sum()} of {at.size} addresses are outside of every tensor")
        return access(self, pointers, *rest)

    return checked
