"""From motion saliency of patches to dynamic masks of pixels: clustering, upsampling, adaptive threshold.

Shared by the methods that segment (Easi3R, VGGT4D), as their authors' code does it: k-means on patch features over
all frames, every patch gets the mean saliency of its cluster, min-max per frame, bilinear upsampling, and one
threshold for the clip from multi-Otsu.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..statistics.gram import minmax

ENGINES = ("auto", "sklearn", "torch")
EPS = 1e-6  # of the min-max normalisation, as in the saliency maps
_MANY_TOKENS = 200_000  # from here on "auto" takes the k-means in torch
_CHUNK = 16_384  # tokens whose distances to all centres exist at a time


class DynamicMasks(NamedTuple):
    """What :func:`dynamic_masks` returns.

    Attributes:
        masks: bool ``[T, H, W]``, True = dynamic.
        scores: fp32 ``[T, H, W]`` in [0, 1], what was thresholded.
        patch_scores: fp32 ``[T, P]``, the same before upsampling.
        labels: int64 ``[T, P]``, cluster of every patch.
        threshold: dynamic is above it; NaN where no threshold exists.
        classes: of the multi-Otsu split that won, 0 where no threshold exists.
    """

    masks: Tensor
    scores: Tensor
    patch_scores: Tensor
    labels: Tensor
    threshold: float
    classes: int


@torch.no_grad()
def dynamic_masks(
    dyn: Tensor,  # [T, P]
    features: Tensor,  # [T, P, C]
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    clusters: int = 64,
    classes: Sequence[int] = (2, 3, 4),
    engine: str = "auto",
    seed: int = 0,
    labels: Tensor | None = None,  # [T, P]
) -> DynamicMasks:
    """Dynamic masks of a clip from the saliency of its patches.

    A clip whose clustered saliency is the same everywhere in each frame (all static, all dynamic) has no threshold:
    its masks are empty where the mean saliency is below one half, else full, and a warning says so.

    Args:
        dyn: saliency in [0, 1], 1 = dynamic.
        features: what is clustered, one vector a patch.
        grid: rows and columns of patches; their product is P.
        size: height and width of the masks, in pixels.
        clusters: of the k-means; fewer if there are fewer patches.
        classes: class counts that the threshold tries.
        engine: of the k-means, see :func:`kmeans`.
        seed: of the k-means.
        labels: int64 clusters found before, in place of a k-means.

    Raises:
        ValueError: an argument does not fit, or holds NaN or infinities.
        ImportError: scikit-learn or scikit-image is missing; names the extra.
    """
    if dyn.dim() != 2 or features.dim() != 3 or features.shape[:2] != dyn.shape or not features.numel():
        raise ValueError(f"dyn [T, P] and features [T, P, C] must fit, got {list(dyn.shape)}, {list(features.shape)}.")
    if grid[0] * grid[1] != dyn.shape[1]:
        raise ValueError(f"grid must hold the {dyn.shape[1]} patches of a frame, got {tuple(grid)}.")
    if min(size) < 1:
        raise ValueError(f"size must be (height, width) in pixels, both >= 1, got {tuple(size)}.")
    if not torch.isfinite(dyn).all():
        raise ValueError("dyn must be finite, got NaN or infinities.")
    if labels is None:
        labels = kmeans(features.flatten(0, 1), clusters, engine=engine, seed=seed)
    if labels.numel() != dyn.numel():
        raise ValueError(f"labels must have shape {list(dyn.shape)}, got {list(labels.shape)}.")
    labels = labels.to(dyn.device).reshape(dyn.shape)
    means = cluster_means(dyn.float(), labels)
    patch_scores = minmax(means, EPS)
    scores = F.interpolate(patch_scores.unflatten(1, grid)[:, None], size=size, mode="bilinear")[:, 0]
    found = None if (means.amax(1) - means.amin(1)).max() < EPS else adaptive_threshold(scores, classes)
    if found is None:
        full = bool(dyn.mean() >= 0.5)
        warnings.warn(
            f"the motion saliency is the same everywhere in each frame, so there is no threshold: the masks are "
            f"{'full' if full else 'empty'} (mean saliency {float(dyn.mean()):.3g}).",
            stacklevel=2,
        )
        return DynamicMasks(torch.full_like(scores, full, dtype=torch.bool), scores, patch_scores, labels, np.nan, 0)
    return DynamicMasks(scores > found[0], scores, patch_scores, labels, *found)


def cluster_means(values: Tensor, labels: Tensor) -> Tensor:
    """Every entry replaced by the mean of its cluster over all frames.

    Args:
        values: floating point, any shape.
        labels: int64, the same shape, >= 0.
    """
    flat, index = values.double().flatten(), labels.flatten()
    count = torch.bincount(index).clamp(min=1)
    return (torch.bincount(index, weights=flat) / count)[labels].to(values.dtype)


def patch_masks(masks: Tensor, grid: tuple[int, int]) -> Tensor:  # [T, H, W] -> [T, P]
    """Pixel masks (bool) to patches: a patch is dynamic if any of its pixels is.

    Raises:
        ValueError: height and width are not multiples of the grid.
    """
    if masks.shape[1] % grid[0] or masks.shape[2] % grid[1]:
        raise ValueError(f"masks {list(masks.shape)} [T, H, W] must divide into a grid of {tuple(grid)} patches.")
    window = masks.shape[1] // grid[0], masks.shape[2] // grid[1]
    return F.max_pool2d(masks[:, None].float(), window).flatten(1) > 0


def adaptive_threshold(scores: Tensor, classes: Sequence[int] = (2, 3, 4)) -> tuple[float, int] | None:
    """Last threshold of the multi-Otsu split with the largest ``var(class means) / sqrt(classes)``.

    As in the authors' code, the variance is that of the class means, each counted once. The histogram has 256 bins.

    Args:
        scores: of a whole clip, any shape, finite.
        classes: class counts to try, each >= 2; those above the number of occupied bins are left out.

    Returns:
        ``(threshold, classes)``, or None if the scores are all the same.

    Raises:
        ValueError: classes does not fit.
        ImportError: scikit-image is missing.
    """
    if not classes or min(classes) < 2:
        raise ValueError(f"classes must hold class counts >= 2, got {list(classes)}.")
    try:
        from skimage.filters import threshold_multiotsu
    except ImportError:
        raise ImportError("The adaptive threshold needs scikit-image: pip install 'gate4d[methods]'.") from None
    values = scores.detach().float().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite, got NaN or infinities.")
    if np.ptp(values) == 0:
        return None
    counts, edges = np.histogram(values, bins=256)
    centres, occupied = (edges[:-1] + edges[1:]) / 2, int((counts > 0).sum())
    best = None
    for number in classes:
        if number > occupied:
            continue
        thresholds = threshold_multiotsu(classes=number, hist=(counts, centres))
        means = _class_means(values, thresholds)
        quality = float(np.var(means)) / number**0.5
        if best is None or quality > best[0]:
            best = quality, float(thresholds[-1]), number
    return None if best is None else best[1:]


def _class_means(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Mean of the values of each class that has any; frame by frame, since the indices take 8 bytes a value."""
    total, count = np.zeros(len(thresholds) + 1), np.zeros(len(thresholds) + 1)
    for part in values if values.ndim > 1 else [values]:
        index = np.digitize(part.ravel(), thresholds)
        total += np.bincount(index, weights=part.ravel(), minlength=len(total))
        count += np.bincount(index, minlength=len(total))
    return total[count > 0] / count[count > 0]


def kmeans(features: Tensor, clusters: int = 64, *, engine: str = "auto", seed: int = 0) -> Tensor:
    """Cluster labels of feature vectors, int64 ``[N]`` on the CPU or, from torch, on the features' device.

    Args:
        features: floating point ``[N, C]``, finite.
        clusters: at most N are used.
        engine: ``"sklearn"`` (scikit-learn's KMeans, one k-means++ start), ``"torch"`` (the same algorithm, started
            on a sample, distances in chunks, on any device), or ``"auto"``: torch for more than 200 000 vectors or
            features that are not on the CPU.
        seed: of the start.

    Raises:
        ValueError: an argument does not fit, or features are not finite.
        ImportError: scikit-learn is asked for and missing.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {list(ENGINES)}, got {engine!r}.")
    if features.dim() != 2 or not features.numel():
        raise ValueError(f"features must have shape [N, C], got {list(features.shape)}.")
    if not isinstance(clusters, int) or clusters < 1:
        raise ValueError(f"clusters must be an int >= 1, got {clusters!r}.")
    if not torch.isfinite(features).all():
        raise ValueError("features must be finite, got NaN or infinities.")
    features, clusters = features.detach().float(), min(clusters, features.shape[0])
    if engine == "torch" or (engine == "auto" and (features.shape[0] > _MANY_TOKENS or not features.is_cpu)):
        return _torch_kmeans(features, clusters, seed)
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
    except ImportError:
        raise ImportError("Clustering needs scikit-learn: pip install 'gate4d[methods]'.") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct vectors than clusters is fine
        fitted = KMeans(clusters, n_init=1, random_state=seed).fit(features.numpy())
    return torch.from_numpy(fitted.labels_.astype(np.int64))


def _torch_kmeans(x: Tensor, clusters: int, seed: int, iterations: int = 300, tolerance: float = 1e-4) -> Tensor:
    x = x - x.mean(0)  # distances are differences of squares: keep them small
    generator = torch.Generator().manual_seed(seed)
    sample = x[torch.randperm(len(x), generator=generator)[: max(64 * clusters, 4096)].to(x.device)]
    centres = _spread(sample, clusters, generator)
    limit = tolerance * float(x.var(0, correction=0).mean())
    for _ in range(iterations):
        labels = _nearest(x, centres)
        count = torch.bincount(labels, minlength=clusters)[:, None]
        total = torch.zeros_like(centres).index_add_(0, labels, x)
        new = torch.where(count > 0, total / count.clamp(min=1), centres)  # an empty cluster stays where it is
        moved, centres = float((new - centres).square().sum()), new
        if moved <= limit:
            break
    return _nearest(x, centres)


def _spread(x: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: each new centre is the best of a few vectors drawn in proportion to their squared distance."""
    trials = 2 + int(np.log(clusters))
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    nearest = (x - x[chosen[0]]).square().sum(1)
    while len(chosen) < clusters:
        weights = nearest.double().cpu().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64) * weights[-1]
        candidates = torch.searchsorted(weights, draws).clamp(max=len(x) - 1)
        distances = torch.cdist(x[candidates.to(x.device)], x).square().minimum(nearest)  # [trials, N]
        best = int(distances.sum(1).argmin())
        chosen.append(int(candidates[best]))
        nearest = distances[best]
    return x[chosen]


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    offset = centres.square().sum(1) / 2
    return torch.cat([(offset - part @ centres.T).argmin(1) for part in x.split(_CHUNK)])
