"""The CPU targets of the attention statistics: C9 to C11, each with its peak memory."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gate4d import GramRecipe, GramSaliency, TokenLayout, gated_attention, received_attention, state_confidence

from .. import peers
from ..check import Expected
from ..inputs import make_inputs
from ..measure import memory
from ..measure.resident import MIB
from ..models import DecoderPair
from ..peers import Step
from .contest import Contest
from .target import Conditions, TargetRow, target


def _peaks(s: Conditions, **setups: str) -> dict[str, int | str]:
    """Bytes beyond inputs and results of one call of each setup, in fresh processes."""
    peaks: dict[str, int | str] = {}
    for name, setup in setups.items():
        s.report(f"peak memory of {name}")
        arguments = {"heads": s.effort.heads, "frame_tokens": s.effort.frame_tokens}
        found = memory.peak_growth(f"{__name__}:{setup}", threads=s.threads, **arguments)
        peaks[name] = found["extra_bytes"]
    return peaks


def _conditions(heads: int | None, frame_tokens: int | None) -> Conditions:
    """The part of the conditions that a fresh process needs for the same sizes."""
    plain = Conditions()
    return replace(plain, effort=replace(plain.effort, heads=heads, frame_tokens=frame_tokens))


# C9


def received_step(heads: int | None = None, frame_tokens: int | None = None) -> Step:
    """Received attention on four VGGT frames; lse is computed beforehand."""
    x = make_inputs(_conditions(heads, frame_tokens).shape("vggt.global"), 4)
    _, aux = gated_attention(x.q, x.k, x.v, return_aux=True)

    def step() -> tuple[Tensor, ...]:
        m = received_attention(x.q, x.k, aux.lse)
        return m.mean, m.variance()

    return step


@target("C9", "attention received per key / one forward")
@torch.no_grad()
def attention_received(s: Conditions) -> list[TargetRow]:
    """Mean and variance per key of the probabilities, given lse, against one attention forward of the same shape."""
    x = make_inputs(s.shape("vggt.global"), 4)
    q, k = x.q.double(), x.k.double()
    lse = torch.stack([(q[:, h] @ k[:, h].mT * q.shape[3] ** -0.5).logsumexp(-1) for h in range(q.shape[1])], dim=1)
    truth, plain = (
        received_attention(a, b, lse, backend="chunked") for a, b in ((q, k), (x.q, x.k))
    )  # plain torch in fp32 is the yardstick
    names = ("mean", "variance")
    expected = Expected(names, (truth.mean, truth.variance()), (plain.mean, plain.variance()), q.shape[2])
    contest = Contest(s, "C9")
    contest.enter("received", lambda: received_step(s.effort.heads, s.effort.frame_tokens), expected)
    out = F.scaled_dot_product_attention(x.q, x.k, x.v)
    forward = Expected(("out",), (out.double(),), (out,), k.shape[2])
    contest.enter("forward", lambda: peers.gate4d_forward(x, backend=s.backend), forward, peer=True)
    contest.enter("SDPA", lambda: peers.sdpa(x), forward, peer=True)
    _, heads, tokens, dim = x.q.shape
    note = f"H = {heads}, N = {tokens}, D = {dim}, float32, given lse"
    row = contest.row(
        contest.run(), "C9", "attention received / one forward", "received", "forward", 0.75, note, "SDPA"
    )
    row.peak_memory = _peaks(s, received="received_step")
    each = row.peak_memory["received"] / s.threads / MIB
    return [row, TargetRow("C9", "memory, attention received", each, 16.0, "MiB", note=f"{note}; {s.threads} threads")]


# C10

_FRAMES = 13


def _clip(heads: int | None, frame_tokens: int | None) -> tuple[Tensor, Tensor, TokenLayout]:
    """One layer's q and k of a clip; every layer is fed the same ones, and they are not counted as memory."""
    shape = _conditions(heads, frame_tokens).shape("vggt.global")
    x = make_inputs(shape, _FRAMES)
    return x.q + 0.5, x.k + 0.5, shape.layout(_FRAMES)


def saliency_step(heads: int | None = None, frame_tokens: int | None = None) -> Step:
    """VGGT4D's five raw maps of the middle frame, out of the whole clip done online."""
    q, k, layout = _clip(heads, frame_tokens)

    def step() -> tuple[Tensor, ...]:
        saliency = GramSaliency("vggt4d", layout=layout)
        for layer in range(24):
            saliency.observe(layer, q, k)
        raw = saliency.finalize().raw
        return tuple(raw[name][:, _FRAMES // 2].clone() for name in saliency.recipe.maps)

    return step


def materialised_saliency_step(heads: int | None = None, frame_tokens: int | None = None) -> Step:
    """The same maps of the middle frame, from the products of all (source frame, layer, head)."""
    q, k, layout = _clip(heads, frame_tokens)
    middle, recipe = _FRAMES // 2, GramRecipe.vggt4d()
    sources = [middle + w for w in recipe.window]
    q, k = (layout.patch_tokens(x, 2).unflatten(2, (_FRAMES, -1))[0] for x in (q, k))

    def step() -> tuple[Tensor, ...]:
        maps = []
        for m in recipe.maps.values():
            x, y = (q if side == "q" else k for side in m.product)  # [H, T, P, D]
            x = x[:, middle].expand(len(m.layers), *x[:, middle].shape)  # [L, H, P, D], as the authors' stack
            y = y[:, sources].expand(len(m.layers), -1, -1, -1, -1)  # [L, H, S, P, D]
            products = torch.einsum("lhid,lhsjd->slhij", x, y)
            inner = products.mean((0, 1, 2))
            maps.append((inner.mean(-1) if m.statistic == "mean" else inner.std(-1))[None])
        return tuple(maps)

    return step


def _truth(s: Conditions) -> tuple[Tensor, ...]:
    """The middle frame's maps in float64, one product at a time."""
    q, k, layout = _clip(s.effort.heads, s.effort.frame_tokens)
    q, k = (layout.patch_tokens(x, 2).unflatten(2, (_FRAMES, -1))[0].double() for x in (q, k))
    middle, maps, inner = _FRAMES // 2, [], {}
    recipe = GramRecipe.vggt4d()
    for m in recipe.maps.values():
        if m.product not in inner:  # layers hold the same features here
            x, y = (q if side == "q" else k for side in m.product)
            products = [x[h, middle] @ y[h, middle + w].mT for h in range(len(x)) for w in recipe.window]
            inner[m.product] = sum(products) / len(products)
        z = inner[m.product]
        maps.append((z.mean(-1) if m.statistic == "mean" else z.std(-1))[None])
    return tuple(maps)


@target("C10", "VGGT4D saliency online / from materialised maps")
@torch.no_grad()
def gram_saliency(s: Conditions) -> list[TargetRow]:
    """The whole clip online, against the products of one frame, times the number of (frame, source frame) pairs."""
    recipe = GramRecipe.vggt4d()
    pairs = sum(0 <= t + w < _FRAMES for t in range(_FRAMES) for w in recipe.window)
    clip = pairs / len(recipe.window)  # middle frames' worth of work in the clip
    sizes = (s.effort.heads, s.effort.frame_tokens)
    contest = Contest(s, "C10")
    materialised = materialised_saliency_step(*sizes)
    expected = Expected(tuple(recipe.maps), _truth(s), materialised(), s.shape("vggt.global").keys)
    contest.enter("online", lambda: saliency_step(*sizes), expected)
    contest.enter("maps of one frame", lambda: materialised, expected)
    timed = contest.run()
    shape = s.shape("vggt.global")
    note = (
        f"{_FRAMES} frames x {shape.keys - shape.special} patches, H = {shape.heads}; the maps of the middle frame "
        f"were measured and count {clip:.1f} times (the clip has {pairs} pairs of frames, that frame 6)"
    )
    row = contest.row(timed, "C10", "saliency online / maps, time", "online", "maps of one frame", 0.01, note)
    row.ratio, row.spread = row.ratio / clip, row.spread / clip
    peaks = _peaks(s, online="saliency_step", maps="materialised_saliency_step")
    row.peak_memory = peaks
    held = f"{note}; q and k of all blocks, which the maps need at once and the online sums do not, are left out"
    ratio = peaks["online"] / peaks["maps"]
    return [row, TargetRow("C10", "saliency online / maps, memory", ratio, 0.05, peak_memory=peaks, note=held)]


# C11

_WIDTH = 768


def _depth(heads: int | None) -> int:
    """Layers of the decoder; with less effort fewer, which leaves the share the same."""
    return 12 if heads is None else 1


def _decoder_step(depth: int) -> tuple[Step, list[Tensor], list[Tensor]]:
    """A CUT3R decoder step with random weights, and the state's cross-attention q and k of all its layers."""
    decoder = DecoderPair((12, 16), _WIDTH, depth)
    image, state = torch.randn(1, 577, _WIDTH), torch.randn(1, 768, _WIDTH)

    @torch.no_grad()
    def step() -> tuple[Tensor, ...]:
        features: list[tuple[Tensor, Tensor]] = []

        def attend(branch: int, layer: int, kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if (branch, kind) == (1, "cross"):
                features.append((q, k))
            return F.scaled_dot_product_attention(q, k, v)

        x, z = decoder(image, state, attend)
        qs, ks = zip(*features, strict=True)
        return x, z, *qs, *ks

    _, _, *features = step()
    return step, features[:depth], features[depth:]


def confidence_step(heads: int | None = None, frame_tokens: int | None = None) -> Step:
    """TTT3R's beta from the features of all layers."""
    _, q, k = _decoder_step(_depth(heads))
    return torch.no_grad()(lambda: (state_confidence(q, k),))


def materialised_confidence_step(heads: int | None = None, frame_tokens: int | None = None) -> Step:
    """The same from the logit maps of all layers, kept until the last, as the authors' code keeps them."""
    _, q, k = _decoder_step(_depth(heads))
    return torch.no_grad()(
        lambda: (
            torch.stack([a @ b.mT * (_WIDTH / 16) ** -0.5 for a, b in zip(q, k, strict=True)])
            .mean((0, 2, 4))
            .sigmoid(),
        )
    )


@target("C11", "TTT3R state update cue / decoder step")
@torch.no_grad()
def state_update_cue(s: Conditions) -> list[TargetRow]:
    """The closed-form cue against a decoder step of CUT3R's size: 577 image and 768 state tokens, 12 + 12 layers."""
    depth = _depth(s.effort.heads)
    decoder, q, k = _decoder_step(depth)
    logits = (
        sum((a.double() @ b.double().mT).mean((1, 3)) for a, b in zip(q, k, strict=True))
        * (_WIDTH / 16) ** -0.5
        / depth
    )
    yardstick = sum((a @ b.mT).mean((1, 3)) for a, b in zip(q, k, strict=True)) * (_WIDTH / 16) ** -0.5 / depth
    expected = Expected(("beta",), (logits.sigmoid(),), (yardstick.sigmoid(),), 577 * 16)
    contest = Contest(s, "C11")
    contest.enter("cue", lambda: lambda: (state_confidence(q, k),), expected)
    x, z, *_ = decoder()
    tokens = Expected(("image", "state"), (x.double(), z.double()), (x, z), _WIDTH)
    contest.enter("decoder step", lambda: lambda: decoder()[:2], tokens, peer=True)
    note = f"768 state x 577 image tokens, 16 x 48, {depth} layers; decoder of the true size with random weights"
    row = contest.row(contest.run(), "C11", "TTT3R cue / decoder step", "cue", "decoder step", 0.02, note)
    row.peak_memory = _peaks(s, cue="confidence_step", maps="materialised_confidence_step")
    return [row]
