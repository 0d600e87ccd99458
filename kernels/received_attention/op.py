"""Schema and fake kernel; the C++ library registers the CPU kernel. Forward only."""

from __future__ import annotations

import torch

_NAMESPACE = "gate4d"

torch.library.define(
    f"{_NAMESPACE}::received_attention",
    "(Tensor q, Tensor k, Tensor lse, Tensor? query_score, Tensor? key_score, Tensor? bounds, "
    "float scale, float strength) -> (Tensor mean, Tensor m2)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake(f"{_NAMESPACE}::received_attention")
def _received_attention_fake(q, k, lse, query_score, key_score, bounds, scale, strength):
    mean = q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)
    return mean, torch.empty_like(mean)
