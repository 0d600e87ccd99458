"""The motion gate: a rank-1 weight on attention.

Every gate of the supported systems is ``w_ij = (1 - a_i * b_j) ** strength`` on the unnormalised
softmax weight of query ``i`` and key ``j``, plus an output scale per query and a set of keys to drop.
The additive bias of the papers is ``strength * log(1 - a_i * b_j)``; as a weight it needs no logarithm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MotionGate:
    """A gate in its general form; use the named constructors.

    Args:
        query_score: ``a``, fp32 (or float64) ``[B, Nq]`` in [0, 1]; None means 1 for every query.
        key_score: ``b``, fp32 ``[B, Nk]`` in [0, 1]; None means that no weight is applied.
        output_scale: ``c``, fp32 ``[B, Nq]``, multiplies the output rows; None means 1.
        dropped_keys: bool ``[B, Nk]``, True removes a key and its value for every query.
        strength: exponent of the weight, >= 0. At a weight of exactly 0 the gradient with respect to
            the scores is taken as 0 when ``strength`` is not 1. A weight may be below every number: only its ratio to
            the others of a row counts, with a relative error of some ``strength * 1e-7``. Promised up to 100.
        renormalize: True divides by the gated sum (the rows sum to 1), False by the un-gated sum,
            which is zeroing probabilities after the softmax.

    Scores outside [0, 1] and NaN are errors: on the CPU at construction and in the compiled operator; on other devices
    :meth:`validate` looks, since reading values there waits for the device.

    Raises:
        TypeError, ValueError: a field has the wrong type, dtype or value; the message names it.
    """

    query_score: Tensor | None = None
    key_score: Tensor | None = None
    output_scale: Tensor | None = None
    dropped_keys: Tensor | None = None
    strength: float = 1.0
    renormalize: bool = True

    def __post_init__(self) -> None:
        _strength(self.strength)
        for name in ("query_score", "key_score", "output_scale"):
            x = getattr(self, name)
            if x is not None and not (isinstance(x, Tensor) and x.is_floating_point()):
                raise TypeError(f"{name} must be a floating-point tensor or None, got {_kind(x)}.")
            # Read here, once: a check in every attention call would read the whole tensor.
            if x is not None and name != "output_scale" and _is_readable(x):
                _unit_interval(x, name)
        if self.dropped_keys is not None:
            _mask(self.dropped_keys, "dropped_keys")

    @classmethod
    def pairwise(cls, query_motion: Tensor, key_motion: Tensor | None = None, *, strength: float = 1.0) -> MotionGate:
        """Static queries look away from dynamic keys: ``w_ij = (1 - (1 - g_i) g_j) ** strength``.

        MUT3R's self-attention gate. ``query_motion [B, Nq]`` and ``key_motion [B, Nk]`` in [0, 1],
        1 = dynamic; ``key_motion=None`` uses ``query_motion`` for both sides.
        """
        query = _motion(query_motion, "query_motion")
        key = query if key_motion is None else _motion(key_motion, "key_motion")
        return cls._of_checked(query_score=1 - query, key_score=key, strength=_strength(strength))

    @classmethod
    def keys(cls, key_motion: Tensor, *, strength: float = 1.0) -> MotionGate:
        """Every query looks away from dynamic keys: ``w_ij = (1 - g_j) ** strength``.

        MUT3R's gate on the state's queries. ``key_motion [B, Nk]`` in [0, 1], 1 = dynamic.
        """
        return cls._of_checked(key_score=_motion(key_motion, "key_motion"), strength=_strength(strength))

    @classmethod
    def queries(cls, query_motion: Tensor, *, strength: float = 1.0) -> MotionGate:
        """Dynamic queries receive less: the output row ``i`` is scaled by ``(1 - g_i) ** strength``.

        MUT3R's gate on the image's queries into the state. Written as an additive bias it depends on the
        query alone, is constant along the softmax and cancels; it is therefore applied to the output.
        ``query_motion [B, Nq]`` in [0, 1], 1 = dynamic.
        """
        static, strength = 1 - _motion(query_motion, "query_motion"), _strength(strength)
        if strength not in (0, 1):
            # As for the weights, the gradient at 0 is 0: that of the power is infinite or undefined there.
            scale = torch.where(static > 0, torch.where(static > 0, static, 1.0) ** strength, 0.0)
        else:
            scale = static**strength
        return cls(output_scale=scale)

    @classmethod
    def drop_keys(cls, mask: Tensor) -> MotionGate:
        """Remove keys and their values for every query, as VGGT4D's early masking does.

        ``mask`` is bool ``[B, Nk]``, True = drop. Kernels gather the kept keys and skip the rest, so the
        time falls with the number of keys dropped.
        """
        return cls(dropped_keys=_mask(mask, "mask"))

    @classmethod
    def static_to_dynamic(
        cls, query_mask: Tensor, key_mask: Tensor | None = None, *, renormalize: bool = False
    ) -> MotionGate:
        """Block attention of static queries to dynamic keys.

        Easi3R's reweighting: probabilities are zeroed after the softmax and the rows are not divided
        again, hence ``renormalize=False``. ``query_mask [B, Nq]`` and ``key_mask [B, Nk]`` are bool,
        True = dynamic; ``key_mask=None`` uses ``query_mask`` for both sides.
        """
        query = _mask(query_mask, "query_mask")
        key = query if key_mask is None else _mask(key_mask, "key_mask")
        return cls._of_checked(query_score=(~query).float(), key_score=key.float(), renormalize=bool(renormalize))

    def validate(self) -> MotionGate:
        """Read the scores wherever they are and raise ValueError unless all are in [0, 1]; returns the gate.

        For debugging on a GPU: it waits for the device.
        """
        for name in ("query_score", "key_score"):
            if (x := getattr(self, name)) is not None:
                _unit_interval(x, name)
        return self

    @classmethod
    def _of_checked(cls, **fields: Any) -> MotionGate:
        """Without looking at the values again."""
        if torch.compiler.is_compiling():
            return cls(**fields)
        gate = object.__new__(cls)
        gate.__dict__.update(_DEFAULTS, **fields)
        return gate


_DEFAULTS = {f.name: f.default for f in fields(MotionGate)}


def _motion(score: Tensor, name: str) -> Tensor:
    if not isinstance(score, Tensor) or not score.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor of motion scores, got {_kind(score)}.")
    if score.dim() != 2:
        raise ValueError(f"{name} must have shape [B, N], got {list(score.shape)}.")
    if _is_readable(score):
        _unit_interval(score, name, "motion scores in [0, 1] (1 = dynamic)")
    return score if score.dtype == torch.float64 else score.float()


def _is_readable(score: Tensor) -> bool:
    return score.device.type == "cpu" and not torch.compiler.is_compiling() and _is_concrete(score)


def _unit_interval(score: Tensor, name: str, wanted: str = "values in [0, 1]") -> None:
    if not score.numel():
        return
    low, high = (float(x) for x in torch.aminmax(score.detach()))
    if not (low >= 0.0 and high <= 1.0):  # also true for NaN
        raise ValueError(f"{name} must hold {wanted}, got values in [{low:g}, {high:g}].")


def _mask(mask: Tensor, name: str) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {_kind(mask)}.")
    if mask.dim() != 2:
        raise ValueError(f"{name} must have shape [B, N], got {list(mask.shape)}.")
    return mask


def _kind(x: object) -> str:
    return f"a {x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__


def _strength(strength: float) -> float:
    if not isinstance(strength, (int, float)) or isinstance(strength, bool):
        raise TypeError(f"strength must be a number, got {type(strength).__name__}.")
    if not 0 <= strength < math.inf:  # False for NaN; in comparisons that torch.compile can trace
        raise ValueError(f"strength must be finite and >= 0, got {strength}.")
    return float(strength)


def _is_concrete(tensor: Tensor) -> bool:
    """False for the wrappers of ``torch.func`` transforms and fake tensors, whose values cannot be read."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
