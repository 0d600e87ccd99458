"""Cross moments: schema, implementations. Forward only; the C++ library registers the CPU kernel."""

from __future__ import annotations

import torch

from .._library import declare
from .._operands import same_device
from ..support import cpu_reasons, triton_reasons

torch.library.define(
    "gate4d::cross_moments",
    "(Tensor[] x, Tensor y, Tensor centre) -> (Tensor mean, Tensor m2)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("gate4d::cross_moments")
def _cross_moments_fake(x, y, centre):
    same_device(**{f"x[{i}]": part for i, part in enumerate(x)}, y=y, centre=centre)
    mean = y.new_empty((x[0].shape[0], x[0].shape[2]))
    return mean, torch.empty_like(mean)


declare("cross_moments")


@torch.library.impl("gate4d::cross_moments", "CUDA")
def _cross_moments_cuda(*args):
    from .triton import cross_moments  # Triton is imported by the first call that needs it

    return cross_moments(*args)


def kernel_reasons(device_type: str, dtype: torch.dtype, index: int | None = None) -> list[str]:
    """Why no kernel streams features of this kind, so that torch does; empty if one does."""
    if device_type == "cpu":  # features of any type are converted to fp32
        return cpu_reasons("cross_moments", device_type, torch.float32, 1)
    return triton_reasons(device_type, dtype, 1, index)
