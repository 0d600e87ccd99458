"""Easi3R on DUSt3R and MonST3R: dynamic masks from cross-attention of image pairs, then the pairs again under them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..gates import MotionGate
from ..integrations.table import AttentionTable, require_family, require_parts
from ..nn.control import gating, observing, standing_in
from ..statistics.pairs import PairMaps, PairSaliency
from .clips import clip_images, patch_size
from .method import ClipMethod, ClipResult
from .segmentation import DynamicMasks, dynamic_masks, patch_masks

Pair = tuple[int, int]
LONG = 95  # frames, above which the authors' evaluation takes a smaller window


class Easi3rPass(NamedTuple):
    """One pass over all pairs.

    Attributes:
        predictions: what the model returns for a pair, ``(of view 1, of view 2)``, or what ``keep`` made of it; in the
            order of the pairs.
        maps: the :class:`gate4d.PairMaps` of the pass, ``[T, h, w]``; ``dyn`` is A_dyn.
        masks: the :class:`~gate4d.methods.segmentation.DynamicMasks` that follow from them.
    """

    predictions: list[Any]
    maps: PairMaps
    masks: DynamicMasks


@dataclass(frozen=True)
class Easi3rResult(ClipResult):
    """What :meth:`Easi3r.run` returns: ``predictions`` of pairs, not of frames.

    Attributes:
        predictions, maps, masks: of the second pass; its masks are what the authors' demo writes.
        first: the first pass, whose masks gate the second.
        pairs: ``(first image, second image)`` of every prediction.
    """

    maps: PairMaps
    first: Easi3rPass
    pairs: list[Pair]

    def by_frame(self) -> list[Any]:
        return []


class Easi3r(ClipMethod):
    """Easi3R's two passes over the pairs of a sliding window.

    In the first pass :class:`gate4d.PairSaliency` watches the cross-attention of both decoders; its A_dyn becomes
    masks by :func:`~gate4d.methods.segmentation.dynamic_masks`. In the second pass static tokens of a pair's first
    image lose the attention they paid to dynamic tokens of the second, after the softmax and without dividing again,
    in all layers of the view-1 decoder's cross-attention and nowhere else. A token is dynamic if any pixel of its patch
    is. Every image is encoded once: the encoder does not depend on the masks. The model's own decoders and heads run,
    so its predictions have the model's form. Works on DUSt3R, MonST3R and on the authors' fork of them.

    Args:
        pair_window: a frame is paired with as many frames after it. None is the authors' choice: 5, and 4 for clips of
            more than 95 frames.
        pair_stride: distance between these frames, of which the first is the next one. None is the authors' choice, 2
            (their scene graph ``swinstride-5-noncyclic``: 1, 3, 5, 7 and 9 frames later); of three frames, for which
            theirs leaves images in one pair alone, it is 1.
        symmetric: every pair in both orders. Without it, ``cyclic`` is needed, because the first frame would never be
            a pair's second image.
        cyclic: the window goes around from the last frame to the first.
        clusters, engine, seed: of the k-means.
        features: what is clustered: None for the encoder's features, or a function from the images
            ``[T, 3, H, W]`` in [0, 1] to one vector a token, ``[T, h * w, C]``.
        batch: pairs (and, in the encoder, images) that run at once.
        keep: called as ``keep(view 1, view 2)`` with the predictions of a pair; what it returns is kept instead, so
            that long clips need not hold every point map twice.
    """

    def __init__(
        self,
        model: nn.Module,
        table: AttentionTable,
        *,
        pair_window: int | None = None,
        pair_stride: int | None = None,
        symmetric: bool = True,
        cyclic: bool = False,
        clusters: int = 64,
        engine: str = "auto",
        seed: int = 0,
        features: Callable[[Tensor], Tensor] | None = None,
        batch: int = 1,
        keep: Callable[[dict, dict], Any] | None = None,
    ):
        rows = [r for r in table.select("decoder cross") if _decoder(r.name)]
        require_family("easi3r", rows or table, "croco", "easi3r")
        require_parts("easi3r", model, ("patch_embed", "dec_blocks2", "_encode_image", "_encode_symmetrized"))
        for name, value in (("pair_window", pair_window), ("pair_stride", pair_stride), ("batch", batch)):
            if value is None and name != "batch":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an int >= 1{'' if name == 'batch' else ' or None'}, got {value!r}.")
        if not symmetric and not cyclic:
            raise ValueError(
                "symmetric=False needs cyclic=True: else the first frame is never the second image of a pair."
            )
        if features is not None and not callable(features):
            raise TypeError(f"features must be None or a function of the images, got {type(features).__name__}.")
        self.model = model
        self.rows = {number: {r.layer: r for r in rows if _decoder(r.name) == number} for number in (1, 2)}
        self.window, self.stride = pair_window, pair_stride
        self.pairing = {"symmetric": symmetric, "cyclic": cyclic}
        self.clustering = {"clusters": clusters, "engine": engine, "seed": seed}
        self.features, self.batch, self.keep = features, batch, keep or (lambda one, two: (one, two))

    @torch.no_grad()
    def run(self, frames: Any) -> Easi3rResult:
        """Both passes.

        Args:
            frames: one clip, images ``[T, 3, H, W]`` or ``[1, T, 3, H, W]`` in [0, 1], or a sequence of images
                ``[3, H, W]``; the sides are multiples of the patch size, 16.

        Raises:
            ValueError, TypeError: frames differ in size, do not divide into patches, or are so few that some image
                takes part in fewer than two pairs (fewer than three frames, or a pair_window of 1).
            ImportError: an extra is missing; names it.
        """
        patch = patch_size(self.model)
        images = clip_images(frames, patch, device=next(self.model.parameters()).device)[0]
        size, count = tuple(images.shape[-2:]), len(images)
        grid = size[0] // patch, size[1] // patch
        pairs = self.pairs(count)
        if count < 3:
            raise ValueError(f"frames must hold at least 3 images, so that each is in two pairs, got {count}.")
        saliency = PairSaliency(count, grid)
        saliency.require(pairs)  # before anything expensive
        images = images * 2 - 1
        encoded = [self._encode(images[n : n + self.batch]) for n in range(0, count, self.batch)]
        tokens, positions = (torch.cat(x) for x in zip(*encoded, strict=True))
        clustered = tokens if self.features is None else self.features((images + 1) / 2)
        if clustered.shape[:2] != tokens.shape[:2]:
            raise ValueError(f"features must return [{count}, {tokens.shape[1]}, C], got {list(clustered.shape)}.")

        def run_all(gates: Tensor | None, labels: Tensor | None) -> Easi3rPass:
            saliency.reset()
            predictions = list(self._pass(images, tokens, positions, pairs, saliency, gates))
            maps = saliency.finalize()
            masks = dynamic_masks(maps.dyn.flatten(1), clustered, grid, size, labels=labels, **self.clustering)
            return Easi3rPass(predictions, maps, masks)

        first = run_all(None, None)
        second = run_all(patch_masks(first.masks.masks, grid), first.masks.labels)
        return Easi3rResult(second.predictions, second.maps, first, pairs, masks=second.masks)

    def pairs(self, frames: int) -> list[Pair]:
        """The pairs of a clip of so many frames."""
        window = (4 if frames > LONG else 5) if self.window is None else self.window
        stride = (1 if frames == 3 else 2) if self.stride is None else self.stride
        return window_pairs(frames, window, stride=stride, **self.pairing)

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, P, C]`` and positions ``[B, P, 2]``."""
        shape = torch.tensor([images.shape[-2:]] * len(images), device=images.device)
        tokens, positions, *_ = self.model._encode_image(images, shape)
        return tokens, positions

    def _pass(
        self,
        images: Tensor,
        tokens: Tensor,
        positions: Tensor,
        pairs: list[Pair],
        saliency: PairSaliency,
        dynamic: Tensor | None,  # [T, P]
    ) -> Iterator[Any]:
        """What is kept of every pair, while ``saliency`` watches; ``dynamic`` tokens gate the view-1 decoder."""
        current: list[Pair] = []
        shape = torch.tensor([images.shape[-2:]], device=images.device)
        observers = [
            (row.control, _observer(saliency, number, layer, current))
            for number, rows in self.rows.items()
            for layer, row in rows.items()
        ]
        with observing(observers):
            for begin in range(0, len(pairs), self.batch):
                current[:] = pairs[begin : begin + self.batch]
                sides = [torch.tensor(side, device=images.device) for side in zip(*current, strict=True)]
                shapes = shape.expand(len(current), 2)
                known = tuple((*(x[side] for side in sides),) for x in (tokens, positions))
                gate = None
                if dynamic is not None:
                    gate = MotionGate.static_to_dynamic(dynamic[sides[0]], dynamic[sides[1]], renormalize=False)
                views = [
                    {"img": images[side], "true_shape": shapes, "idx": side.tolist(), "instance": list(map(str, side))}
                    for side in sides
                ]
                with (
                    standing_in(
                        self.model, "_encode_symmetrized", lambda *views, known=known, s=shapes: ((s, s), *known)
                    ),
                    gating((row.control, gate) for row in self.rows[1].values()),
                ):
                    results = self.model(*views)
                for item in range(len(current)):
                    yield self.keep(*(_item(result, item, len(current)) for result in results))


def window_pairs(
    frames: int, window: int = 5, *, stride: int = 1, symmetric: bool = True, cyclic: bool = False
) -> list[Pair]:
    """Pairs ``(i, i + n)`` with n = 1, 1 + stride, 1 + 2 stride, ..., ``window`` of them; in order, none twice.

    Args:
        frames: number of frames.
        window: with how many frames after it a frame is paired.
        stride: distance between those.
        symmetric: also ``(i + n, i)``.
        cyclic: indices are taken modulo the number of frames, so that pairs go on from the last frame to the first.
    """
    pairs: dict[Pair, None] = {}
    for i in range(frames):
        for n in range(1, 1 + window * stride, stride):
            j = (i + n) % frames if cyclic else i + n
            if j < frames and j != i:
                pairs[i, j] = None
    if symmetric:
        pairs |= dict.fromkeys([(j, i) for i, j in pairs])
    return list(pairs)


def _decoder(name: str) -> int:
    """1 or 2 for the decoder of a pair's first or second view, 0 for something else."""
    parts = name.split(".")
    return 2 if "dec_blocks2" in parts else 1 if "dec_blocks" in parts else 0


def _observer(saliency: PairSaliency, decoder: int, layer: int, pairs: list[Pair]):
    return lambda q, k, scale: saliency.observe(decoder, layer, q, k, pairs, scale=scale)


def _item(result: dict[str, Any], item: int, batch: int) -> dict[str, Any]:
    """One item of a batch of predictions, with a batch axis of 1; a copy where the batch holds more than it."""
    if batch == 1:
        return result
    return {
        name: x[item : item + 1].clone() if isinstance(x, Tensor) and x.dim() and len(x) == batch else x
        for name, x in result.items()
    }
