"""Schema and fake kernel; the C++ library registers the CPU kernel. Forward only."""

from __future__ import annotations

import torch

_NAMESPACE = "gate4d"

torch.library.define(
    f"{_NAMESPACE}::cross_moments",
    "(Tensor[] x, Tensor y, Tensor centre) -> (Tensor mean, Tensor m2)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake(f"{_NAMESPACE}::cross_moments")
def _cross_moments_fake(x, y, centre):
    mean = y.new_empty((x[0].shape[0], x[0].shape[2]))
    return mean, torch.empty_like(mean)
