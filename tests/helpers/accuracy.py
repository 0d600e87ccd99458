"""How close is close enough: tolerances come from data, never from a hand.

The error of a result to the float64 reference may be at most twice the error of an equally low-precision torch
computation, plus one rounding step of the reference's magnitude. Finiteness is asserted first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SLACK = 2.0


def assert_accurate(
    name: str,
    got: Tensor,
    exact: Tensor,
    *baselines: Tensor,
    dtype: torch.dtype | None = None,
    magnitude: float = 0.0,
    degree: int = 1,
) -> None:
    """Assert that ``got`` is as close to ``exact`` (float64) as the torch computations ``baselines`` let expect.

    Infinities must sit where ``exact`` has them, with the same sign; everything else must be finite. The error is
    bounded in the largest entry and, so that many small errors cannot hide below one large entry, in the mean square.

    Args:
        baselines: one or more torch computations at the precision of ``got``; the worst of them counts.
        dtype: precision whose rounding step is granted once; that of ``got`` if None.
        magnitude: of what is rounded, where that is more than the result: 1 for a logarithm, which moves by a whole
            step when its argument is rounded, however close to 0 it is.
        degree: of the result in what is rounded: 2 for a square, which moves by two steps.
    """
    assert exact.dtype == torch.float64, f"{name}: the reference must be float64, got {exact.dtype}"
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)} instead of {list(exact.shape)}"
    step = degree * torch.finfo(dtype or got.dtype).eps
    finite = exact.isfinite()
    for who, x in (("result", got), *(("torch baseline", b) for b in baselines)):
        bad = ~torch.where(finite, x.isfinite(), x == exact)
        assert not bad.any(), (
            f"{name}: the {who} has {int(bad.sum())} of {x.numel()} entries that are not finite, or not infinite as "
            f"the reference is; first at {bad.nonzero()[0].tolist()}: {x[bad][0]} instead of {exact[bad][0]}"
        )
    exact = exact[finite]
    if not exact.numel():
        return
    error, *torch_errors = (x.double()[finite] - exact for x in (got, *baselines))
    for kind, size in (("largest", _largest), ("rms", _rms)):
        of_torch = max(map(size, torch_errors))
        allowed = SLACK * of_torch + step * max(size(exact), magnitude)
        assert size(error) <= allowed, (
            f"{name}: {kind} error {size(error):.3e} exceeds {allowed:.3e} = {SLACK:g} x {of_torch:.3e} "
            f"(torch at that precision) + one step of {max(size(exact), magnitude):.3e}"
        )


def assert_accurate_gradient(
    name: str, got: Tensor | None, exact: Tensor, *baselines: Tensor, dtype: torch.dtype | None = None
) -> None:
    """:func:`assert_accurate`, and the direction and the rows: none missing, none where the reference has none."""
    assert got is not None, f"{name}: there is no gradient"
    baselines = tuple(b.double() for b in baselines)
    assert_accurate(name, got, exact, *baselines, dtype=dtype or got.dtype)
    if not exact.numel():
        return
    step = torch.finfo(dtype or got.dtype).eps
    got = got.double()
    by_row = (exact.numel() // exact.shape[-1], -1) if exact.dim() > 2 else (-1, 1)  # a score is a row of its own
    got_rows, exact_rows, *torch_rows = (x.reshape(by_row).norm(dim=-1) for x in (got, exact, *baselines))
    lost = torch.stack([(b - exact).reshape(by_row).norm(dim=-1) for b in baselines]).amax(0)
    # Missing: exactly 0 where torch at that precision has the row clearly right.
    missing = (got_rows == 0) & (exact_rows > 4 * lost)
    assert not missing.any(), f"{name}: {int(missing.sum())} rows lack their gradient, first {missing.nonzero()[0, 0]}"
    zero = torch.stack([exact_rows, *torch_rows]).amax(0) == 0
    extra = zero & (got_rows > step * max(map(_largest, baselines)))
    assert not extra.any(), f"{name}: {int(extra.sum())} rows must have none, first {extra.nonzero()[0, 0]}"
    if _largest(exact) == 0:
        return
    angle, allowed = _angle(got, exact), SLACK * max(_angle(b, exact) for b in baselines) + step
    assert angle <= allowed, f"{name}: the gradient points {angle:.3e} rad away, {allowed:.3e} allowed"


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _angle(x: Tensor, y: Tensor) -> float:
    """Angle between two tensors; by the difference of unit vectors, since ``acos`` is blind below 1e-8."""
    x, y = x.flatten() / x.norm().clamp_min(1e-300), y.flatten() / y.norm()
    return 2 * math.asin(min(1.0, float((x - y).norm()) / 2))
