"""The public functions: shape checks, defaults and dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_gate, check_qkv, check_scale, check_visible, score_for
from .gates import MotionGate
from .kernels.attention.backends import explain as backend_reasons
from .kernels.attention.backends import select
from .kernels.attention.op import Call, Request, power_class
from .visibility import Visibility

ROW_STATS = ("entropy", "max_prob", "sum_sq")
_NO_GATE = MotionGate()
_SDPA = torch._C._nn.scaled_dot_product_attention


class AttentionAux(NamedTuple):
    """What attention can report beside its output; fields not asked for are None.

    ``p_ij`` is the weight that ``v_j`` received in ``out_i`` before the gate's output scale.

    Attributes:
        lse: ``log Z_i``, natural logarithm, fp32 ``[B, H, Nq]``; ``-inf`` where nothing is visible. Differentiable.
        entropy: ``-sum_j p_ij log p_ij`` in nats, fp32 ``[B, H, Nq]``. Not differentiable.
        max_prob: ``max_j p_ij``, fp32 ``[B, H, Nq]``. Not differentiable.
        sum_sq: ``sum_j p_ij ** 2``, fp32 ``[B, H, Nq]``. Not differentiable.
    """

    lse: Tensor
    entropy: Tensor | None = None
    max_prob: Tensor | None = None
    sum_sq: Tensor | None = None


@overload
def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, *, gate: MotionGate | None = ..., visible: Visibility | None = ...,
    scale: float | None = ..., row_stats: Sequence[str] = ..., return_aux: Literal[False] = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, *, gate: MotionGate | None = ..., visible: Visibility | None = ...,
    scale: float | None = ..., row_stats: Sequence[str] = ..., return_aux: Literal[True], backend: str = ...,
) -> tuple[Tensor, AttentionAux]: ...  # fmt: skip


@overload
def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, *, gate: MotionGate | None = ..., visible: Visibility | None = ...,
    scale: float | None = ..., row_stats: Sequence[str] = ..., return_aux: bool = ..., backend: str = ...,
) -> Tensor | tuple[Tensor, AttentionAux]: ...  # fmt: skip


def gated_attention(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    v: Tensor,  # [B, H, Nk, Dv]
    *,
    gate: MotionGate | None = None,
    visible: Visibility | None = None,
    scale: float | None = None,
    row_stats: Sequence[str] = (),
    return_aux: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AttentionAux]:
    """Attention with a motion gate on the fly, in memory linear in the number of tokens.

    ``out_i = c_i sum_j w_ij exp(s_ij) v_j / Z_i`` over the keys visible to query ``i``, with
    ``s_ij = scale * q_i . k_j`` and the gate's ``w_ij = (1 - a_i b_j) ** strength``. ``Z_i`` is
    ``sum_j w_ij exp(s_ij)``, or ``sum_j exp(s_ij)`` for a gate with ``renormalize=False``. Where nothing is
    visible, or every weight is 0, the output and all gradients are 0 and ``lse`` is ``-inf``.

    What no query sees (invisible or dropped keys) never matters, not even NaN or infinity, in output and gradients; on
    the CPU what a query does not see never matters to it. NaN that it sees makes its row NaN. Logits may have
    any size up to 1e38 and strengths any up to 100: results are finite wherever float64 and the output's dtype have
    them finite, and as accurate as fp32 logits allow (an absolute error of ``2 ** -24 |s|`` in each exponent).
    ``docs/reliability.md`` has all promises.

    Args:
        q, k, v: ``[B, H, Nq, D]``, ``[B, H, Nk, D]``, ``[B, H, Nk, Dv]``; one floating dtype and device; any
            strides (a last stride other than 1 costs a copy). Under autocast they are cast to its dtype.
        gate: None for plain attention.
        visible: None for full attention.
        scale: factor of the logits, finite in float32; ``D ** -0.5`` if None.
        row_stats: any of ``"entropy"``, ``"max_prob"``, ``"sum_sq"``; needs ``return_aux=True``.
        return_aux: also return :class:`AttentionAux`.
        backend: ``"auto"``, or the name of a backend, which then never falls back.

    Returns:
        ``out [B, H, Nq, Dv]`` in q's dtype, or ``(out, aux)``. Differentiable in q, k, v and the gate's scores,
        through ``out`` and ``aux.lse``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        NotImplementedError: the backend asked for cannot serve the call; lists every backend's reasons.
        RuntimeError: inside torch.distributed's ``context_parallel``, see :func:`refuse_context_parallel`.
    """
    g, request, call = _prepare(q, k, v, gate, visible, scale, row_stats, return_aux)
    out, lse, stats = select(backend, request).run(call)
    if g.output_scale is not None:
        out = out * g.output_scale[:, None, :, None].to(out.dtype)
    if not return_aux:
        return out
    chosen = {name: stats[i] for i, name in enumerate(ROW_STATS) if name in row_stats}
    return out, AttentionAux(lse, **chosen)


def explain(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    v: Tensor,  # [B, H, Nk, Dv]
    *,
    gate: MotionGate | None = None,
    visible: Visibility | None = None,
    row_stats: Sequence[str] = (),
    return_aux: bool = False,
) -> str:
    """Which backend would serve a call of :func:`gated_attention`, and why the others would not.

    Args:
        q, k, v, gate, visible, row_stats, return_aux: as of the call; nothing is computed.

    Returns:
        One line with the choice of ``backend="auto"``, then one line per backend: that it can run, or every reason
        why not.

    Raises:
        ValueError, TypeError: an argument does not fit, as in the call itself.
    """
    _, request, _ = _prepare(q, k, v, gate, visible, None, row_stats, return_aux)
    return f"auto takes {select('auto', request, trying=False).name}:\n{backend_reasons(request)}"


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, gate: MotionGate | None, visible: Visibility | None, scale: float | None,
    row_stats: Sequence[str], return_aux: bool,
) -> tuple[MotionGate, Request, Call]:  # fmt: skip
    """Everything checked and normalised: the gate, what an implementation must know, and what it is called with."""
    if F.scaled_dot_product_attention is not _SDPA:
        refuse_context_parallel()
    batch, queries, keys, head_dim, value_dim = check_qkv(q, k, v)
    device = q.device
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    dtype = q.dtype
    if not (dtype == k.dtype == v.dtype and dtype.is_floating_point):
        raise TypeError(f"q, k and v must share one floating dtype, got {dtype}, {k.dtype} and {v.dtype}.")
    scale = max(head_dim, 1) ** -0.5 if scale is None else check_scale(scale)
    if row_stats:
        _check_row_stats(row_stats, return_aux)
    g = _NO_GATE if gate is None else gate
    if gate is not None:
        check_gate(gate, (batch, queries), (batch, keys), device)
    bounds = None if visible is None else check_visible(visible, q, k)
    request = Request(
        device_type=device.type,
        dtype=dtype,
        head_dim=head_dim,
        value_dim=value_dim,
        gate="" if gate is None else _kind(g),
        masked=bounds is not None,
        aux=return_aux,
        renormalize=g.renormalize,
        learned=gate is not None and torch.is_grad_enabled() and _is_learned(g),
        device_index=device.index,
    )
    if device.type != "cpu" and not torch.compiler.is_compiling():
        request = request._replace(
            power=power_class(g.strength) if g.key_score is not None else 1.0,
            row_stats=bool(row_stats),
            grad=request.learned or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))),
        )
    call = Call(
        q=q,
        k=k,
        v=v,
        query_score=score_for(g.query_score, dtype),
        key_score=score_for(g.key_score, dtype),
        dropped_keys=g.dropped_keys,
        bounds=bounds,
        scale=scale,
        strength=g.strength,
        renormalize=g.renormalize,
        row_stats=bool(row_stats),
    )
    return g, request, call


def refuse_context_parallel() -> None:
    """RuntimeError while torch.distributed's context parallel is active.

    It splits q, k and v along the tokens and replaces ``F.scaled_dot_product_attention`` by one that exchanges keys
    between ranks. Attention beside it would see the keys of its own rank only.
    """
    module = getattr(F.scaled_dot_product_attention, "__module__", None) or ""
    if F.scaled_dot_product_attention is not _SDPA and module.startswith("torch.distributed."):
        raise RuntimeError(
            "torch.distributed's context_parallel is active: q, k and v are one rank's part of the tokens, and "
            "gate4d's attention does not exchange keys between ranks. Leave the context, or unpatch the model in it."
        )


def _is_learned(gate: MotionGate) -> bool:
    return any(x is not None and x.requires_grad for x in (gate.query_score, gate.key_score))


def _kind(gate: MotionGate) -> str:
    score = "" if gate.key_score is None else "keys" if gate.query_score is None else "pairwise"
    if gate.dropped_keys is None:
        return score
    return f"drop+{score}" if score else "drop"


def _check_row_stats(row_stats: Sequence[str], return_aux: bool) -> None:
    unknown = [s for s in row_stats if s not in ROW_STATS]
    if isinstance(row_stats, str) or unknown:
        raise ValueError(f"row_stats must be a sequence of names out of {list(ROW_STATS)}, got {row_stats!r}.")
    if not return_aux:
        raise ValueError("row_stats needs return_aux=True: the statistics are returned in aux.")
