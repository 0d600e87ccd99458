"""Attention received: schema, implementations. Forward only; the C++ library registers the CPU kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._library import declare
from .._operands import same_device
from ..support import Backend, cpu_reasons, triton_reasons
from . import trial
from .reference import received_attention

torch.library.define(
    "gate4d::received_attention",
    "(Tensor q, Tensor k, Tensor lse, Tensor? query_score, Tensor? key_score, Tensor? bounds, "
    "float scale, float strength) -> (Tensor mean, Tensor m2)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("gate4d::received_attention")
def _received_attention_fake(q, k, lse, query_score, key_score, bounds, scale, strength):
    same_device(q=q, k=k, lse=lse, query_score=query_score, key_score=key_score, bounds=bounds)
    mean = q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)
    return mean, torch.empty_like(mean)


declare("received_attention")


@torch.library.impl("gate4d::received_attention", "CUDA")
def _received_attention_cuda(*args):
    from .triton import received_attention  # Triton is imported by the first call that needs it

    return received_attention(*args)


class Request(NamedTuple):
    """What an implementation must know to say whether it can serve a call."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    queries: bool  # whether there is any; a kernel has no mean over none
    device_index: int | None = None  # of the CUDA device of the tensors, which need not be the current one
    # What else decides which code a GPU kernel is.
    gate: str = ""  # "pairwise", "keys" or none
    strength: float = 1.0
    masked: bool = False


def _kernel_reasons(r: Request) -> list[str]:
    return [] if r.queries else ["there are no queries"]


def _run_operator(*args) -> tuple[Tensor, Tensor]:
    return torch.ops.gate4d.received_attention(*args)


# ``run(q, k, lse, query_score, key_score, bounds, scale, strength)`` gives mean and m2 ``[B, H, Nk]`` over queries.
BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend(
            "cpu",
            lambda r: [*cpu_reasons("received_attention", r.device_type, r.dtype, r.head_dim), *_kernel_reasons(r)],
            _run_operator,
        ),
        Backend(
            "triton",
            lambda r: [*triton_reasons(r.device_type, r.dtype, r.head_dim, r.device_index), *_kernel_reasons(r)],
            _run_operator,
            trial.TRIAL,
        ),
        Backend("reference", lambda r: [], received_attention),
    )
}
AUTO_ORDER = ("cpu", "triton")
