"""Cross moments: schema, implementations. Forward only; the C++ library registers the CPU kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._library import declare
from .._operands import same_device
from .._verify import Trial, accept, device_of
from ..support import cpu_reasons, passes, triton_reasons

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


class Request(NamedTuple):
    """What decides which code the Triton kernel is."""

    device_type: str
    dtype: torch.dtype
    device_index: int | None = None


def streams(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel streams features of this kind: it can, and one of a GPU computed a tiny problem right."""
    if kernel_reasons(device.type, dtype, device.index):
        return False
    return device.type == "cpu" or passes(TRIAL, Request(device.type, dtype, device.index), "torch")


def check(r: Request) -> None:
    """Two parts, tiles in full and in part, columns with an offset; the error budget of closed forms is 1e-5."""
    draw = torch.Generator().manual_seed(0)
    device = device_of(r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float32).to(device)

    parts = [normal(2, 150, h, 48).to(r.dtype).transpose(1, 2) for h in (2, 1)]
    y = normal(2, 300, 3 * 48) + 3
    centre = y.mean(1)
    rows = torch.cat([p.transpose(1, 2).flatten(2) for p in parts], 2)  # [B, Nx, F]

    def moments(x: Tensor, columns: Tensor, middle: Tensor) -> dict[str, Tensor]:
        z = x @ (columns - middle[:, None]).mT
        mean = z.mean(-1)
        return {"mean": mean + (x @ middle[..., None])[..., 0], "m2": (z - mean[..., None]).square().sum(-1)}

    got = dict(zip(("mean", "m2"), torch.ops.gate4d.cross_moments(parts, y, centre), strict=True))
    exact = moments(rows.double(), y.double(), centre.double())
    steps = 1e-5 / torch.finfo(torch.float32).eps

    def in_torch(order: int) -> dict[str, Tensor]:
        features = torch.randperm(rows.shape[2], generator=draw).to(device)
        return moments(rows.float()[..., features], y[..., features], centre[..., features])

    accept(in_torch, got, exact, dict.fromkeys(got, (0.0, steps)))


TRIAL = Trial("cross moments: triton", lambda r: str(r.dtype).removeprefix("torch."), check)
