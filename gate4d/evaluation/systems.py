"""The systems that ``gate4d eval`` compares: each turns the images of a clip into cameras, depth and a motion mask."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Batch
from ..geometry import decode_pose, invert
from ..handle import patch
from ..methods.clips import recurrent_views
from ..methods.rollout import recurrent_steps
from ..nn.control import standing_in
from ..statistics.gram import GramMap, GramRecipe
from ..visibility import Visibility

# VGGT4D's recipe speaks of 24 blocks. This one is for the four of the small alternating model: see .recipe.
SHALLOW = GramRecipe(
    {
        "S_deep": GramMap("qq", (2, 3), "std"),
        "S_mid": GramMap("qq", (0, 1), "std", inverted=True),
        "V_sh": GramMap("kk", (0,), "std", inverted=True),
    },
    window=(-3, -2, -1, 1, 2, 3),
)
MASKED_LAYERS = (0,)  # blocks of the small model whose dynamic keys VGGT4D drops: a fifth of them, as in VGGT


class Prediction(NamedTuple):
    """What a system says about a clip of T frames, in a unit of length of its own."""

    poses: np.ndarray  # fp64 [T, 4, 4], camera to world
    depth: np.ndarray  # [T, H, W], along the optical axis
    masks: np.ndarray | None  # bool [T, H, W]


@dataclass(frozen=True)
class System:
    """A row of the table.

    Attributes:
        group: heading above it.
        name: what it is.
        weights: which weights it needs: ``"alternating"``, ``"recurrent"``, ``"forced"`` and ``"unforced"`` (two
            trainings that differ in attention forcing alone) or, none, ``""``.
        run: model in eval mode and a batch of one clip to a :class:`Prediction`.
        causal: whether the first frames of a clip come out as they would alone.
        note: for the reader of the table.
    """

    group: str
    name: str
    weights: str
    run: Callable[[nn.Module, Batch], Prediction]
    causal: bool = False
    note: str = ""


def _prediction(out: dict[str, Tensor], pose_enc: Tensor | None = None, masks: Tensor | None = None) -> Prediction:
    """From outputs ``[1, T, ...]`` of a model over a clip; ``pose_enc`` and ``masks`` take the place of its own."""
    pose_enc = out["pose_enc"] if pose_enc is None else pose_enc
    masks = out["motion"][0] > 0 if masks is None else masks
    size = out["depth"].shape[2:4]
    poses = invert(decode_pose(pose_enc[0].double(), *size)[0])
    return Prediction(poses.cpu().numpy(), out["depth"][0, ..., 0].float().cpu().numpy(), masks.cpu().numpy())


def _nothing(model: None, clip: Batch) -> Prediction:
    """A camera that stands still, equal depth, no motion: what a figure is worth shows beside it."""
    frames, height, width = clip.depth.shape[1:]
    poses = np.tile(np.eye(4), (frames, 1, 1))
    return Prediction(poses, np.ones((frames, height, width)), np.zeros((frames, height, width), bool))


def _full(model: nn.Module, clip: Batch) -> Prediction:
    return _prediction(model(clip.images))


def _causal(model: nn.Module, clip: Batch, camera_pass: bool = False) -> Prediction:
    out = model(clip.images, causal=True, camera_pass=camera_pass)
    return _prediction(out, out["global_pose_enc"] if camera_pass else None)


def _token_causal(model: nn.Module, clip: Batch) -> Prediction:
    with token_causal(model, clip.images):
        return _prediction(model(clip.images, causal=True))


@contextmanager
def token_causal(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Makes global blocks causal over tokens, as in a language model, where they would be causal over frames."""
    layout = model.aggregator.layout(images)
    tokens = torch.arange(1, layout.num_tokens + 1)
    visible = Visibility.intervals(torch.zeros_like(tokens), tokens)
    with ExitStack() as stack:
        for block in model.aggregator.global_blocks:
            stack.enter_context(standing_in(block, "select", partial(_select, block, visible)))
        yield


def _select(block: nn.Module, tokens: Visibility, x: Tensor, pos: Tensor, **call: Any) -> Tensor:
    return type(block).select(block, x, pos, **{**call, "visible": tokens})


def _vggt4d(model: nn.Module, clip: Batch, recipe: GramRecipe = SHALLOW, second: bool = True) -> Prediction:
    """Both passes; cameras of the first one without ``second``."""
    with patch(model, method="vggt4d", recipe=recipe, masked_layers=MASKED_LAYERS if second else None) as handle:
        result = handle.run(clip.images)
    return _prediction(result.predictions, masks=result.masks.masks)


@torch.no_grad()
def early_masking(
    model: nn.Module, images: Tensor, masks: Tensor, layers: Collection[int] = MASKED_LAYERS
) -> dict[str, Tensor]:
    """VGGT4D's second pass with given masks: the model while its first blocks see no key of a dynamic patch.

    Args:
        images: ``[1, T, 3, H, W]``.
        masks: bool ``[T, H, W]``; a patch is dynamic if any of its pixels is. Special tokens stay.
    """
    with patch(model, method="vggt4d", recipe=SHALLOW, masked_layers=layers, refine=None) as handle:
        return handle.method.second_pass(images, masks)


def _masked(model: nn.Module, clip: Batch, true: bool = False) -> Prediction:
    """Cameras with early masking by the model's own masks or the true ones, everything else without it."""
    plain = model(clip.images)
    masks = clip.masks[0] if true else plain["motion"][0] > 0
    return _prediction(plain, early_masking(model, clip.images, masks)["pose_enc"], masks)


def _recurrent(model: nn.Module, clip: Batch, method: str | None = None, **options: Any) -> Prediction:
    if method is None:
        views = recurrent_views(clip.images[0], device=clip.images.device)
        steps = [prediction for prediction, _ in recurrent_steps(model, views)]
    else:
        with patch(model, method=method, **options) as handle:
            steps = handle.run(clip.images[0]).predictions
    return _prediction({name: torch.cat([s[name] for s in steps], 1) for name in ("pose_enc", "depth", "motion")})


def systems() -> list[System]:
    """All rows, in the order of the table."""
    clip, memory = "alternating model", "recurrent model"
    frozen = "untrained for it"
    rows = [
        System(clip, "nothing moves, depth is equal", "", _nothing, True, "no model"),
        System(clip, "full attention", "alternating", _full),
        System(clip, "MoRe, frame-causal", "alternating", _causal, True),
        System(clip, "MoRe + camera pass", "alternating", partial(_causal, camera_pass=True)),
        System(clip, "full, forced", "forced", _full),
        System(clip, "full, no forcing", "unforced", _full),
        System(clip, "MoRe, forced", "forced", _causal, True),
        System(clip, "MoRe, no forcing", "unforced", _causal, True),
        System(clip, "MoRe + camera pass, forced", "forced", partial(_causal, camera_pass=True)),
        System(clip, "MoRe + camera pass, no forcing", "unforced", partial(_causal, camera_pass=True)),
        System(clip, "MoRe, token-causal", "alternating", _token_causal, True, frozen),
        System(clip, "VGGT4D saliency, one pass", "alternating", partial(_vggt4d, second=False), note=frozen),
        System(clip, "VGGT4D, early masking", "alternating", _vggt4d, note=frozen),
        System(clip, "early masking, MoRe's masks", "alternating", _masked, note=frozen),
        System(clip, "early masking, true masks", "alternating", partial(_masked, true=True), note=frozen),
    ]
    mut3r = partial(_recurrent, method="mut3r", normalise="standardised")  # the paper's form
    rows += [
        System(memory, "CUT3R-style", "recurrent", _recurrent, True),
        System(memory, "TTT3R", "recurrent", partial(_recurrent, method="ttt3r"), True, frozen),
        System(memory, "MUT3R", "recurrent", mut3r, True, frozen),
    ]
    for name, directions in (
        ("MUT3R, self only", ("self",)), ("MUT3R, state only", ("state",)), ("MUT3R, image only", ("image",))
    ):  # fmt: skip
        rows.append(System(memory, name, "recurrent", partial(mut3r, directions=directions), True, frozen))
    rows.append(System(memory, "MUT3R, received attention", "recurrent", partial(mut3r, cue="received"), True, frozen))
    rows.append(System(memory, "MUT3R, strength 0.5", "recurrent", partial(mut3r, strength=0.5), True, frozen))
    return rows
