"""The GPU targets G1 to G7 as sets of variants that are checked, then timed side by side.

G8 to G10 are whole pipelines and belong to the commands that run them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
HEADS, DIM, FRAME = SHAPE.heads, SHAPE.head_dim, SHAPE.keys
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
    """

    id: str
    limit: float | None
    build: Callable[[], tuple[dict[str, Step], dict[str, Step], Callable[[], None]]]
    seconds: float = 20.0
    about: dict = field(default_factory=dict)


def inputs(tokens: int, dtype: torch.dtype = torch.bfloat16, dim: int = DIM, grad: bool = False) -> tuple[Tensor, ...]:
    """q, k, v as a projection leaves them, ``[1, 16, N, D]``, and motion scores ``[1, N]``."""
    qkv = torch.randn(1, tokens, 3, HEADS, dim, device="cuda", dtype=dtype).permute(2, 0, 3, 1, 4)
    return *(x.detach().requires_grad_(grad) for x in qkv), torch.rand(1, tokens, device="cuda")


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
    from gate4d.kernels.attention.reference import attention

    rows = torch.randperm(q.shape[2], device=q.device)[:64]
    g = gate or MotionGate()
    bounds = None if visible is None else visible.bounds_on(q.device)
    want, *_ = attention(
        q[:, :, rows].double(), k.double(), v.double(),
        None if g.query_score is None else g.query_score[:, rows].double(),
        None if g.key_score is None else g.key_score.double(),
        g.dropped_keys, None if bounds is None else bounds[:, :, rows], q.shape[3] ** -0.5, g.strength, g.renormalize,
    )  # fmt: skip
    difference = (got.detach()[:, :, rows].double() - want).norm() / want.norm()
    allowed = 4 * torch.finfo(q.dtype).eps
    if not difference <= allowed:
        raise AssertionError(f"relative error {float(difference):.2e} exceeds {allowed:.2e}")


def _forward(tokens: int, kind: str = "pairwise", fraction: float = 0.0, frames: int = 0, peer: str = "sdpa"):
    q, k, v, motion = inputs(frames * FRAME if frames else tokens)
    gate = {
        "none": lambda: None,
        "pairwise": lambda: MotionGate.pairwise(motion),
        "keys": lambda: MotionGate.keys(motion),
        "drop": lambda: MotionGate.drop_keys(motion < fraction),
    }[kind]()
    visible = Visibility.frame_causal(TokenLayout(frames, FRAME, 5)) if frames else None
    backends = ["triton", *({"drop": ["sdpa_compacted"], "keys": ["sdpa_folded"]}.get(kind, []))]
    ours = {b: partial(gate4d.gated_attention, q, k, v, gate=gate, visible=visible, backend=b) for b in backends}
    if peer == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        peers: dict[str, Step] = {
            "FlexAttention": partial(compiled, q, k, v, score_mod=motion_score_mod(1 - motion, motion))
        }
    elif peer == "self":
        peers = {"triton, no gate": partial(gate4d.gated_attention, q, k, v, backend="triton")}
    else:
        peers = all_sdpa(q, k, v)
    return ours, peers, lambda: [check_rows(step(), q, k, v, gate, visible) for step in ours.values()]


def _stats(tokens: int):
    q, k, v, motion = inputs(tokens)
    gate = MotionGate.pairwise(motion)
    call = partial(gate4d.gated_attention, q, k, v, gate=gate, backend="triton", return_aux=True)
    with_stats = partial(call, row_stats=("entropy", "max_prob", "sum_sq"))
    return {"statistics": with_stats}, {"none": call}, lambda: check_rows(with_stats()[0], q, k, v, gate, None)


def _backward(tokens: int, gate_gradients: bool):
    q, k, v, motion = inputs(tokens, grad=True)
    motion.requires_grad_(gate_gradients)
    grad = torch.randn(1, HEADS, tokens, DIM, device="cuda", dtype=q.dtype)

    def backward(out: Tensor, *leaves: Tensor) -> Step:
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    leaves = (q, k, v, motion) if gate_gradients else (q, k, v)
    gate = MotionGate.pairwise(motion)
    out = gate4d.gated_attention(q, k, v, gate=gate, backend="triton")
    peers = {n: backward(sdpa(n.removeprefix("SDPA "), q, k, v), q, k, v) for n in ("SDPA flash", "SDPA cudnn")}

    def check() -> None:
        check_rows(out, q, k, v, gate, None)
        if not all(g.isfinite().all() for g in backward(out, *leaves)()):
            raise AssertionError("a gradient is not finite")

    return {"triton": backward(out, *leaves)}, peers, check


def _received(tokens: int):
    from gate4d.kernels.received_attention.triton import received_attention

    q, k, v, _ = inputs(tokens)
    _, aux = gate4d.gated_attention(q, k, v, return_aux=True, backend="triton")
    step = partial(received_attention, q, k, aux.lse, None, None, None, DIM**-0.5, 1.0)

    def check() -> None:
        total = step()[0].sum(-1) * tokens  # every row of probabilities sums to 1
        if not torch.allclose(total, torch.full_like(total, tokens), rtol=1e-3):
            raise AssertionError("the received attention does not sum to the number of queries")

    forward = partial(gate4d.gated_attention, q, k, v, backend="triton")
    return {"received": step}, {"triton forward": forward}, check


def plan() -> list[Work]:
    """All measurements, the most wanted first."""
    sizes = (16384, 32768, 65536, 131072)
    return [
        *(Work(f"G1 forward N={n}", 1.0, partial(_forward, n), 10 + n / 4096) for n in sizes),
        *(Work(f"G2 forward N={n} / FlexAttention", 0.75, partial(_forward, n, peer="flex"), 60) for n in sizes[:2]),
        Work("G3 gate on / off", 1.03, partial(_forward, 32768, peer="self")),
        Work("G3 row statistics on / off", 1.05, partial(_stats, 32768)),
        Work("G4 backward", 1.1, partial(_backward, 16384, False)),
        Work("G4 backward with gate gradients", 1.2, partial(_backward, 16384, True)),
        *(Work(f"G5 {r:.0%} of keys dropped", 1.05 - r, partial(_forward, 32768, "drop", r)) for r in (0.3, 0.6)),
        Work("G5 gate on keys alone", None, partial(_forward, 32768, "keys")),
        Work("G6 frame-causal, 64 frames", 0.56, partial(_forward, 0, "none", frames=64), 40),
        Work("G7 attention received / forward", 0.6, partial(_received, 32768)),
    ]
