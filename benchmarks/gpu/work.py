"""What a GPU measurement is: variants that are checked, then timed in turns; the sizes; and the checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import gate4d
from gate4d import MotionGate, Visibility
from gate4d.kernels.support import library_error

from ..registry import SHAPES
from ..rows.target import TargetRow

SHAPE = SHAPES["vggt.global"]
Variant = Callable[[], object]
# ours, peers, and the check that raises if ours is wrong; the first of ours is what a user gets who asks for nothing
Variants = tuple[dict[str, Variant], dict[str, Variant], Callable[[], None]]
DEFAULT = "default"  # the backend that is taken by itself


def default(q: Tensor, k: Tensor, v: Tensor, **call) -> str:
    """The name of the default for a call of gated_attention: which backend that is."""
    return f"{DEFAULT} ({gate4d.explain(q, k, v, **call).partition(':')[0].removeprefix('auto takes ')})"


@dataclass(frozen=True)
class Work:
    """One measurement, a row: the first of ours against the fastest peer, the best of ours beside it.

    Attributes:
        id: unique: the target, then what is measured.
        limit: what the ratio must not exceed; None for a row that only informs.
        build: makes the variants; the check runs before anything is timed.
        seconds: a guess of how long it takes, for planning.
        repeats: how often each variant is called where the timer's own choice would take too long; a call a round.
        extra: rows of what was measured beside the time.
    """

    id: str
    limit: float | None
    build: Callable[[], Variants]
    seconds: float = 20.0
    repeats: int | None = None
    extra: Callable[[], list[TargetRow]] = list


@dataclass(frozen=True)
class Setup:
    """Sizes and places; a small one lets everything run on a CPU, where it measures nothing."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    kernel: str = "triton"  # gate4d's own backend there, measured beside the default
    heads: int = SHAPE.heads
    dim: int = SHAPE.head_dim
    frame: int = SHAPE.keys  # tokens
    unit: int = 1  # token counts are divided by it
    model: dict[str, int] = field(default_factory=lambda: {"width": 1024, "heads": 16, "depth": 24, "patch": 14})
    image: int = 518  # side in pixels
    compile: bool = True


FULL = Setup()
_HERE = "reference" if library_error() else "cpu"  # the kernel that stands for the GPU's
TINY = Setup(
    "cpu", torch.float32, _HERE, 2, 16, 24, 256, {"width": 32, "heads": 2, "depth": 24, "patch": 14}, 56, False
)  # fmt: skip


def check_rows(
    got: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: MotionGate | None, visible: Visibility | None
) -> None:
    """Compare 64 rows with the float64 reference; the relative error may be four rounding steps of the dtype."""
    rows = torch.randperm(q.shape[2], device=q.device)[:64]
    compare("the output", got.detach()[:, :, rows], exact_rows(rows, q, k, v, gate, visible), 4)


def exact_rows(rows: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: MotionGate | None, visible: Visibility | None):
    """Rows of the output by the float64 reference."""
    from gate4d.kernels.attention.reference import attention

    g = gate or MotionGate()
    bounds = None if visible is None else visible.bounds_on(q.device)
    return attention(
        q[:, :, rows].double(), k.double(), v.double(),
        None if g.query_score is None else g.query_score[:, rows].double(),
        None if g.key_score is None else g.key_score.double(),
        g.dropped_keys, None if bounds is None else bounds[:, :, rows], q.shape[3] ** -0.5, g.strength, g.renormalize,
    )[0]  # fmt: skip


def compare(name: str, got: Tensor, exact: Tensor, steps: float) -> None:
    difference = (got.double() - exact).norm() / exact.norm()
    allowed = steps * torch.finfo(got.dtype).eps
    if not difference <= allowed:
        raise AssertionError(f"{name}: relative error {float(difference):.2e} exceeds {allowed:.2e}")


def check_gradients(
    s: Setup, out: Tensor, q: Tensor, k: Tensor, v: Tensor, motion: Tensor, wanted: Sequence[str], steps: float = 8
) -> None:
    """Every gradient of the pairwise gate against float64, with a gradient of the output that is 0 but in 32 rows: then
    the reference needs those rows alone, and all keys and values still get a gradient. The relative error may be
    ``steps`` rounding steps of the inputs' dtype."""
    rows = torch.randperm(q.shape[2], device=q.device)[:32]
    grad = torch.zeros_like(out)
    grad[:, :, rows] = torch.randn_like(grad[:, :, rows])
    leaves = {"q": q, "k": k, "v": v, "motion": motion}
    got = torch.autograd.grad(out, [leaves[n] for n in wanted], grad, retain_graph=True)
    doubles = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    d = doubles.values()
    want_out = exact_rows(rows, *list(d)[:3], MotionGate.pairwise(doubles["motion"]), None)
    want = torch.autograd.grad(want_out, [doubles[n] for n in wanted], grad[:, :, rows].double())
    for name, g, w in zip(wanted, got, want, strict=True):
        if not g.isfinite().all():
            raise AssertionError(f"the gradient of {name} is not finite")
        compare(f"the gradient of {name}", g.to(q.dtype), w, steps)
