"""Finds a saliency recipe for a shallow alternating model: ``python -m gate4d.evaluation.recipe WEIGHTS``.

VGGT4D's recipe names layers of a model with 24 global blocks. For another model the same kinds of map are tried on
clips that neither training nor evaluation draws: single maps are ranked by how well they tell moving patches from
resting ones (area under the ROC curve), then products of up to three of the best. The masks that follow from the best
products are judged by their IoU, which is what :data:`gate4d.evaluation.systems.SHALLOW` was chosen by.
"""

from __future__ import annotations

import argparse
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Batch
from ..data.procedural import render_scenes
from ..data.procedural.scene import random_scene
from ..methods.segmentation import dynamic_masks, patch_masks
from ..models import load
from ..nn.control import observing
from ..statistics.gram import GramMap, GramRecipe, GramSaliency, minmax
from .masks import mask_counts

WINDOW = (-3, -2, -1, 1, 2, 3)
_SEED = 9  # first word of the scenes' seeds; 0 to 2 are taken


def candidates(depth: int) -> dict[str, GramMap]:
    """All maps of one global block or two neighbours."""
    layers = [(i,) for i in range(depth)] + [(i, i + 1) for i in range(depth - 1)]
    kinds = [(p, s) for p in ("qq", "qk", "kk") for s in ("mean", "std")]
    return {f"{p} {s} of {','.join(map(str, n))}": GramMap(p, n, s) for p, s in kinds for n in layers}


@torch.no_grad()
def observed(model: nn.Module, clip: Batch, recipe: GramRecipe) -> tuple[dict[str, Tensor], Tensor]:
    """Normalised maps ``[T, P]`` of a clip, and the patch encoder's features ``[T, P, C]``."""
    gram = GramSaliency(recipe, layout=model.aggregator.layout(clip.images))
    controls = [block.attn.control for block in model.aggregator.global_blocks]
    features: list[Tensor] = []
    hook = model.aggregator.patch_embed.register_forward_hook(lambda module, args, out: features.append(out[0]))
    watch = [(c, lambda q, k, scale, i=i: gram.observe(i, q, k)) for i, c in enumerate(controls)]
    try:
        with observing(watch):
            model(clip.images)
    finally:
        hook.remove()
    return {name: x[0] for name, x in gram.finalize().maps.items()}, features[0]


def area(scores: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve of ``scores [n]`` for ``truth [n]`` bool: ties count by their order."""
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[scores.argsort()] = torch.arange(len(scores), dtype=torch.float64)
    positive, negative = int(truth.sum()), int((~truth).sum())
    return float((ranks[truth].sum() - positive * (positive - 1) / 2) / (positive * negative))


def search(
    model: nn.Module, clips: list[Batch], best: int = 12
) -> list[tuple[float, float, tuple[tuple[str, bool], ...]]]:
    """``(IoU of the masks, area, ((map, inverted), ...))`` of the products with the largest area, best IoU first.

    Raises:
        ValueError: nothing moves in the clips, or everything.
    """
    size, side = tuple(clips[0].images.shape[-2:]), model.aggregator.patch_size
    grid = size[0] // side, size[1] // side
    recipe = GramRecipe(candidates(len(model.aggregator.global_blocks)), WINDOW)
    found = [observed(model, clip, recipe) for clip in clips]
    maps = {name: torch.stack([m[name] for m, _ in found]) for name in recipe.maps}
    truth = torch.stack([patch_masks(c.masks[0], grid) for c in clips]).flatten()
    if truth.all() or not truth.any():
        raise ValueError("clips must show moving and resting patches, got one kind alone.")
    alone = {name: area(x.flatten(), truth) for name, x in maps.items()}
    chosen = sorted(alone, key=lambda name: -abs(alone[name] - 0.5))[:best]
    factors = {(name, alone[name] < 0.5): 1 - maps[name] if alone[name] < 0.5 else maps[name] for name in chosen}
    products = {
        c: minmax(torch.stack([factors[f] for f in c]).prod(0), 1e-6)
        for n in (1, 2, 3)
        for c in combinations(factors, n)
    }
    areas = {c: area(x.flatten(), truth) for c, x in products.items()}
    results = []
    for c in sorted(areas, key=lambda c: -areas[c])[:best]:
        counts = [
            mask_counts(dynamic_masks(dyn, features, grid, size).masks, clip.masks[0])
            for dyn, (_, features), clip in zip(products[c], found, clips, strict=True)
        ]
        inter, union = np.sum(counts, 0)
        results.append((float(inter / union), areas[c], c))
    return sorted(results, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gate4d.evaluation.recipe", description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="name or file of an alternating model")
    parser.add_argument("--clips", type=int, default=12)
    args = parser.parse_args()
    scenes = [random_scene(np.random.default_rng([_SEED, i]), pace=(0.25, 1.0)) for i in range(args.clips)]
    clips = [render_scenes([scene], 16, 64, 80) for scene in scenes]
    for iou, roc, maps in search(load(args.weights), clips):
        print(f"IoU {iou:.3f}  area {roc:.3f}  " + "  *  ".join(f"{'1 - ' * inverted}{n}" for n, inverted in maps))


if __name__ == "__main__":
    main()
