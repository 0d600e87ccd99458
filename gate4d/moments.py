"""Mean and variance as a value that merges: layers, frames, batches and ranks in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of the samples seen, elementwise.

    Args:
        count: samples behind each entry, an int or an integer tensor broadcastable to ``mean``; kept as int64.
        mean: floating tensor of any shape; 0 where ``count`` is 0.
        m2: ``sum (x - mean) ** 2``, same shape and dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape; the message names it.
    """

    count: Tensor  # int64, the shape of mean
    mean: Tensor  # [...]
    m2: Tensor  # [...]
    # What rounding took from mean and m2 in past merges ([2, ...]). With it many small partials merge into a large
    # fp32 sum as accurately as one, where plain fp32 updates would drown in the sum's last bit.
    _carry: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, x in (("mean", self.mean), ("m2", self.m2)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}.")
        if self.m2.shape != self.mean.shape or self.m2.dtype != self.mean.dtype:
            raise ValueError(
                f"m2 must have mean's shape {list(self.mean.shape)} and dtype {self.mean.dtype}, "
                f"got {list(self.m2.shape)} and {self.m2.dtype}."
            )
        count = torch.as_tensor(self.count, device=self.mean.device)
        if count.is_floating_point() or count.is_complex() or count.dtype == torch.bool:
            raise TypeError(f"count must be an int or an integer tensor, got {count.dtype}.")
        try:
            count = torch.broadcast_to(count.to(torch.int64), self.mean.shape)
        except RuntimeError:
            raise ValueError(
                f"count must broadcast to mean's shape {list(self.mean.shape)}, got {list(count.shape)}."
            ) from None
        object.__setattr__(self, "count", count)

    @classmethod
    def empty(
        cls, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Moments:
        """No samples yet: the neutral element of :meth:`merge`."""
        zeros = torch.zeros(shape, dtype=dtype, device=device)
        return cls(0, zeros, zeros)

    @classmethod
    def from_samples(cls, x: Tensor, dims: int | Sequence[int]) -> Moments:
        """Moments of ``x``, any floating dtype, in at least fp32, over ``dims``, which are dropped."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = _dims(dims, x.dim())
        count = 1
        for d in dims:
            count *= x.shape[d]
        if count == 0:
            return cls.empty([n for d, n in enumerate(x.shape) if d not in dims], x.dtype, x.device)
        mean = x.mean(dims, keepdim=True)
        deviation = x - mean
        # The rounded mean is off by a little; what that adds to the squares is known and removed.
        residual = deviation.mean(dims)
        m2 = (deviation.square().sum(dims) - count * residual.square()).clamp_min(0)
        return cls(count, mean.reshape(m2.shape) + residual, m2)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of samples together (Chan, Golub and LeVeque's pairwise update).

        Commutative and associative up to rounding, and compensated: 10^9 fp32 samples may arrive in any partials.
        """
        if other.mean.shape != self.mean.shape or other.mean.dtype != self.mean.dtype:
            raise ValueError(
                f"other must have shape {list(self.mean.shape)} and dtype {self.mean.dtype} to merge, "
                f"got {list(other.mean.shape)} and {other.mean.dtype}."
            )
        (mean_low, m2_low), (other_mean_low, other_m2_low) = self._low(), other._low()
        dtype = self.mean.dtype
        count = self.count + other.count
        share = other.count.to(dtype) / count.clamp_min(1).to(dtype)
        delta = (other.mean - self.mean) + (other_mean_low - mean_low)
        mean, mean_low = _add(self.mean, mean_low, delta * share)
        between = delta.square() * (self.count.to(dtype) * share)
        m2, m2_low = _add(self.m2, m2_low + other_m2_low, other.m2 + between)
        return Moments(count, mean, m2, torch.stack((mean_low, m2_low)))

    def pool(self, dims: int | Sequence[int]) -> Moments:
        """Merge the entries along ``dims`` (heads, frames, ...), which are dropped."""
        dims = _dims(dims, self.mean.dim())
        if not dims:
            return self
        dtype = self.mean.dtype
        count = self.count.sum(dims, keepdim=True)
        share = self.count.to(dtype) / count.clamp_min(1).to(dtype)
        # Deviations from one of the entries: a large common mean must not cost the digits of its differences.
        pivot = self.mean[tuple(slice(0, 1) if d in dims else slice(None) for d in range(self.mean.dim()))]
        offset = (share * (self.mean - pivot)).sum(dims, keepdim=True)
        between = self.count.to(dtype) * ((self.mean - pivot) - offset).square()
        m2 = (self.m2 + between).sum(dims)
        mean = torch.where(count > 0, pivot + offset, 0.0)
        return Moments(count.reshape(m2.shape), mean.reshape(m2.shape), m2)

    def variance(self, unbiased: bool = True) -> Tensor:
        """``m2 / (count - 1)``, or ``m2 / count``; NaN where there are too few samples, as ``torch.var``."""
        divisor = (self.count - 1 if unbiased else self.count).to(self.mean.dtype)
        return torch.where(divisor > 0, self.m2 / divisor.clamp_min(1), torch.nan)

    def std(self, unbiased: bool = True) -> Tensor:
        """Square root of :meth:`variance`."""
        return self.variance(unbiased).sqrt()

    def finalize(self, unbiased: bool = True) -> tuple[Tensor, Tensor]:
        """``(mean, variance)``, the mean NaN where nothing was seen."""
        return torch.where(self.count > 0, self.mean, torch.nan), self.variance(unbiased)

    def to(self, *args: torch.dtype | torch.device | str) -> Moments:
        """Mean and m2 in another dtype or on another device."""
        carry = None if self._carry is None else self._carry.to(*args)
        mean = self.mean.to(*args)
        return Moments(self.count.to(mean.device), mean, self.m2.to(*args), carry)

    @torch.no_grad()
    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Moments:
        """Moments of the samples of all ranks, the same on each; not differentiable.

        Shapes and dtypes must agree over the ranks. One float64 all-gather of ``3 x ranks`` values an entry.

        Raises:
            RuntimeError: torch.distributed is not initialised.
        """
        dist = torch.distributed
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("all_reduce needs torch.distributed.init_process_group() first.")
        mean_low, m2_low = self._low()
        packed = torch.stack(
            (self.count.double(), self.mean.double() + mean_low.double(), self.m2.double() + m2_low.double())
        )
        parts = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, packed, group=group)
        count, mean, m2 = torch.stack(parts, dim=1)  # each [ranks, ...]
        return Moments(count.to(torch.int64), mean, m2).pool(0).to(self.mean.dtype)

    def _low(self) -> Tensor:
        return torch.zeros(2, *(1,) * self.mean.dim()).to(self.mean) if self._carry is None else self._carry


def _add(x: Tensor, low: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``x + low + y`` as a rounded sum and what rounding took from it (Knuth's two-sum)."""
    total = x + y
    back = total - x
    low = low + ((x - (total - back)) + (y - back))
    high = total + low
    return high, low - (high - total)


def _dims(dims: int | Sequence[int], rank: int) -> tuple[int, ...]:
    wanted = (dims,) if isinstance(dims, int) else tuple(dims)
    for d in wanted:
        if not -rank <= d < rank:
            raise ValueError(f"dims must be in [-{rank}, {rank}), got {d}.")
    return tuple(sorted({d % rank for d in wanted}))
