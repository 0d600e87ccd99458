"""The five systems: what each adds to its plain backbone, done as its authors do it and with gate4d, in one run.

"Authors' way" is written from the systems' formulas: attention maps, or the features of all layers, are kept and
reduced afterwards, gates are matrices, masked keys are gathered item by item. MUT3R and MoRe have no public code; for
them it is what their papers write. Backbones have random weights. Each variant's results are compared with the
authors' way in float64 before it is timed; memory is measured in a fresh process a variant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import gate4d
from gate4d import GramMap, GramRecipe, MotionGate, TokenLayout, Visibility, gated_attention
from gate4d.methods.losses import attention_forcing
from gate4d.methods.segmentation import dynamic_masks, patch_masks
from gate4d.statistics.cues import raw_cue, standardised
from gate4d.statistics.gram import minmax
from gate4d.statistics.logits import mean_logits

from ..check import Expected
from ..measure import memory
from ..measure.resident import MIB
from ..models import SPECIAL_TOKENS, DecoderAttend, DecoderPair, Vggt, VggtAttention
from ..peers import Step
from .contest import Contest
from .target import Conditions, TargetRow, target

PLAIN, AUTHORS, OURS = "plain", "authors' way", "gate4d"


@dataclass(frozen=True)
class Size:
    """Of the decoders depth, width (heads of 64, the state's of 48), image tokens; of VGGT heads of 64 and patches."""

    depth: int = 12
    width: int = 768
    tokens: int = 577
    heads: int = 8
    grid: tuple[int, int] = (28, 37)

    @property
    def state(self) -> int:
        """State tokens; 768 for 577 of the image."""
        return (self.tokens - 1) * 4 // 3

    @classmethod
    def of(cls, s: Conditions) -> Size:
        """The models' own for the full effort, but for VGGT's width, which is halved."""
        if s.effort.heads is None:
            return cls()
        small = s.effort.frame_tokens is not None  # only tests
        return cls(2, 192, 33, 2, (4, 5)) if small else cls(2, heads=2, grid=(14, 18))


# Attention of the decoders: plain, with maps kept, with gate4d.


def _sdpa(branch: int, layer: int, kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _maps(kept: dict, change: Callable[..., tuple[Tensor | None, Tensor | None]] | None = None) -> DecoderAttend:
    """Logits of all layers kept as copies; ``change(branch, layer, kind)`` gives a bias, and what is zeroed."""

    def attend(branch: int, layer: int, kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.mT * q.shape[-1] ** -0.5
        kept[branch, layer, kind] = logits.clone()
        bias, zeroed = (None, None) if change is None else change(branch, layer, kind)
        p = (logits if bias is None else logits + bias).softmax(-1)
        return (p if zeroed is None else p.masked_fill(zeroed, 0.0)) @ v

    return attend


def _gated(watch: Callable | None = None, gate: Callable[..., MotionGate | None] = lambda *_: None) -> DecoderAttend:
    def attend(branch: int, layer: int, kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if watch is not None:
            watch(branch, layer, kind, q, k)
        return gated_attention(q, k, v, gate=gate(branch, layer, kind))

    return attend


def _inputs(size: Size, dtype: torch.dtype, first: int, second: int, second_heads: int):
    """A decoder and the tokens of its two branches."""
    decoder = DecoderPair((size.width // 64, second_heads), size.width, size.depth).to(dtype).eval()
    g = torch.Generator().manual_seed(1)
    return decoder, *(torch.randn(1, n, size.width, generator=g).to(dtype) for n in (first, second))


def _cut3r(size: Size, dtype: torch.dtype):
    """Image branch and state branch, whose heads are narrower."""
    return _inputs(size, dtype, size.tokens, size.state, size.width // 48)


def ttt3r(size: Size, dtype: torch.dtype = torch.float32) -> dict[str, Step]:
    """A decoder step of CUT3R and the update of its state; both branches' tokens are returned."""
    decoder, image, state = _cut3r(size, dtype)

    def update(new: Tensor, mean: Tensor) -> Tensor:
        rate = mean.sigmoid()[..., None]
        return rate * new + (1 - rate) * state

    def authors() -> tuple[Tensor, ...]:
        kept: dict = {}  # of all four attentions of a layer, as their loop asks for
        x, new = decoder(image, state, _maps(kept))
        logits = torch.stack([kept[1, n, "cross"] for n in range(size.depth)])
        return x, update(new, logits.mean((0, 2, 4)))

    def ours() -> tuple[Tensor, ...]:
        means: list[Tensor] = []

        def watch(branch: int, layer: int, kind: str, q: Tensor, k: Tensor) -> None:
            if branch == 1 and kind == "cross":
                means.append(mean_logits(q, k, over=("heads", "keys")))

        x, new = decoder(image, state, _gated(watch))
        return x, update(new, torch.stack(means).mean(0))

    return {PLAIN: lambda: decoder(image, state, _sdpa), AUTHORS: authors, OURS: ours}


def mut3r(size: Size, dtype: torch.dtype = torch.float32) -> dict[str, Step]:
    """The decoders watched, then gated in the first layers in all three directions; scores and tokens are returned."""
    decoder, image, state = _cut3r(size, dtype)
    layers = range(7)

    def authors() -> tuple[Tensor, ...]:
        kept: dict = {}
        decoder(image, state, _maps(kept))
        raw = torch.stack([kept[0, n, "self"].mean((1, 3)) for n in range(size.depth)]).mean(0)
        score = F.pad(standardised(-raw[:, 1:]), (1, 0))
        biases = {
            (0, "self"): torch.log(1 - (1 - score)[:, None, :, None] * score[:, None, None]),
            (1, "cross"): torch.log(1 - score)[:, None, None],
        }
        biased = _maps({}, lambda branch, layer, kind: (biases.get((branch, kind)) if layer in layers else None, None))

        def attend(branch: int, layer: int, kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = biased(branch, layer, kind, q, k, v)
            received = layer in layers and (branch, kind) == (0, "cross")
            return out * (1 - score)[:, None, :, None] if received else out

        return score, *decoder(image, state, attend)

    def ours() -> tuple[Tensor, ...]:
        cues: list[Tensor] = []

        def watch(branch: int, layer: int, kind: str, q: Tensor, k: Tensor) -> None:
            if branch == 0 and kind == "self":
                cues.append(raw_cue(q, k, "logit_mean", None, None))

        decoder(image, state, _gated(watch))
        score = F.pad(standardised(-torch.stack(cues).mean(0)[:, 1:]), (1, 0))
        gates = {
            (0, "self"): MotionGate.pairwise(score),
            (1, "cross"): MotionGate.keys(score),
            (0, "cross"): MotionGate.queries(score),
        }
        gate = _gated(gate=lambda branch, layer, kind: gates.get((branch, kind)) if layer in layers else None)
        return score, *decoder(image, state, gate)

    return {PLAIN: lambda: decoder(image, state, _sdpa), AUTHORS: authors, OURS: ours}


def easi3r(size: Size, dtype: torch.dtype = torch.float32) -> dict[str, Step]:
    """A pair of DUSt3R in both passes, its masks given: the channels of the maps, and the second pass's tokens."""
    tokens = size.tokens - 1
    decoder, one, two = _inputs(size, dtype, tokens, tokens, size.width // 64)
    dynamic = torch.rand(2, tokens, generator=torch.Generator().manual_seed(2)) < 0.3
    blocked = ~dynamic[:1, :, None] & dynamic[1:, None, :]

    def authors() -> tuple[Tensor, ...]:
        kept: dict = {}
        decoder(one, two, _maps(kept))
        channels = [torch.cat([kept[b, n, "cross"].mean(2) for n in range(size.depth)], 1) for b in (0, 1)]
        first = {(0, "cross"): blocked[:, None]}
        again: dict = {}  # their second pass keeps the maps as well
        return *channels, *decoder(one, two, _maps(again, lambda b, layer, kind: (None, first.get((b, kind)))))

    def ours() -> tuple[Tensor, ...]:
        channels: tuple[list[Tensor], ...] = ([], [])

        def watch(branch: int, layer: int, kind: str, q: Tensor, k: Tensor) -> None:
            if kind == "cross":
                channels[branch].append(mean_logits(q, k, over=("queries",)))

        decoder(one, two, _gated(watch))
        gate = MotionGate.static_to_dynamic(dynamic[:1], dynamic[1:])
        again = _gated(gate=lambda b, layer, kind: gate if (b, kind) == (0, "cross") else None)
        return *(torch.cat(c, 1) for c in channels), *decoder(one, two, again)

    return {PLAIN: lambda: decoder(one, two, _sdpa), AUTHORS: authors, OURS: ours}


# VGGT4D, as a method on a whole model.

_SHALLOW = GramRecipe(  # VGGT4D's maps on four global blocks
    {
        "S_mid": GramMap("qq", (1, 2), "mean", inverted=True), "V_deep": GramMap("qq", (2, 3), "std", inverted=True),
        "S_deep": GramMap("qq", (2, 3), "mean"), "S_sh": GramMap("kk", (0,), "mean", inverted=True),
        "V_sh": GramMap("qk", (0,), "std"),
    },
    (-1, 1),
)  # fmt: skip
_MASKED = range(2)


def vggt4d(size: Size, dtype: torch.dtype = torch.float32) -> dict[str, Step]:
    """Four frames through a model of VGGT's shape: the saliency, and the cameras of the second pass."""
    _load_libraries()
    model, own = (Vggt(64 * size.heads, size.heads, 4).to(dtype).eval() for _ in range(2))  # own stays patched
    side = model.aggregator.patch_size
    pixels = [n * side for n in size.grid]
    images = torch.rand(4, 3, *pixels, generator=torch.Generator().manual_seed(1)).to(dtype)

    handle = gate4d.patch(own, method="vggt4d", recipe=_SHALLOW, masked_layers=_MASKED, refine=None)

    def ours() -> tuple[Tensor, ...]:
        result = handle.run(images)
        return result.saliency.dyn[0], result.predictions["pose_enc"]

    return {
        PLAIN: lambda: (model(images[None])["pose_enc"],),
        AUTHORS: partial(_authors_vggt4d, model, images, size.grid),
        OURS: ours,
    }


def _load_libraries() -> None:
    """What clustering, thresholds and refinement import: its code is not memory of a call."""
    import sklearn.cluster  # noqa: F401


def _authors_vggt4d(model: Vggt, images: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
    frames, blocks = len(images), model.aggregator
    attentions = {
        (role, n): block.attn
        for role in ("frame", "global")
        for n, block in enumerate(getattr(blocks, f"{role}_blocks"))
    }

    def run(dynamic: Tensor | None) -> tuple[Tensor, dict]:
        features: dict = {}

        def forward(module: VggtAttention, key: tuple[str, int], x: Tensor, pos: Tensor) -> Tensor:
            q, k, v = module.features(x, pos)
            features[key] = q.clone(), k.clone()  # of all blocks, before anything is reduced
            if dynamic is None or key[1] not in _MASKED:
                return module.finish(F.scaled_dot_product_attention(q, k, v))
            keep = ~F.pad(dynamic, (SPECIAL_TOKENS, 0))
            items = zip(q, k, v, keep if key[0] == "frame" else keep.flatten()[None], strict=True)
            return module.finish(
                torch.stack([F.scaled_dot_product_attention(a, b[:, m], c[:, m]) for a, b, c, m in items])
            )

        for key, module in attentions.items():
            module.forward = lambda x, pos=None, module=module, key=key: forward(module, key, x, pos)
        try:
            return model(images[None])["pose_enc"], features
        finally:
            for module in attentions.values():
                del module.forward

    encoded: list[Tensor] = []
    hook = blocks.patch_embed.register_forward_hook(lambda module, args, out: encoded.append(out[0]))
    _, features = run(None)
    hook.remove()
    patches = {
        n: [x.unflatten(2, (frames, -1))[0, :, :, SPECIAL_TOKENS:].transpose(0, 1) for x in features["global", n]]
        for n in range(len(blocks.global_blocks))
    }  # [T, H, P, D]
    dyn = []
    for t in range(frames):
        factors = []
        for m in _SHALLOW.maps.values():
            a, b = ("qk".index(side) for side in m.product)
            sources = [t + w for w in _SHALLOW.window if 0 <= t + w < frames]
            products = torch.stack([patches[n][a][t][None] @ patches[n][b][sources].mT for n in m.layers])
            inner = products.mean((0, 1, 2))  # over layers, source frames and heads: [P, P]
            found = minmax(inner.mean(-1) if m.statistic == "mean" else inner.std(-1), _SHALLOW.eps)
            factors.append(1 - found if m.inverted else found)
        dyn.append(minmax(torch.stack(factors).prod(0), _SHALLOW.eps))
    saliency = torch.stack(dyn)
    masks = dynamic_masks(saliency, encoded[0], grid, tuple(images.shape[-2:]))
    pose, _ = run(patch_masks(masks.masks, grid))
    return saliency, pose


# MoRe, one global block in training.


def more(size: Size, dtype: torch.dtype = torch.float32) -> dict[str, Step]:
    """Frame-causal attention of four frames with the loss on the camera's attention: loss and gradients."""
    patches, g = size.grid[0] * size.grid[1], torch.Generator().manual_seed(1)
    layout = TokenLayout(4, SPECIAL_TOKENS + patches, SPECIAL_TOKENS)
    visible = Visibility.frame_causal(layout)
    shape = (1, size.heads, layout.num_tokens, 64)
    q, k, v = (torch.randn(shape, generator=g).to(dtype).requires_grad_() for _ in range(3))
    grad_out = torch.randn(shape, generator=g).to(dtype)
    static = torch.rand(1, 4, patches, generator=g).to(dtype)
    threshold = 0.3

    def gradients(out: Tensor, loss: Tensor | None) -> tuple[Tensor, ...]:
        total = (out * grad_out).sum() + (
            0 if loss is None else 1e3 * loss
        )  # as large as the rest, so that it is checked
        found = torch.autograd.grad(total, (q, k, v))
        return found if loss is None else (loss.detach()[None], *found)

    def dense() -> Tensor:
        return visible.dense(layout.num_tokens, layout.num_tokens)[:, None]

    def plain() -> tuple[Tensor, ...]:
        return gradients(F.scaled_dot_product_attention(q, k, v, attn_mask=dense()), None)

    def authors() -> tuple[Tensor, ...]:
        logits = (q @ k.mT * 64**-0.5).masked_fill(~dense(), -torch.inf)
        maps = logits.softmax(-1)
        cameras = torch.tensor(layout.offsets[:-1])
        cost = layout.token_scores((1 - static - threshold).relu()).to(dtype)
        seen = (layout.is_patch()[None] & dense()[0, 0, cameras]).sum(-1)
        loss = ((maps[:, :, cameras] * cost[:, None, None]).sum(-1) / seen).mean()
        return gradients(maps @ v, loss)

    def ours() -> tuple[Tensor, ...]:
        hinge = {"form": "score hinge", "threshold": threshold}
        loss = attention_forcing(q, k, static, layout=layout, visible=visible, **hinge)
        return gradients(gated_attention(q, k, v, visible=visible), loss)

    return {PLAIN: torch.enable_grad()(plain), AUTHORS: torch.enable_grad()(authors), OURS: torch.enable_grad()(ours)}


SYSTEMS = {
    "S1": ("TTT3R", ttt3r, ("image", "state")),
    "S2": ("MUT3R", mut3r, ("score", "image", "state")),
    "S3": ("Easi3R", easi3r, ("channels i", "channels j", "view 1", "view 2")),
    "S4": ("VGGT4D", vggt4d, ("saliency", "cameras")),
    "S5": ("MoRe", more, ("loss", "dq", "dk", "dv")),
}


def system_step(system: str, variant: str, **size) -> Step:
    """One variant, for a fresh process."""
    steps = SYSTEMS[system][1](Size(**size))
    return torch.no_grad()(steps[variant]) if system != "S5" else steps[variant]


def _measure(s: Conditions, id: str) -> list[TargetRow]:
    name, build, names = SYSTEMS[id]
    size = Size.of(s)
    s = replace(s, effort=replace(s.effort, min_rounds=min(3, s.effort.min_rounds)))  # a call takes seconds
    contest, steps, exact = Contest(s, id), build(size), build(size, torch.float64)
    s.report(f"{id}: {name} in float64")
    truth, yardstick = exact[AUTHORS](), steps[AUTHORS]()
    contest.enter(OURS, lambda: steps[OURS], Expected(names, truth, yardstick, 1))
    contest.enter(AUTHORS, lambda: steps[AUTHORS], Expected(names, truth, yardstick, 1))
    plain = exact[PLAIN]()
    contest.enter(PLAIN, lambda: steps[PLAIN], Expected(("plain",) * len(plain), plain, steps[PLAIN](), 1))
    timed = contest.run()
    row = contest.row(timed, id, f"{name}: time, gate4d / authors' way", OURS, AUTHORS, None, "", PLAIN)
    over = {v: timed.ratio(v, PLAIN).median - 1 for v in (AUTHORS, OURS)}
    row.note = "; ".join(
        [
            f"over plain: authors' way {over[AUTHORS]:+.1%}, gate4d {over[OURS]:+.1%}",
            _about(id, size),
            *timed.warnings(),
        ]
    )
    row.peers = {}
    peaks = {}
    for variant in (PLAIN, AUTHORS, OURS):
        s.report(f"{id}: memory of {variant}")
        arguments = {"system": id, "variant": variant, **asdict(size)}
        found = memory.peak_growth(f"{__name__}:system_step", threads=s.threads, **arguments)
        peaks[variant] = found["extra_bytes"] + found["result_bytes"]
    more_than = {v: max(0, peaks[v] - peaks[PLAIN]) for v in (AUTHORS, OURS)}
    ratio = more_than[OURS] / max(1, more_than[AUTHORS])
    note = f"over plain: authors' way {_mib(more_than[AUTHORS])}, gate4d {_mib(more_than[OURS])}"
    return [row, TargetRow(id, f"{name}: extra memory, same ratio", ratio, peak_memory=peaks, note=note)]


def _mib(size: int) -> str:
    return f"{size / MIB:+.1f} MiB"


def _about(id: str, size: Size) -> str:
    clip = f"4 frames of {size.grid[0] * size.grid[1] + SPECIAL_TOKENS} tokens, {size.heads} heads"
    decoder = f"{size.depth} layers of width {size.width}, {size.state} state and {size.tokens} image tokens"
    return {
        "S1": decoder,
        "S2": f"{decoder}, two decoder runs",
        "S3": f"{size.depth} layers of width {size.width} a view, a pair of {size.tokens - 1} tokens, two passes",
        "S4": f"{clip}, 4 + 4 blocks, two passes and the clustering",
        "S5": f"{clip}, one block, forward and backward",
    }[id]


def _register(id: str) -> None:
    what = f"{SYSTEMS[id][0]}: extra work over the plain backbone, gate4d / authors' way"
    target(id, what)(torch.no_grad()(partial(_measure, id=id)))


for _id in SYSTEMS:
    _register(_id)


# VGGT4D on a long clip.


def long_clip_step(variant: str, frames: int, grid: int) -> Step:
    """A clip through 24 + 24 blocks of VGGT's shape, width 64."""
    _load_libraries()
    model = Vggt(64, 1, 24).eval()
    side = grid * model.aggregator.patch_size
    images = torch.rand(frames, 3, side, side, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def step() -> tuple[Tensor, ...]:
        if variant == PLAIN:
            return tuple(model(images[None]).values())
        with gate4d.patch(model, method="vggt4d", refine_options={"views": 8}) as handle:
            result = handle.run(images)
        return (*result.predictions.values(), result.masks.masks, result.refined_masks)

    return step


@target("S6", "VGGT4D's peak memory on 500 frames / plain VGGT's")
def long_clip(s: Conditions) -> list[TargetRow]:
    """Both passes, masks and refinement against the unpatched model; peaks with all results, in fresh processes."""
    frames, grid = (500, 6) if s.effort.heads is None else (60, 4) if s.effort.frame_tokens is None else (12, 3)
    peaks = {}
    for variant in (PLAIN, OURS):
        s.report(f"S6: memory of {variant}, {frames} frames")
        arguments = {"variant": variant, "frames": frames, "grid": grid}
        found = memory.peak_growth(f"{__name__}:long_clip_step", threads=s.threads, **arguments)
        peaks[variant] = found["extra_bytes"] + found["result_bytes"]
    note = f"{frames} frames of {grid**2 + SPECIAL_TOKENS} tokens, 24 + 24 blocks, width 64"
    what = f"VGGT4D, {frames} frames: peak / plain"
    limit = 1.10 if frames == 500 else None
    return [TargetRow("S6", what, peaks[OURS] / peaks[PLAIN], limit, peak_memory=peaks, note=note)]
