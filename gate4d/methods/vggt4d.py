"""VGGT4D on VGGT: dynamic masks from the attention of a first pass, cameras from a second that does not see them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..gates import MotionGate
from ..geometry import decode_pose, invert
from ..integrations.table import AttentionTable, require_family, require_parts
from ..nn.control import gating, observing, standing_in
from ..statistics.gram import RECIPES, GramRecipe, GramResult, GramSaliency
from ..visibility import TokenLayout
from .clips import clip_images
from .method import ClipMethod, ClipResult
from .options import Layers, layer_indices, names_of
from .refine import FORMS, refine_masks
from .segmentation import dynamic_masks, patch_masks

# (predictions of the first pass, of the second, (height, width)) to depth, intrinsics and poses for refine_masks.
Geometry = Callable[[Mapping[str, Any], Mapping[str, Any], tuple[int, int]], tuple[Tensor, Tensor, Tensor]]
_CAMERA_OUTPUTS = ("pose_enc", "pose_enc_list", "pose")


@dataclass(frozen=True)
class Vggt4dResult(ClipResult):
    """What :meth:`Vggt4d.run` returns.

    Attributes:
        predictions: of the first pass, with the camera outputs of the second.
        masks: the :class:`~gate4d.methods.segmentation.DynamicMasks` of the clip, which gated the second pass.
        saliency: the :class:`gate4d.GramResult` of the first pass, ``[1, T, patches]``.
        refined_masks: bool ``[T, H, W]``, the masks after :func:`~gate4d.methods.refine.refine_masks`, which the
            authors write out; None without refinement.
        first_cameras: the first pass's values of the outputs that come from the second.
    """

    saliency: GramResult


class Vggt4d(ClipMethod):
    """VGGT4D's two passes over a clip, and the refinement of the masks by reprojection.

    The first pass is the plain model; :class:`gate4d.GramSaliency` watches its global attention. The saliency becomes
    masks by :func:`~gate4d.methods.segmentation.dynamic_masks` on the features of the patch encoder. The second pass
    drops the keys and values of dynamic patches (any dynamic pixel) in the first layers, in frame and global attention
    alike, special tokens spared; it reuses the patch encoder's features, which the masks do not change. Cameras are
    those of the second pass, everything else of the first. Then the masks are refined with depth and intrinsics of
    the first pass and poses of the second, as the authors do.

    Args:
        recipe: of the saliency, ``"vggt4d"`` (needs 24 global blocks and clips of at least 4 frames) or a
            :class:`gate4d.GramRecipe`.
        masked_layers: frame and global blocks whose dynamic keys are dropped, see
            :func:`~gate4d.methods.options.layer_indices`: ``"0-4"``, ``[0, 1]``, ...; ``"auto"`` are the first five, or
            all of a model that has fewer; None for none.
        camera_outputs: keys of the predictions that come from the second pass.
        clusters, engine, seed: of the k-means.
        refine: ``"authors"`` or ``"paper"``, a form of :func:`~gate4d.methods.refine.refine_masks`; None for none;
            ``"auto"``: the authors', but none for a model whose predictions lack what ``geometry`` reads. A refinement
            that fails, for cameras that are not finite, say, is a warning, and there are no refined masks.
        refine_options: more arguments of ``refine_masks``; ``{"views": 50}`` bounds the time for long clips.
        geometry: reads depth, intrinsics and poses out of the predictions, see :func:`vggt_geometry`, the default.
    """

    def __init__(
        self,
        model: nn.Module,
        table: AttentionTable,
        *,
        recipe: str | GramRecipe = "vggt4d",
        masked_layers: Layers = "auto",
        camera_outputs: str | Collection[str] = _CAMERA_OUTPUTS,
        clusters: int = 64,
        engine: str = "auto",
        seed: int = 0,
        refine: str | None = "auto",
        refine_options: Mapping[str, Any] | None = None,
        geometry: Geometry | None = None,
    ):
        require_family(
            "vggt4d", table.select("global") or table, "vggt"
        )  # family vggt4d, the authors' fork, gates by itself
        self.aggregator = getattr(model, "aggregator", model)
        require_parts("vggt4d", self.aggregator, ("patch_embed", "patch_start_idx", "patch_size"))
        if isinstance(recipe, str) and recipe not in RECIPES:
            raise ValueError(f"recipe must be a GramRecipe or one of {list(RECIPES)}, got {recipe!r}.")
        self.recipe = RECIPES[recipe]() if isinstance(recipe, str) else recipe
        self.rows = {role: {r.layer: r for r in table.select(role)} for role in ("frame", "global")}
        missing = [n for n in self.recipe.layers if n not in self.rows["global"]]
        if missing:
            raise ValueError(
                f"recipe needs global blocks {missing}, but the model has {len(self.rows['global'])}: pass a "
                "GramRecipe for this depth."
            )
        if refine not in (*FORMS, "auto", None):
            raise ValueError(f"refine must be one of {[*FORMS, 'auto']} or None, got {refine!r}.")
        self.refine, self.refine_options = refine, dict(refine_options or {})
        self.geometry = geometry or vggt_geometry
        self.model = model
        both = self.rows["frame"].keys() & self.rows["global"].keys()
        self.masked_layers = layer_indices("masked_layers", masked_layers, both, auto=range(5))
        self.camera_outputs = names_of(camera_outputs)
        self.clustering = {"clusters": clusters, "engine": engine, "seed": seed}

    @torch.no_grad()
    def run(self, frames: Any) -> Vggt4dResult:
        """Both passes.

        Args:
            frames: one clip, images ``[T, 3, H, W]`` or ``[1, T, 3, H, W]`` in [0, 1], or a sequence of images
                ``[3, H, W]``; the sides are multiples of the patch size.

        Raises:
            ValueError, TypeError: frames differ in size, do not divide into patches, or are too few for the recipe's
                window; or the predictions lack what a refinement asked for by name needs.
            ImportError: an extra that the masks need is missing; names it.
        """
        images = clip_images(frames, self.aggregator.patch_size, device=next(self.model.parameters()).device)
        if images.shape[-2] * images.shape[-1] == self.aggregator.patch_size**2:
            raise ValueError(
                f"frames must have at least 2 patches, whose saliency can differ, got {list(images.shape)}."
            )
        predictions, saliency, encoded = self._first(images)
        size = tuple(images.shape[-2:])
        if self.refine in FORMS:  # asked for by name: what it needs must be there, which shows after the first pass
            try:
                self.geometry(predictions, predictions, size)
            except (KeyError, ValueError) as e:
                raise ValueError(f"refine={self.refine!r} needs depth and cameras among the predictions: {e}") from e
        grid = size[0] // self.aggregator.patch_size, size[1] // self.aggregator.patch_size
        masks = dynamic_masks(saliency.dyn[0], _patch_tokens(encoded), grid, size, **self.clustering)
        masked = self.second_pass(images, masks.masks, encoded)
        cameras = {name: masked[name] for name in self.camera_outputs if name in masked}
        if self.camera_outputs and not cameras:
            warnings.warn(
                f"no camera comes from the second pass: the predictions have {sorted(masked)}, and camera_outputs "
                f"names {list(self.camera_outputs)}.",
                stacklevel=2,
            )
        del masked, encoded
        result = Vggt4dResult(
            {**predictions, **cameras},
            saliency,
            masks=masks,
            first_cameras={name: predictions.get(name) for name in cameras},
        )
        return replace(result, refined_masks=self._refined(images[0], masks.masks, predictions, result.predictions))

    def _refined(
        self, images: Tensor, masks: Tensor, first: Mapping[str, Any], second: Mapping[str, Any]
    ) -> Tensor | None:
        if self.refine is None:
            return None
        try:
            scene = self.geometry(first, second, tuple(images.shape[-2:]))
        except (KeyError, ValueError):  # only of "auto": a model without depth or cameras
            return None
        form = "authors" if self.refine == "auto" else self.refine
        try:
            return refine_masks(masks, images, *scene, form=form, **self.refine_options)
        except (ValueError, RuntimeError, ImportError) as e:  # what both passes found is worth more than this step
            warnings.warn(f"the masks were not refined: {e}", stacklevel=3)
            return None

    def _first(self, images: Tensor) -> tuple[dict[str, Any], GramResult, Any]:
        special, (_, frames, _, height, width) = self.aggregator.patch_start_idx, images.shape
        patches = (height // self.aggregator.patch_size) * (width // self.aggregator.patch_size)
        gram = GramSaliency(self.recipe, layout=TokenLayout(frames, special + patches, special))
        encoded: list[Any] = []
        hook = self.aggregator.patch_embed.register_forward_hook(lambda module, args, out: encoded.append(out))
        observers = [(self.rows["global"][n].control, _observer(gram, n)) for n in self.recipe.layers]
        try:
            with observing(observers):
                predictions = self.model(images)
        finally:
            hook.remove()
        out = encoded[-1]
        # The encoder's dict also holds features before its norm and a class token, which nobody reads.
        encoded_once = {"x_norm_patchtokens": _patch_tokens(out)} if isinstance(out, dict) else out
        return predictions, gram.finalize(), encoded_once

    @torch.no_grad()
    def second_pass(self, images: Tensor, masks: Tensor, encoded: Any = None) -> dict[str, Any]:
        """The model while its first blocks see no key of a dynamic patch.

        Args:
            images: ``[1, T, 3, H, W]``.
            masks: bool ``[T, H, W]``; a patch is dynamic if any of its pixels is. Special tokens stay.
            encoded: what the patch encoder returned for the images; None lets it run.
        """
        side, (height, width) = self.aggregator.patch_size, images.shape[-2:]
        dynamic = patch_masks(masks, (height // side, width // side))  # [T, P]
        special = torch.zeros((len(dynamic), self.aggregator.patch_start_idx), dtype=torch.bool, device=dynamic.device)
        dropped = torch.cat((special, dynamic), dim=1)
        gates = {"frame": MotionGate.drop_keys(dropped), "global": MotionGate.drop_keys(dropped.flatten()[None])}
        controls = [(self.rows[role][n].control, gate) for role, gate in gates.items() for n in self.masked_layers]
        with ExitStack() as stack:
            stack.enter_context(gating(controls))
            if encoded is not None:
                stack.enter_context(
                    standing_in(self.aggregator.patch_embed, "forward", lambda *args, **kwargs: encoded)
                )
            return self.model(images)


def vggt_geometry(
    first: Mapping[str, Any], second: Mapping[str, Any], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Depth ``[T, H, W]``, intrinsics ``[T, 3, 3]`` and poses (camera to world) ``[T, 4, 4]`` of VGGT's predictions.

    ``depth`` (``[1, T, H, W, 1]`` or ``[1, T, H, W]``) and the field of view come from the first pass, the poses from
    the second. ``pose_enc [1, T, 9]`` is VGGT's encoding, see :mod:`gate4d.geometry`.

    Raises:
        KeyError: ``depth`` or ``pose_enc`` is missing.
        ValueError: they have another form.
    """
    depth, encoding, moved = first["depth"], first["pose_enc"], second["pose_enc"]
    depth = depth.squeeze(-1) if depth.dim() == 5 else depth
    height, width = size
    frames = depth.shape[1] if depth.dim() == 4 else 0
    if depth.shape != (1, frames, height, width) or not encoding.shape == moved.shape == (1, frames, 9):
        raise ValueError(
            f"depth must be [1, T, {height}, {width}, 1] and pose_enc [1, T, 9], got {list(depth.shape)} and "
            f"{list(encoding.shape)}."
        )
    cameras, _ = decode_pose(moved[0].float(), *size)
    return depth[0].float(), decode_pose(encoding[0].float(), *size)[1], invert(cameras)


def _observer(gram: GramSaliency, layer: int):
    return lambda q, k, scale: gram.observe(layer, q, k)


def _patch_tokens(encoded: Any) -> Tensor:
    """``[T, P, C]`` from what a patch encoder returns."""
    if isinstance(encoded, dict):
        return encoded["x_norm_patchtokens"]
    return encoded[0] if isinstance(encoded, tuple) else encoded
