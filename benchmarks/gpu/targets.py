"""The GPU targets G1 to G7 as sets of variants that are checked, then timed side by side; G8 to G10: pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import gate4d
from gate4d import MotionGate, TokenLayout, Visibility

from ..cases import Inputs
from ..peers import PEERS, motion_score_mod
from ..registry import SHAPES

SHAPE = SHAPES["vggt.global"]
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Step = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """One measurement.

    Attributes:
        id: unique, the key of its result.
        ours, peers: name -> a step; ``ratio`` divides the first of ours by the fastest peer.
        check: raises if ours is wrong; runs before anything is timed.
        seconds: a guess of how long it takes, for planning.
        repeats: how often each step is timed where the timer's own choice would take too long.
        extra: measured beside the time, after it.
    """

    id: str
    limit: float | None
    build: Callable[[], tuple[dict[str, Step], dict[str, Step], Callable[[], None]]]
    seconds: float = 20.0
    repeats: int | None = None
    extra: Callable[[], dict] = dict


@dataclass(frozen=True)
class Setup:
    """Sizes and places; a small one lets everything run on a CPU, where it measures nothing."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    backend: str = "triton"  # of the attention that is measured
    heads: int = SHAPE.heads
    dim: int = SHAPE.head_dim
    frame: int = SHAPE.keys  # tokens
    unit: int = 1  # token counts are divided by it
    model: tuple[tuple[str, int], ...] = (("depth", 24), ("dim", 1024), ("heads", 16))
    image: int = 518  # side in pixels
    compile: bool = True


FULL = Setup()
TINY = Setup("cpu", torch.float32, "cpu", 2, 16, 24, 256, (("depth", 24), ("dim", 32), ("heads", 2)), 56, False)


def inputs(s: Setup, tokens: int, grad: bool = False) -> tuple[Tensor, ...]:
    """q, k, v as a projection leaves them, ``[1, H, N, D]``, and motion scores ``[1, N]``."""
    qkv = torch.randn(1, tokens, 3, s.heads, s.dim, device=s.device, dtype=s.dtype).permute(2, 0, 3, 1, 4)
    return *(x.detach().requires_grad_(grad) for x in qkv), torch.rand(1, tokens, device=s.device)


def sdpa(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA pinned to one of :data:`SDPA`."""
    with sdpa_kernel(SDPA[backend]):
        return F.scaled_dot_product_attention(q, k, v)


def all_sdpa(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Step]:
    steps: dict[str, Step] = {f"SDPA {name}": partial(sdpa, name, q, k, v) for name in SDPA}
    for peer in PEERS.values():  # what is installed; not run on a GPU yet
        if peer.needs_cuda and peer.exact and not peer.reasons("plain", "cuda"):
            steps[peer.name] = peer.build(Inputs(q, k, v))
    return steps


def check_rows(
    got: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: MotionGate | None, visible: Visibility | None
) -> None:
    """Compare 64 rows with the float64 reference; the relative error may be four rounding steps of the dtype."""
    rows = torch.randperm(q.shape[2], device=q.device)[:64]
    _compare("the output", got.detach()[:, :, rows], exact_rows(rows, q, k, v, gate, visible), 4)


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


def _compare(name: str, got: Tensor, exact: Tensor, steps: float) -> None:
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
        _compare(f"the gradient of {name}", g.to(q.dtype), w, steps)


def _forward(s: Setup, tokens: int, kind: str = "pairwise", fraction: float = 0.0, frames: int = 0, peer: str = "sdpa"):
    q, k, v, motion = inputs(s, frames * s.frame if frames else tokens // s.unit)
    gate = {
        "none": lambda: None,
        "pairwise": lambda: MotionGate.pairwise(motion),
        "keys": lambda: MotionGate.keys(motion),
        "drop": lambda: MotionGate.drop_keys(motion < fraction),
    }[kind]()
    visible = Visibility.frame_causal(TokenLayout(frames, s.frame, 5)) if frames else None
    backends = [s.backend, *({"drop": ["sdpa_compacted"], "keys": ["sdpa_folded"]}.get(kind, []))]
    ours = {b: partial(gate4d.gated_attention, q, k, v, gate=gate, visible=visible, backend=b) for b in backends}
    if peer == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention, dynamic=False) if s.compile else flex_attention
        peers: dict[str, Step] = {
            "FlexAttention": partial(flex, q, k, v, score_mod=motion_score_mod(1 - motion, motion))
        }
    elif peer == "self":
        peers = {f"{s.backend}, no gate": partial(gate4d.gated_attention, q, k, v, backend=s.backend)}
    else:
        peers = all_sdpa(q, k, v)
    return ours, peers, lambda: [check_rows(step(), q, k, v, gate, visible) for step in ours.values()]


def _stats(s: Setup, tokens: int):
    q, k, v, motion = inputs(s, tokens // s.unit)
    gate = MotionGate.pairwise(motion)
    call = partial(gate4d.gated_attention, q, k, v, gate=gate, backend=s.backend, return_aux=True)
    with_stats = partial(call, row_stats=("entropy", "max_prob", "sum_sq"))
    return {"statistics": with_stats}, {"none": call}, lambda: check_rows(with_stats()[0], q, k, v, gate, None)


def _backward(s: Setup, tokens: int, gate_gradients: bool):
    q, k, v, motion = inputs(s, tokens // s.unit, grad=True)
    motion.requires_grad_(gate_gradients)
    grad = torch.randn(q.shape, device=s.device, dtype=s.dtype)

    def backward(out: Tensor, *leaves: Tensor) -> Step:
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    names = ("q", "k", "v", "motion") if gate_gradients else ("q", "k", "v")
    gate = MotionGate.pairwise(motion)
    out = gate4d.gated_attention(q, k, v, gate=gate, backend=s.backend)
    peers = {}
    for name in ("flash", "cudnn"):
        try:
            peers[f"SDPA {name}"] = backward(sdpa(name, q, k, v), q, k, v)
        except RuntimeError:  # this torch has no such backend here
            continue

    def check() -> None:
        check_rows(out, q, k, v, gate, None)
        check_gradients(s, out, q, k, v, motion, names)

    return {"backward": backward(out, *((q, k, v, motion)[: len(names)]))}, peers, check


def _received(s: Setup, tokens: int, peer: str | None = None):
    """Against one forward pass, or against a peer that finds lse itself while here the forward pass has left it."""
    q, k, v, _ = inputs(s, tokens // s.unit)
    tokens = q.shape[2]
    _, aux = gate4d.gated_attention(q, k, v, return_aux=True, backend=s.backend)
    step = partial(gate4d.received_attention, q, k, aux.lse, over=("queries",), backend=s.backend)

    if peer is None:
        others: dict[str, Step] = {"forward": partial(gate4d.gated_attention, q, k, v, backend=s.backend)}
    else:
        others = {peer: PEERS[peer].build(Inputs(q, k, v))}

    def check() -> None:
        got = step()
        keys = torch.randperm(tokens, device=q.device)[:32]
        p = (q.double() @ k[:, :, keys].double().mT * s.dim**-0.5 - aux.lse.double()[..., None]).exp()
        _compare("the mean", got.mean[..., keys].to(q.dtype), p.mean(2), 4)
        _compare("the variance", got.variance()[..., keys].to(q.dtype), p.var(2), 8)
        if peer is not None:
            _compare(f"the mean of {peer}", others[peer]()[0][..., keys], p.mean(2), 4)

    return {"received": step}, others, check


def _reducers(s: Setup) -> list[str]:
    """Peers for the attention received that can run here."""
    return [p.name for p in PEERS.values() if p.needs_cuda and not p.reasons("received", s.device)]


def plan(s: Setup = FULL) -> list[Work]:
    """All measurements, the most wanted first."""
    from . import pipelines

    sizes = (16384, 32768, 65536, 131072)
    frames = max(2, 64 // s.unit)
    return [
        *(Work(f"G1 forward N={n}", 1.0, partial(_forward, s, n), 10 + n / 4096) for n in sizes),
        *(Work(f"G2 forward N={n} / FlexAttention", 0.75, partial(_forward, s, n, peer="flex"), 60) for n in sizes[:2]),
        Work("G3 gate on / off", 1.03, partial(_forward, s, 32768, peer="self")),
        Work("G3 row statistics on / off", 1.05, partial(_stats, s, 32768)),
        Work("G4 backward", 1.1, partial(_backward, s, 16384, False)),
        Work("G4 backward with gate gradients", 1.2, partial(_backward, s, 16384, True)),
        *(Work(f"G5 {r:.0%} of keys dropped", 1.05 - r, partial(_forward, s, 32768, "drop", r)) for r in (0.3, 0.6)),
        Work("G5 gate on keys alone", None, partial(_forward, s, 32768, "keys")),
        Work("G6 frame-causal, 64 frames", 0.56, partial(_forward, s, 0, "none", frames=frames), 40),
        Work("G7 attention received / forward", 0.6, partial(_received, s, 32768)),
        *(Work(f"G7 received, given lse / {n}", None, partial(_received, s, 32768, n)) for n in _reducers(s)),
        *pipelines.plan(s),
    ]
