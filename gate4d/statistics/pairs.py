"""Easi3R's attention maps over image pairs, without a logit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..moments import Moments
from .gram import minmax
from .logits import mean_logits

_EPS = 1e-6


class PairMaps(NamedTuple):
    """What :meth:`PairSaliency.finalize` returns, each fp32 ``[images, h, w]`` in [0, 1].

    Attributes:
        dyn: ``(1 - mean_i) * var_i * mean_j * (1 - var_j)``, min-max normalised per image; 1 = dynamic.
        mean_i, var_i: of the view-1 decoder's maps, whose keys are the pair's second image, grouped by it.
        mean_j, var_j: of the view-2 decoder's maps, grouped by the pair's first image.
    """

    dyn: Tensor
    mean_i: Tensor
    var_i: Tensor
    mean_j: Tensor
    var_j: Tensor


class PairSaliency:
    """Online accumulator over the decoder cross-attentions of image pairs (DUSt3R, MonST3R).

    Each attention gives a channel per (layer, head): the mean over queries of the scaled logits, per key. A channel's
    mean and unbiased standard deviation (which the authors call variance) are taken over all pairs that have the same
    key image, merged pair by pair, so only two numbers a key and channel are kept. Value (0, 0) of every map is
    replaced by the mean of (0, 1) and (1, 0) first, as the authors do. Fusing channels is a min-max over everything,
    the mean over channels and a second min-max, with eps 1e-6.

    Args:
        images: number of images.
        grid: ``(h, w)`` of the patch tokens, h and w at least 2.
    """

    def __init__(self, images: int, grid: tuple[int, int]):
        if not isinstance(images, int) or images < 2:
            raise ValueError(f"images must be an int >= 2 (pairs need two), got {images!r}.")
        if len(grid) != 2 or min(grid) < 2:
            raise ValueError(f"grid must be (h, w) with at least 2 patches a side, got {grid!r}.")
        self.images, self.grid = images, tuple(grid)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._state: dict[tuple[int, int], list[Moments]] = {}  # (decoder, layer) -> per key image, [H, h * w]
        self._pairs: dict[tuple[int, int], set[tuple[int, int]]] = {}

    @torch.no_grad()
    def observe(
        self,
        decoder: int,
        layer: int,
        q: Tensor,  # [B, H, Nq, D]
        k: Tensor,  # [B, H, h * w, D]
        pairs: Sequence[tuple[int, int]],
        *,
        scale: float | None = None,
    ) -> None:
        """Take in one cross-attention of a batch of pairs.

        Args:
            decoder: 1 for the decoder of the pairs' first view (its keys are the second image), 2 for the other.
            layer: index of the decoder block.
            q, k: ``[B, H, Nq, D]`` and ``[B, H, h*w, D]`` after RoPE.
            pairs: ``B`` tuples (first image, second image).
            scale: ``D ** -0.5`` if None.

        Raises:
            ValueError: an argument does not fit, a pair comes twice, or a logit mean is NaN or infinite. The
                accumulator is then as it was before the call.
        """
        if decoder not in (1, 2):
            raise ValueError(f"decoder must be 1 or 2, got {decoder!r}.")
        pairs = [(int(a), int(b)) for a, b in pairs]
        channels = mean_logits(q, k, over=("queries",), scale=scale)  # [B, H, h * w]
        height, width = self.grid
        if k.shape[2] != height * width:
            raise ValueError(f"k must have {height * width} keys for a grid of {self.grid}, got {k.shape[2]}.")
        if len(pairs) != len(q):
            raise ValueError(f"pairs must hold one pair a batch item ({len(q)}), got {len(pairs)}.")
        wrong = [p for p in pairs if not all(0 <= i < self.images for i in p) or p[0] == p[1]]
        if wrong:
            raise ValueError(f"pairs must name two different images in [0, {self.images}), got {wrong}.")
        seen = self._pairs.get((decoder, layer), set())
        again = [p for n, p in enumerate(pairs) if p in seen or p in pairs[:n]]
        if again:
            raise ValueError(f"pairs {again} were already observed for decoder {decoder}, layer {layer}.")
        if not torch.isfinite(channels).all():
            raise ValueError(f"q and k of decoder {decoder}, layer {layer} must be finite, got NaN or inf.")
        shapes = {m[0].mean.shape for (d, _), m in self._state.items() if d == decoder}
        if shapes and shapes != {channels.shape[1:]}:
            raise ValueError(f"k must keep the heads and keys {list(*shapes)}, got {list(channels.shape[1:])}.")

        channels[:, :, 0] = (channels[:, :, 1] + channels[:, :, width]) / 2
        empty = Moments.empty(channels.shape[1:], channels.dtype, channels.device)
        state = self._state.setdefault((decoder, layer), [empty] * self.images)
        for pair, channel in zip(pairs, channels, strict=True):
            image = pair[1] if decoder == 1 else pair[0]
            state[image] = state[image].merge(Moments(1, channel, torch.zeros_like(channel)))
        self._pairs[decoder, layer] = seen | set(pairs)

    def finalize(self) -> PairMaps:
        """The four fused maps and Dyn.

        Raises:
            ValueError: layers or decoders saw different pairs, or an image is the key image of fewer than two pairs
                (no deviation over pairs; the authors' code yields NaN there). Go on feeding.
        """
        decoders = {d for d, _ in self._pairs}
        if decoders != {1, 2} or len({frozenset(p) for p in self._pairs.values()}) != 1:
            counts = {f"decoder {d} layer {n}": len(p) for (d, n), p in sorted(self._pairs.items())}
            raise ValueError(f"every layer of both decoders must observe the same pairs, got {counts}.")
        self.require(next(iter(self._pairs.values())))
        mean_i, var_i = self._fused(1)
        mean_j, var_j = self._fused(2)
        dyn = minmax((1 - mean_i) * var_i * mean_j * (1 - var_j), _EPS, dims=(1, 2))
        return PairMaps(dyn, mean_i, var_i, mean_j, var_j)

    def require(self, pairs: Collection[tuple[int, int]]) -> None:
        """ValueError unless these pairs suffice: every image the first of two of them and the second of two."""
        for side, role in ((1, "second"), (0, "first")):
            rare = [i for i in range(self.images) if sum(p[side] == i for p in pairs) < 2]
            if rare:
                raise ValueError(
                    f"images {rare} are the {role} image of fewer than two pairs: no deviation over pairs."
                )

    def _fused(self, decoder: int) -> tuple[Tensor, Tensor]:
        layers = [state for (d, _), state in sorted(self._state.items()) if d == decoder]
        images = list(zip(*layers, strict=True))  # of each image, one Moments [H, h * w] a layer
        mean = torch.stack([torch.cat([m.mean for m in of]) for of in images])
        deviation = torch.stack([torch.cat([m.std() for m in of]) for of in images])
        return self._fuse(mean), self._fuse(deviation)

    def _fuse(self, channels: Tensor) -> Tensor:  # [images, channels, h * w] -> [images, h, w]
        fused = minmax(channels, _EPS, dims=(0, 1, 2)).mean(1)
        return minmax(fused, _EPS, dims=(0, 1)).unflatten(1, self.grid)
