"""The GPU targets G1 to G7: one operation a row."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import gate4d
from gate4d import MotionGate, TokenLayout, Visibility

from ..inputs import Inputs
from ..peers import PEERS, motion_score_mod
from .work import DEFAULT, Setup, Variant, Work, check_gradients, check_rows, compare, default

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def inputs(s: Setup, tokens: int, grad: bool = False) -> tuple[Tensor, ...]:
    """q, k, v as a projection leaves them, ``[1, H, N, D]``, and motion scores ``[1, N]``."""
    qkv = torch.randn(1, tokens, 3, s.heads, s.dim, device=s.device, dtype=s.dtype).permute(2, 0, 3, 1, 4)
    return *(x.detach().requires_grad_(grad) for x in qkv), torch.rand(1, tokens, device=s.device)


def sdpa(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA pinned to one of :data:`SDPA`."""
    with sdpa_kernel(SDPA[backend]):
        return F.scaled_dot_product_attention(q, k, v)


def all_sdpa(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Variant]:
    steps: dict[str, Variant] = {f"SDPA {name}": partial(sdpa, name, q, k, v) for name in SDPA}
    for peer in PEERS.values():  # what is installed; not run on a GPU yet
        if peer.needs_cuda and peer.exact and not peer.reasons("plain", "cuda"):
            steps[peer.name] = peer.build(Inputs(q, k, v))
    return steps


def _forward(s: Setup, tokens: int, kind: str = "pairwise", fraction: float = 0.0, frames: int = 0, peer: str = "sdpa"):
    q, k, v, motion = inputs(s, frames * s.frame if frames else tokens // s.unit)
    gate = {
        "none": lambda: None,
        "pairwise": lambda: MotionGate.pairwise(motion),
        "keys": lambda: MotionGate.keys(motion),
        "drop": lambda: MotionGate.drop_keys(motion < fraction),
    }[kind]()
    visible = Visibility.frame_causal(TokenLayout(frames, s.frame, 5)) if frames else None
    call = partial(gate4d.gated_attention, q, k, v, gate=gate, visible=visible)
    named = [s.kernel, *({"drop": ["sdpa_compacted"], "keys": ["sdpa_folded"]}.get(kind, []))]
    ours: dict[str, Variant] = {default(q, k, v, gate=gate, visible=visible): call}
    ours |= {backend: partial(call, backend=backend) for backend in named}
    if peer == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention, dynamic=False) if s.compile else flex_attention
        peers: dict[str, Variant] = {
            "FlexAttention": partial(flex, q, k, v, score_mod=motion_score_mod(1 - motion, motion))
        }
    elif peer == "self":  # the same kernel: by itself, plain attention may go to another one
        ours = {s.kernel: ours[s.kernel]}
        peers = {f"{s.kernel}, no gate": partial(gate4d.gated_attention, q, k, v, backend=s.kernel)}
    else:
        peers = all_sdpa(q, k, v)
    return ours, peers, lambda: [check_rows(step(), q, k, v, gate, visible) for step in ours.values()]


def _stats(s: Setup, tokens: int):
    q, k, v, motion = inputs(s, tokens // s.unit)
    gate = MotionGate.pairwise(motion)
    call = partial(gate4d.gated_attention, q, k, v, gate=gate, backend=s.kernel, return_aux=True)
    with_stats = partial(call, row_stats=("entropy", "max_prob", "sum_sq"))
    return (
        {f"{s.kernel}, statistics": with_stats},
        {s.kernel: call},
        lambda: check_rows(with_stats()[0], q, k, v, gate, None),
    )


def _backward(s: Setup, tokens: int, gate_gradients: bool):
    q, k, v, motion = inputs(s, tokens // s.unit, grad=True)
    motion.requires_grad_(gate_gradients)
    grad = torch.randn(q.shape, device=s.device, dtype=s.dtype)

    def backward(out: Tensor, *leaves: Tensor) -> Variant:
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    names = ("q", "k", "v", "motion") if gate_gradients else ("q", "k", "v")
    gate = MotionGate.pairwise(motion)
    out = gate4d.gated_attention(q, k, v, gate=gate)
    peers = {}
    for name in ("flash", "cudnn"):
        try:
            peers[f"SDPA {name}"] = backward(sdpa(name, q, k, v), q, k, v)
        except RuntimeError:  # this torch has no such backend here
            continue

    def check() -> None:
        check_rows(out, q, k, v, gate, None)
        check_gradients(s, out, q, k, v, motion, names)

    return {default(q, k, v, gate=gate): backward(out, *((q, k, v, motion)[: len(names)]))}, peers, check


def _received(s: Setup, tokens: int, peer: str | None = None):
    """Against one forward pass, or against a peer that finds lse itself while here the forward pass has left it."""
    q, k, v, _ = inputs(s, tokens // s.unit)
    tokens = q.shape[2]
    _, aux = gate4d.gated_attention(q, k, v, return_aux=True)
    step = partial(gate4d.received_attention, q, k, aux.lse, over=("queries",))

    if peer is None:
        others: dict[str, Variant] = {"forward": partial(gate4d.gated_attention, q, k, v)}
    else:
        others = {peer: PEERS[peer].build(Inputs(q, k, v))}

    def check() -> None:
        got = step()
        keys = torch.randperm(tokens, device=q.device)[:32]
        p = (q.double() @ k[:, :, keys].double().mT * s.dim**-0.5 - aux.lse.double()[..., None]).exp()
        compare("the mean", got.mean[..., keys].to(q.dtype), p.mean(2), 4)
        compare("the variance", got.variance()[..., keys].to(q.dtype), p.var(2), 8)
        if peer is not None:
            compare(f"the mean of {peer}", others[peer]()[0][..., keys], p.mean(2), 4)

    return {DEFAULT: step}, others, check


def _reducers(s: Setup) -> list[str]:
    """Peers for the attention received that can run here."""
    return [p.name for p in PEERS.values() if p.needs_cuda and not p.reasons("received", s.device)]


def plan(s: Setup) -> list[Work]:
    """The measurements of G1 to G7, the most wanted first."""
    sizes = (16384, 32768, 65536, 131072)
    frames, wide = max(2, 64 // s.unit), replace(s, dim=2 * s.dim)
    return [
        *(Work(f"G1 forward N={n}", 1.0, partial(_forward, s, n), 10 + n / 4096) for n in sizes),
        *(Work(f"G2 forward N={n} / FlexAttention", 0.75, partial(_forward, s, n, peer="flex"), 60) for n in sizes[:2]),
        Work(f"G3 gate on / off, D={s.dim}", 1.15, partial(_forward, s, 32768, peer="self")),
        Work(f"G3 gate on / off, D={wide.dim}", 1.03, partial(_forward, wide, 32768, peer="self")),
        Work("G3 row statistics on / off", 1.20, partial(_stats, s, 32768)),
        Work("G4 backward", 1.1, partial(_backward, s, 16384, False)),
        Work("G4 backward with gate gradients", 1.2, partial(_backward, s, 16384, True)),
        *(Work(f"G5 {r:.0%} of keys dropped", 1.05 - r, partial(_forward, s, 32768, "drop", r)) for r in (0.3, 0.6)),
        Work("G5 gate on keys alone", None, partial(_forward, s, 32768, "keys")),
        Work("G6 frame-causal, 64 frames", 0.56, partial(_forward, s, 0, "none", frames=frames), 40),
        Work("G7 attention received / forward", 0.6, partial(_received, s, 32768)),
        *(Work(f"G7 received, given lse / {n}", None, partial(_received, s, 32768, n)) for n in _reducers(s)),
    ]
