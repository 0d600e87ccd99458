"""Mean and variance over tokens of inner products that are themselves means over layers, heads and frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.cross_moments.op import streams
from ..moments import Moments

_TILE = (512, 4096)  # rows and columns of the streamed product: 8 MiB in fp32
# The covariance form works in float64 (its quadratic form cancels): its operations cost this many of the streamed
# product's, by torch.mm or by a kernel. Measured on a CPU; on a GPU the peak rates of its data sheet would say 1 for
# fp32 and 7 for 16-bit features, and nothing was measured there.
_COVARIANCE_COST = {"torch": 2.0, "kernel": 5.0}


@torch.no_grad()
def cross_moments(
    x: Tensor | Sequence[Tensor],  # [B, H, Nx, D], or one a layer
    y: Tensor | Sequence[Tensor],  # [B, H, Ny, D] or [B, F, H, Ny, D], or one a layer
    *,
    scale: float = 1.0,
    method: str = "auto",
) -> Moments:
    """Moments over tokens ``j`` of ``z_ij = scale * mean_{layer, head, frame} x_i . y_j`` for every token ``i`` of x.

    The inner mean is linear, so frames of y are averaged first and layers and heads are one long feature of ``F``
    entries. Then either the ``Nx x Ny`` product is streamed tile by tile, keeping a mean and a sum of squares a row
    (by a compiled kernel for fp32 on the CPU, by a Triton kernel for fp32, bf16 and fp16 on CUDA, which has not run on
    a GPU yet), or the sum of squares is ``x_i^T C x_i`` with the ``F x F`` scatter matrix of y.
    VGGT4D's "V" maps are the standard deviation of the result.

    Args:
        x: features ``[B, H, Nx, D]``, or a sequence over layers.
        y: features ``[B, H, Ny, D]``, or ``[B, F, H, Ny, D]`` to average over frames; as many layers as x.
        scale: factor of the products; 1 for raw dot products.
        method: ``"stream"``, ``"covariance"``, or ``"auto"`` for the cheaper one: the covariance form wins when
            ``Nx Ny > c (Nx + Ny) F``, ``c = 5`` where a kernel streams and 2 where torch does.

    Returns:
        :class:`Moments` ``[B, Nx]`` with count ``Ny``, at least fp32. Not differentiable. Beyond the concatenated
        features of y (and of x, unless the compiled kernel reads it in place) it holds one tile of 8 MiB, a block of
        2 MiB a thread, or one ``F x F`` matrix.

    Raises:
        ValueError, TypeError: a shape, dtype or the method does not fit; the message names it.
    """
    if method not in ("auto", "stream", "covariance"):
        raise ValueError(f"method must be 'auto', 'stream' or 'covariance', got {method!r}.")
    xs, ys = _layers(x, "x"), _layers(y, "y")
    if len(xs) != len(ys):
        raise ValueError(f"y must have as many layers as x ({len(xs)}), got {len(ys)}.")
    for a, b in zip(xs, ys, strict=True):
        if a.dim() != 4 or b.dim() not in (4, 5):
            raise ValueError(
                "x must be [B, H, Nx, D] and y [B, H, Ny, D] or [B, F, H, Ny, D], "
                f"got {list(a.shape)} and {list(b.shape)}."
            )
        if (*a.shape[:2], a.shape[3]) != (b.shape[0], b.shape[-3], b.shape[-1]) or a.dtype != b.dtype:
            raise ValueError(
                f"y must have x's B, H, D and dtype ({list(a.shape)}, {a.dtype}), got {list(b.shape)}, {b.dtype}."
            )
        if a.shape[:3] != xs[0].shape[:3] or b.shape[-2] != ys[0].shape[-2]:
            raise ValueError(f"layers must agree in B, H and tokens, got {list(a.shape)} after {list(xs[0].shape)}.")
    groups = sum(a.shape[1] for a in xs)
    work = torch.promote_types(xs[0].dtype, torch.float32)
    columns = tokens_first([b.mean(1, dtype=work) if b.dim() == 5 else b for b in ys], work)
    moments = feature_moments(xs, columns, method)
    factor = scale / groups
    return Moments(moments.count, factor * moments.mean, factor**2 * moments.m2)


def tokens_first(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:  # [B, H, N, D] each -> [B, N, F]
    """Parts and their heads concatenated into one feature, as the streamed product wants it; always a copy."""
    (batch, _, tokens, _), sizes = parts[0].shape, [x.shape[1] * x.shape[3] for x in parts]
    out = parts[0].new_empty(batch, tokens, sum(sizes), dtype=dtype)
    for x, to in zip(parts, out.split(sizes, dim=2), strict=True):
        to.unflatten(2, (x.shape[1], x.shape[3])).copy_(x.transpose(1, 2))
    return out


def feature_moments(parts: Sequence[Tensor], y: Tensor, method: str = "auto") -> Moments:
    """Moments ``[B, Nx]`` over the tokens of y of the plain products ``x_i . y_j``. **May centre y in place.**

    Args:
        parts: ``[B, H, Nx, D]`` each; x has their features and those of their heads one after another.
        y: ``[B, Ny, F]``, at least fp32: the dtype of the result.
        method: as of :func:`cross_moments`.
    """
    num_rows, num_columns, features = parts[0].shape[2], y.shape[1], y.shape[2]
    if num_columns == 0:
        return Moments.empty((y.shape[0], num_rows), y.dtype, y.device)
    kernel = y.dtype == torch.float32 and streams(y.device, parts[0].dtype)
    if method == "auto":
        covariance = _COVARIANCE_COST["kernel" if kernel else "torch"] * features * (num_rows + num_columns)
        method = "covariance" if covariance < num_rows * num_columns else "stream"
    centre = y.mean(1, keepdim=True)  # a large common offset would drown the deviations
    if method == "stream" and kernel and features:  # a kernel that adds up no features would write nothing
        if y.device.type == "cpu":
            parts = [x.float() for x in parts]
        return Moments(num_columns, *torch.ops.gate4d.cross_moments(list(parts), y, centre[:, 0]))
    x = tokens_first(parts, y.dtype)
    y -= centre
    mean = (x @ centre.mT).squeeze(-1)
    if method == "covariance":
        wide = y.double()
        matrix = wide.mT @ wide
        m2 = torch.cat([((r @ matrix) * r).sum(-1) for r in (c.double() for c in x.split(4096, dim=1))], dim=1)
        return Moments(num_columns, mean, m2.clamp_min(0).to(x.dtype))
    m2 = torch.zeros_like(mean)
    rows, columns = (min(a, b) for a, b in zip(_TILE, (num_rows, num_columns), strict=True))
    tile = x.new_empty(rows * columns)
    for b in range(x.shape[0]):
        for x_rows, out in zip(x[b].split(rows), m2[b].split(rows), strict=True):
            for y_rows in y[b].split(columns):
                product = tile[: len(x_rows) * len(y_rows)].view(len(x_rows), len(y_rows))
                torch.mm(x_rows, y_rows.T, out=product)
                out += torch.linalg.vector_norm(product, dim=1).square_()
    return Moments(num_columns, mean, m2)


def _layers(x: Tensor | Sequence[Tensor], name: str) -> list[Tensor]:
    layers = [x] if isinstance(x, Tensor) else list(x)
    if not layers or not all(isinstance(a, Tensor) and a.is_floating_point() for a in layers):
        raise TypeError(f"{name} must be a floating tensor or a non-empty sequence of them, one a layer.")
    return layers
