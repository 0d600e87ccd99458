"""VGGT4D's motion saliency from Gram maps of the global attention's features, while the model runs.

The maps are means and standard deviations of raw products ``x_i . y_j`` of a frame's patch features with those of
the frames around it. The authors keep q and k of every block and form the products per (frame, source frame, layer,
head); here a mean map costs one token mean a frame and layer, and a deviation map one streamed product a frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_pair
from ..visibility import TokenLayout
from .cross import feature_moments

_PRODUCTS = {"qq": (0, 0), "qk": (0, 1), "kk": (1, 1)}


@dataclass(frozen=True)
class GramMap:
    """One component map.

    Args:
        product: ``"qq"``, ``"qk"`` or ``"kk"``: the features of the frame itself and of its source frames.
        layers: 0-based indices of global-attention blocks.
        statistic: over the source tokens, ``"mean"`` or (unbiased) ``"std"``; the mean over layers, heads and source
            frames is taken inside it.
        inverted: the factor in Dyn is ``1 - map`` instead of ``map``.
    """

    product: str
    layers: Sequence[int]
    statistic: str
    inverted: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        if self.product not in _PRODUCTS:
            raise ValueError(f"product must be one of {list(_PRODUCTS)}, got {self.product!r}.")
        if self.statistic not in ("mean", "std"):
            raise ValueError(f"statistic must be 'mean' or 'std', got {self.statistic!r}.")
        if not self.layers or min(self.layers) < 0:
            raise ValueError(f"layers must be a non-empty sequence of indices >= 0, got {self.layers}.")


@dataclass(frozen=True)
class GramRecipe:
    """Component maps whose product is Dyn, and the source frames they look at.

    Args:
        maps: name to :class:`GramMap`.
        window: offsets of the source frames; those outside the clip are left out, as the authors do.
        eps: added to the range in every min-max normalisation.
    """

    maps: Mapping[str, GramMap]
    window: Sequence[int] = (-6, -4, -2, 2, 4, 6)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not self.maps or not all(isinstance(m, GramMap) for m in self.maps.values()):
            raise ValueError("maps must be a non-empty mapping from names to GramMap.")
        if not self.window:
            raise ValueError("window must hold at least one frame offset.")

    @classmethod
    def vggt4d(cls) -> GramRecipe:
        """The authors' choice for VGGT's 24 global blocks."""
        return cls(
            {
                "S_mid": GramMap("qq", range(3, 8), "mean", inverted=True),
                "V_deep": GramMap("qq", range(18, 20), "std", inverted=True),
                "S_deep": GramMap("qq", range(17, 22), "mean"),
                "S_sh": GramMap("kk", (0,), "mean", inverted=True),
                "V_sh": GramMap("qk", (0,), "std"),
            }
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer some map needs, ascending."""
        return tuple(sorted({layer for m in self.maps.values() for layer in m.layers}))


RECIPES = {"vggt4d": GramRecipe.vggt4d}


class GramResult(NamedTuple):
    """What :meth:`GramSaliency.finalize` returns.

    Attributes:
        dyn: fp32 ``[B, T, patches]`` in [0, 1], 1 = dynamic, min-max normalised per frame.
        maps: each component map, the same shape and normalisation, before it is inverted.
        raw: the same before normalisation.
    """

    dyn: Tensor
    maps: dict[str, Tensor]
    raw: dict[str, Tensor]


class GramSaliency:
    """Online accumulator: feed it every global block of one clip, in order, then ask for the result.

    It holds a ``[B, T, patches]`` sum a map, and for deviation maps over several layers the patch features of those
    layers seen so far, until the last of them arrives. Nothing else outlives :meth:`observe`.

    Args:
        recipe: ``"vggt4d"`` or a :class:`GramRecipe`.
        layout: the clip, all frames with equally many tokens.

    Raises:
        ValueError: the recipe is unknown, the layout is ragged, or some frame has no source frame in the clip (a
            single frame; fewer than four frames with the authors' window).
    """

    def __init__(self, recipe: str | GramRecipe = "vggt4d", *, layout: TokenLayout):
        if isinstance(recipe, str):
            if recipe not in RECIPES:
                raise ValueError(f"recipe must be a GramRecipe or one of {list(RECIPES)}, got {recipe!r}.")
            recipe = RECIPES[recipe]()
        self.recipe = recipe
        self.layout = layout
        self._patches = layout.patches_per_frame
        if self._patches < 1:
            raise ValueError(f"layout must have patch tokens, got {layout!r}.")
        frames = range(layout.frames)
        self._sources = [[t + w for w in recipe.window if t + w in frames] for t in frames]
        lonely = [t for t in frames if not self._sources[t]]
        if lonely:
            raise ValueError(
                f"layout has {layout.frames} frame(s); frame(s) {lonely} have no source frame within the window "
                f"{tuple(recipe.window)}. Give a longer clip, or a recipe with a denser window."
            )
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next :meth:`observe` starts a new clip with the same layout."""
        self._last = -1
        self._shape: tuple[int, ...] | None = None
        self._sums: dict[str, Tensor] = {}
        self._held: dict[str, list[list[Tensor]]] = {}  # map -> layers -> [x] or [x, y], [B, T, P, H * D] each
        self._peak = 0

    @torch.no_grad()
    def observe(self, layer: int, q: Tensor, k: Tensor) -> None:
        """Take in one global-attention block. Layers that no map needs are accepted and cost nothing.

        Args:
            layer: 0-based index of the block, larger than that of the previous call.
            q, k: ``[B, H, N, D]`` after q/k-norm and RoPE; N counts all tokens of the layout, whose special tokens
                are left out, or its patch tokens alone.

        Raises:
            ValueError, TypeError: the layer is out of order, repeated or skips one that is needed, a shape changed or
                does not fit the layout, or a feature is NaN or infinite. The accumulator is then as it was before.
        """
        if not isinstance(layer, int) or layer <= self._last:
            raise ValueError(f"layer must be an int > {self._last}, the last one observed, got {layer!r}.")
        skipped = [needed for needed in self.recipe.layers if self._last < needed < layer]
        if skipped:
            raise ValueError(f"layer {layer} comes before layers {skipped}, which the recipe needs first.")
        check_pair(q, k)
        self._check_shape(q, k)
        features = _Frames(q, self.layout), _Frames(k, self.layout)
        new_sums, held = dict(self._sums), dict(self._held)
        for name, m in self.recipe.maps.items():
            if layer not in m.layers:
                continue
            x, y = (features[side] for side in _PRODUCTS[m.product])
            if m.statistic == "mean":
                new = self._mean_sum(x, y)
                new_sums[name] = new if name not in new_sums else new_sums[name] + new
            elif layer == m.layers[-1]:
                new = new_sums[name] = self._deviation([*held.pop(name, []), [x] if x is y else [x, y]])
            else:
                kept = [f.packed() for f in ([x] if x is y else [x, y])]
                held[name] = [*held.get(name, []), kept]
                new = torch.stack([f.sum(dtype=torch.float32) for f in kept])
            if not torch.isfinite(new).all():
                raise ValueError(f"q and k of layer {layer} must be finite: map {name!r} got NaN or inf.")
        self._sums, self._held, self._last, self._shape = new_sums, held, layer, tuple(q.shape)
        self._peak = max(self._peak, self.held_bytes())

    def finalize(self) -> GramResult:
        """Dyn and its component maps; can be called again, :meth:`reset` starts a new clip.

        Raises:
            ValueError: a layer of the recipe has not been observed; go on feeding.
        """
        missing = [layer for layer in self.recipe.layers if layer > self._last]
        if missing:
            raise ValueError(f"finalize() needs every layer of the recipe; layers {missing} were not observed yet.")
        assert self._shape is not None, "a recipe has layers, and they were observed"
        heads, eps = self._shape[1], self.recipe.eps
        raw = {
            name: self._sums[name] / (len(m.layers) * heads if m.statistic == "mean" else 1)
            for name, m in self.recipe.maps.items()
        }
        maps = {name: minmax(x, eps) for name, x in raw.items()}
        factors = [1 - maps[name] if m.inverted else maps[name] for name, m in self.recipe.maps.items()]
        return GramResult(minmax(torch.stack(factors).prod(0), eps), maps, raw)

    def held_bytes(self) -> int:
        """Bytes held now."""
        held = [f for layers in self._held.values() for kept in layers for f in kept]
        return sum(x.untyped_storage().nbytes() for x in [*held, *self._sums.values()])

    def peak_bytes(self) -> int:
        """The most bytes held between two calls of :meth:`observe` since the start of the clip."""
        return self._peak

    def _check_shape(self, q: Tensor, k: Tensor) -> None:
        tokens, patches = self.layout.num_tokens, self.layout.frames * self._patches
        for name, x in (("q", q), ("k", k)):
            if x.shape[2] not in (tokens, patches):
                raise ValueError(
                    f"{name} must have {tokens} tokens ({patches} without special ones) for {self.layout!r}, got "
                    f"{x.shape[2]}: the frame count must not change within a clip."
                )
        if self._shape is not None and tuple(q.shape) != self._shape:
            raise ValueError(f"q must keep the shape {list(self._shape)} of the layers before, got {list(q.shape)}.")

    def _mean_sum(self, x: _Frames, y: _Frames) -> Tensor:  # -> [B, T, P]
        """Sum over heads of ``x_i . (mean over source frames and their tokens of y)``."""
        means = torch.stack([y[t].mean(2, dtype=torch.float32) for t in range(self.layout.frames)])  # [T, B, H, D]
        rows = []
        for t, sources in enumerate(self._sources):
            target = means[sources].mean(0)[:, :, None]  # [B, H, 1, D]: a row times x^T is read at memory speed
            rows.append((target @ x[t].float().mT).squeeze(2).sum(1))
        return torch.stack(rows, dim=1)

    def _deviation(self, layers: list[Any]) -> Tensor:  # -> [B, T, P]
        """Std over tokens of the mean over layers, heads and source frames; frame by frame."""
        current = layers[-1][0].x  # [B, H, N, D]
        batch, heads, width = current.shape[0], current.shape[1], current.shape[1] * current.shape[3]
        y = torch.empty(batch, self._patches, len(layers), width, dtype=torch.float32, device=current.device)
        rows = []
        for t, sources in enumerate(self._sources):
            for n, kept in enumerate(layers):
                total = y[:, :, n].view(batch, self._patches, heads, -1)
                total.copy_(_tokens(kept[-1], sources[0], heads))
                for s in sources[1:]:
                    total += _tokens(kept[-1], s, heads)
            x = [_tokens(kept[0], t, heads).transpose(1, 2) for kept in layers]
            rows.append(feature_moments(x, y.flatten(2)).std() / (len(layers) * heads * len(sources)))
        return torch.stack(rows, dim=1)


class _Frames:
    """The patch features of ``[B, H, N, D]`` frame by frame, as views."""

    def __init__(self, x: Tensor, layout: TokenLayout):
        self.x, self.frames = x, layout.frames
        special = layout.special_tokens if x.shape[2] == layout.num_tokens else 0
        self.stride, self.special = x.shape[2] // layout.frames, special

    def __getitem__(self, t: int) -> Tensor:  # [B, H, P, D]
        return self.x[:, :, t * self.stride + self.special : (t + 1) * self.stride]

    def packed(self) -> Tensor:  # [B, T, P, H * D]
        """A compact copy, which does not keep the model's qkv buffer alive."""
        batch, heads, patches, dim = self[0].shape
        out = self.x.new_empty(batch, self.frames, patches, heads, dim)
        for t in range(self.frames):
            out[:, t] = self[t].transpose(1, 2)
        return out.flatten(3)


def _tokens(features: _Frames | Tensor, t: int, heads: int) -> Tensor:  # -> view [B, P, H, D]
    """Frame t of a layer, whether it is the model's or a packed copy."""
    return features[t].transpose(1, 2) if isinstance(features, _Frames) else features[:, t].unflatten(-1, (heads, -1))


def minmax(x: Tensor, eps: float, dims: Sequence[int] = (-1,)) -> Tensor:
    """``(x - min) / (max - min + eps)`` over ``dims``."""
    low, high = x.amin(tuple(dims), keepdim=True), x.amax(tuple(dims), keepdim=True)
    return (x - low) / (high - low + eps)
