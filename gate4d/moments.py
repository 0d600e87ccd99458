"""Mean and variance as a value that merges: layers, frames, batches and ranks in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

MAX_COUNT = torch.iinfo(torch.int64).max
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of the samples seen, elementwise.

    Args:
        count: samples behind each entry, an int or an integer tensor broadcastable to ``mean``; kept as int64. Sums of
            counts stop at 2^63 - 1.
        mean: floating tensor of any shape; 0 where ``count`` is 0.
        m2: ``sum (x - mean) ** 2``, same shape and dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape; the message names it.
    """

    count: Tensor  # int64, the shape of mean
    mean: Tensor  # [...]
    m2: Tensor  # [...]
    # What rounding took from mean and m2 ([2, ...]). With it many small partials merge into a large fp32 sum as
    # accurately as one, where plain fp32 updates would drown in the sum's last bit; and the last bit of a mean of 10^4,
    # which is 10^-3, is not taken for a spread between partials.
    _carry: Tensor | None = field(default=None, repr=False)

    if TYPE_CHECKING:  # count may be given as an int; as an attribute it is a tensor

        def __init__(self, count: int | Tensor, mean: Tensor, m2: Tensor, _carry: Tensor | None = None) -> None: ...

    def __post_init__(self) -> None:
        for name, x in (("mean", self.mean), ("m2", self.m2)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}.")
        if self.m2.shape != self.mean.shape or self.m2.dtype != self.mean.dtype:
            raise ValueError(
                f"m2 must have mean's shape {list(self.mean.shape)} and dtype {self.mean.dtype}, "
                f"got {list(self.m2.shape)} and {self.m2.dtype}."
            )
        if isinstance(self.count, int) and not 0 <= self.count <= MAX_COUNT:
            raise ValueError(f"count must be in [0, 2^63 - 1], got {self.count}.")
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
        mean, low = _add(mean.reshape(m2.shape), torch.zeros_like(residual), residual)
        return cls(count, mean, m2, torch.stack((low, torch.zeros_like(low))))

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
        count = torch.where(count < 0, MAX_COUNT, count)  # wrapped around
        share = other.count.to(dtype) / (self.count.to(dtype) + other.count.to(dtype)).clamp_min(1)
        zero = torch.zeros_like(other.mean)
        delta, delta_low = _add(other.mean, zero, -self.mean)
        delta_low = delta_low + (other_mean_low - mean_low)
        mean, mean_low = _add(self.mean, mean_low + delta_low * share, delta * share)
        between = (delta + delta_low).square() * (self.count.to(dtype) * share)
        m2, m2_low = _add(self.m2, m2_low + other_m2_low, other.m2 + between)
        return Moments(count, mean, m2, torch.stack((mean_low, m2_low)))

    def pool(self, dims: int | Sequence[int]) -> Moments:
        """Merge the entries along ``dims`` (heads, frames, ...), which are dropped."""
        dims = _dims(dims, self.mean.dim())
        if not dims:
            return self
        dtype = self.mean.dtype
        count, mean, m2, mean_low, m2_low = (
            x.expand_as(self.mean).movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))
            for x in (self.count, self.mean, self.m2, *self._low())
        )  # each [..., K]
        if not count.shape[-1]:
            return Moments.empty(count.shape[:-1], dtype, mean.device)
        weight = count.to(dtype)
        share = weight / weight.sum(-1, keepdim=True).clamp_min(1)
        # Deviations from one of the entries: a large common mean must not cost the digits of its differences.
        pivot = mean.gather(-1, count.argmax(-1, keepdim=True))
        centred = (mean - pivot) + mean_low
        offset = (share * centred).sum(-1, keepdim=True)
        between = weight * (centred - offset).square()
        pivot, offset = pivot[..., 0], offset[..., 0]
        mean, low = _add(pivot, torch.zeros_like(pivot), offset)
        total = _total(count)
        mean, low = (torch.where(total > 0, x, 0.0) for x in (mean, low))
        carry = torch.stack((low, torch.zeros_like(low)))
        return Moments(total, mean, (m2 + m2_low + between).sum(-1), carry)

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
        # torch's stubs have no overload for arguments that are either a dtype or a device.
        mean, m2 = self.mean.to(*args), self.m2.to(*args)  # type: ignore[call-overload]
        carry = self._carry
        if torch.finfo(mean.dtype).bits < torch.finfo(self.mean.dtype).bits:  # what the narrower ones leave
            low = self._low()
            left = [x - y.to(x) + z for x, y, z in ((self.mean, mean, low[0]), (self.m2, m2, low[1]))]
            carry = torch.stack(left)
        return Moments(self.count.to(mean.device), mean, m2, None if carry is None else carry.to(mean))

    @torch.no_grad()
    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Moments:
        """Moments of the samples of all ranks, the same on each; not differentiable.

        Two all-gathers: of 64 integers a rank, and of three float64 values an entry and rank.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ValueError: shapes or dtypes differ over the ranks; raised on all of them.
        """
        dist = torch.distributed
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("all_reduce needs torch.distributed.init_process_group() first.")
        self._check_ranks(group)
        mean_low, m2_low = self._low()
        # A count above 2^53 has no float64 of its own: its bits are sent.
        packed = torch.stack(
            (
                self.count.contiguous().view(torch.float64),
                self.mean.double() + mean_low.double(),
                self.m2.double() + m2_low.double(),
            )
        )
        parts = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, packed, group=group)
        count, mean, m2 = (torch.stack(x) for x in zip(*parts, strict=True))  # each [ranks, ...]
        return Moments(count.view(torch.int64), mean, m2).pool(0).to(self.mean.dtype)

    def _check_ranks(self, group: torch.distributed.ProcessGroup | None) -> None:
        """ValueError on every rank if one of them has another shape or dtype."""
        dist = torch.distributed
        shape = list(self.mean.shape)
        about = [_DTYPES.index(self.mean.dtype), len(shape), *shape]
        mine = torch.tensor([*about, *[0] * (64 - len(about))], device=self.mean.device)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        found = [part.tolist() for part in parts]
        if any(x != found[0] for x in found):
            ranks = (f"rank {n}: {x[2 : 2 + x[1]]} {_DTYPES[x[0]]}" for n, x in enumerate(found))
            raise ValueError(f"all_reduce needs one shape and dtype over the ranks, got {'; '.join(ranks)}.")

    def _low(self) -> Tensor:
        return torch.zeros(2, *(1,) * self.mean.dim()).to(self.mean) if self._carry is None else self._carry


def _add(x: Tensor, low: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``x + low + y`` as a rounded sum and what rounding took from it (Knuth's two-sum)."""
    total = x + y
    back = total - x
    low = low + ((x - (total - back)) + (y - back))
    high = total + low
    return high, low - (high - total)


def _total(count: Tensor) -> Tensor:  # [..., K] -> [...]
    return torch.where(count.double().sum(-1) < 2.0**63, count.sum(-1), MAX_COUNT)


def _dims(dims: int | Sequence[int], rank: int) -> tuple[int, ...]:
    wanted = (dims,) if isinstance(dims, int) else tuple(dims)
    for d in wanted:
        if not -rank <= d < rank:
            raise ValueError(f"dims must be in [-{rank}, {rank}), got {d}.")
    return tuple(sorted({d % rank for d in wanted}))
