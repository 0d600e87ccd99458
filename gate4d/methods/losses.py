"""MoRe's training losses (arXiv 2603.05078): attention forcing, confidence regression, motion, relative poses.

Pure torch, differentiable, batch first; ``gate4d.methods.more`` runs a model trained with them. Where the paper and the
authors' code (github.com/HellexF/MoRe) differ, the code's definition is the default and the paper's a named option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..visibility import TokenLayout, Visibility

FORMS = ("product", "score hinge", "attention hinge", "kl")
PENALISE = ("dynamic", "static")


def static_scores(motion: Tensor, patch: int) -> Tensor:
    """Share of static pixels of each patch, ``a = 1 - avgpool(motion)``: 1 = static, 0 = all of it moves.

    Args:
        motion: ``[..., H, W]``, bool or floating point in [0, 1], 1 = moving.
        patch: side of a patch in pixels; divides H and W.

    Returns:
        ``[..., (H / patch) * (W / patch)]``, row by row; fp32 for bool, else ``motion``'s dtype.

    Raises:
        TypeError: ``motion`` holds integers.
        ValueError: ``motion`` does not divide into patches.
    """
    if motion.dtype != torch.bool and not motion.is_floating_point():
        raise TypeError(f"motion must be bool or floating point, got {motion.dtype}.")
    if motion.dim() < 2 or patch < 1 or motion.shape[-2] % patch or motion.shape[-1] % patch:
        raise ValueError(f"motion must be [..., H, W] with sides that patch={patch} divides, got {list(motion.shape)}.")
    pixels = motion if motion.is_floating_point() else motion.float()
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    moving = pixels.unflatten(-1, (columns, patch)).unflatten(-3, (rows, patch)).mean(dim=(-3, -1))
    return 1 - moving.flatten(-2)


def camera_attention(
    q: Tensor, k: Tensor, *, scale: float | None = None, visible: Visibility | None = None, log: bool = False
) -> Tensor:
    """Attention of the camera rows over all keys; nothing larger than the result is held, for the backward neither.

    Args:
        q: ``[B, H, Nc, D]``, the camera tokens' queries, after norm and RoPE.
        k: ``[B, H, N, D]``, all keys.
        scale: of the logits; ``D ** -0.5`` if None.
        visible: which keys each of the ``Nc`` queries sees; all if None.
        log: the logarithm of the attention, finite where the attention itself would be too small for its dtype.

    Returns:
        ``[B, H, Nc, N]``, fp32 or the wider input dtype; the logits are computed in the inputs' dtype, the softmax in
        the result's. A query that sees nothing has a row of zeros (``-inf`` with ``log``).

    Raises:
        ValueError: shapes do not fit.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q [B,H,Nc,D] and k [B,H,N,D] must fit, got {list(q.shape)} and {list(k.shape)}.")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    logits = (q * scale) @ k.transpose(2, 3)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    softmax, nothing = (torch.log_softmax, -torch.inf) if log else (torch.softmax, 0.0)
    if visible is None or visible.bounds is None:
        return softmax(logits, -1, dtype=dtype)
    if visible.bounds.shape[2] != q.shape[2] or (visible.key_extent or 0) > k.shape[2]:
        raise ValueError(
            f"visible must describe {q.shape[2]} queries over {k.shape[2]} keys, got {visible.bounds.shape[2]} queries "
            f"over {visible.key_extent} keys."
        )
    seen = visible.dense(q.shape[2], k.shape[2])  # [1 or B, Nc, N]
    blind = ~seen.any(-1, keepdim=True)
    hidden = (~(seen | blind))[:, None].to(q.device)
    rows = softmax(logits.masked_fill(hidden, -torch.inf), -1, dtype=dtype)
    return rows.masked_fill(blind[:, None].to(q.device), nothing) if blind.any() else rows


def attention_forcing(
    q: Tensor,
    k: Tensor,
    static: Tensor,
    *,
    layout: TokenLayout,
    form: str = "product",
    threshold: float | None = None,
    penalise: str = "dynamic",
    visible: Visibility | None = None,
    scale: float | None = None,
) -> Tensor:
    """Keeps the camera tokens from looking at what must not guide them.

    ``alpha_i`` is a camera token's attention over all keys, taken at image token ``i``; ``s_i`` is how much looking
    there is penalised; ``M`` counts the image tokens the camera token sees. Of each camera token (one a frame, the
    first) and head, by ``form``:

    - ``"product"``: ``(1/M) sum_i s_i alpha_i``. This is the authors' code, which takes it on the camera rows of the
      last frame block: queries and keys ``[B * T, H, P, D]`` of that block and a ``layout`` of one frame, so that the
      softmax is over the tokens of the camera's own frame, special ones included.
    - ``"score hinge"``: ``(1/M) sum_i max(0, s_i - C) alpha_i``, the paper's equation 8. It is printed with
      ``s = a``, the static score, which would push attention *off the static* scene, while the text around it and the
      code say the opposite; so the sign is a parameter.
    - ``"attention hinge"``: ``(1/M) sum_i s_i max(0, alpha_i - C)``, with the hinge on the attention, as in the paper's
      section 9.3: attention up to ``C`` is free.
    - ``"kl"``: ``sum_i t_i log(t_i / alpha_i)`` with ``t_i`` in proportion to ``1 - s_i``, summing to 1 over the image
      tokens the camera token sees: the divergence of the paper's ablation. 0 where no token may be looked at.

    The mean over camera tokens, heads and batch is returned. The details of the last two (the factor ``1/M``, what
    ``t`` is normalised over, that attention on special tokens counts as lost) are this project's reading.

    Args:
        q, k: ``[B, H, N, D]`` of a block, after norm and RoPE, frame after frame as in ``layout``.
        static: ``[B, T, patches]`` (ragged layouts: ``[B, sum of patches]``) from :func:`static_scores`, 1 = static.
        layout: of the ``N`` tokens; needs at least one special token a frame, the first is the camera's.
        form: see above.
        threshold: ``C`` of the two hinges, in [0, 1); they need it, the others have none.
        penalise: ``"dynamic"``: ``s = 1 - static``, attention on moving tokens costs; ``"static"``: ``s = static``.
        visible: of all ``N`` queries, :meth:`gate4d.Visibility.frame_causal` for one; full if None.
        scale: of the logits; ``D ** -0.5`` if None.

    Returns:
        A scalar >= 0, fp32 or wider. Beside gradients of q's and k's size, ``[B, H, T, N]`` is the largest tensor held.

    Raises:
        ValueError: shapes, ``layout`` or options do not fit.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {list(FORMS)}, got {form!r}.")
    if penalise not in PENALISE:
        raise ValueError(f"penalise must be one of {list(PENALISE)}, got {penalise!r}.")
    if form.endswith("hinge"):
        if threshold is None or not 0 <= threshold < 1:
            raise ValueError(f"threshold must be in [0, 1) for form={form!r}, got {threshold!r}.")
    elif threshold is not None:
        raise ValueError(f"threshold has no effect with form={form!r}, got {threshold!r}: leave it None.")
    if not layout.special_tokens:
        raise ValueError(f"layout must have a camera token (special_tokens >= 1), got {layout!r}.")
    if q.dim() != 4 or q.shape != k.shape or q.shape[2] != layout.num_tokens:
        raise ValueError(
            f"q and k must be [B,H,{layout.num_tokens},D] for {layout!r}, got {list(q.shape)} and {list(k.shape)}."
        )
    camera = torch.tensor(layout.offsets[:-1])
    rows = None
    if visible is not None and visible.bounds is not None:
        if visible.bounds.shape[2] != layout.num_tokens:
            raise ValueError(
                f"visible must describe {layout.num_tokens} queries, got {visible.bounds.shape[2]} queries."
            )
        rows = visible.rows(camera)
    alpha = camera_attention(q[:, :, camera.to(q.device)], k, scale=scale, visible=rows, log=form == "kl")
    counts = layout.is_patch()[None, None]  # of image tokens seen
    if rows is not None:
        counts = counts & rows.dense(len(camera), layout.num_tokens).cpu()
    counts = counts.to(alpha.device)  # [1 or B, 1 or Nc, N]
    scores = (static if penalise == "static" else 1 - static).to(alpha.dtype)
    if form == "kl":
        target = layout.token_scores(1 - scores).to(alpha.device)[:, None] * counts
        target = target / target.sum(-1, keepdim=True).clamp_min(torch.finfo(target.dtype).tiny)
        none = target == 0
        logs = alpha.masked_fill(none[:, None], 0)  # -inf where not seen, and 0 * inf is no 0
        own = (target * target.masked_fill(none, 1).log()).sum(-1)[:, None]
        return (own - torch.einsum("bhcn,bcn->bhc", logs, target)).mean()
    if form == "score hinge":
        scores = (scores - threshold).relu()
    elif form == "attention hinge":
        alpha = (alpha - threshold).relu()
    cost = layout.token_scores(scores).to(alpha.device)  # [B, N], 0 at specials
    per_row = torch.einsum("bhcn,bn->bhc", alpha, cost)
    return (per_row / counts.sum(-1)[:, None].clamp_min(1)).mean()


def confidence_regression(
    prediction: Tensor,
    target: Tensor,
    confidence: Tensor,
    *,
    weight: float,
    valid: Tensor | None = None,
    power: int = 2,
) -> Tensor:
    """``c |y^ - y|^power - weight * log c``, mean over the valid entries; 0 if there are none.

    Of depth, and of point maps, whose entries are points.

    Args:
        prediction, target: ``[...]``, or ``[..., C]`` where the square is summed over the C components.
        confidence: ``c`` > 0, ``[...]``.
        weight: > 0, what certainty is worth.
        valid: bool ``[...]``; entries outside do not count, whatever ``target`` holds there. All if None.
        power: 2 for squares, as the paper writes it, 1 for distances, as the authors' code takes them.

    Raises:
        ValueError: shapes or ``power`` do not fit.
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power!r}.")
    if prediction.shape != target.shape or confidence.shape not in (prediction.shape, prediction.shape[:-1]):
        raise ValueError(
            "prediction and target must have one shape, confidence the same or one without the last axis, got "
            f"{list(prediction.shape)}, {list(target.shape)} and {list(confidence.shape)}."
        )
    if valid is not None:
        _check_valid(valid, confidence)
        prediction, target, confidence = prediction[valid], target[valid], confidence[valid]
    off = prediction - target
    components = off.dim() > confidence.dim()
    if power == 1:
        size = off.norm(dim=-1) if components else off.abs()  # norm's derivative is 0 at 0, that of a root is not
    else:
        size = off.square().sum(-1) if components else off.square()
    return (confidence * size - weight * confidence.log()).sum() / max(1, confidence.numel())


def motion_bce(logits: Tensor, motion: Tensor, valid: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of the motion mask, mean over the valid pixels; 0 if there are none.

    Args:
        logits: any shape, > 0 = moving.
        motion: the same shape, bool or in [0, 1].
        valid: bool, the same shape; all if None.

    Raises:
        ValueError: shapes differ.
    """
    if logits.shape != motion.shape:
        raise ValueError(f"logits and motion must have one shape, got {list(logits.shape)} and {list(motion.shape)}.")
    if valid is not None:
        _check_valid(valid, logits)
        logits, motion = logits[valid], motion[valid]
    summed = F.binary_cross_entropy_with_logits(logits, motion.to(logits.dtype), reduction="sum")
    return summed / max(1, logits.numel())


def relative_pose(pose_enc: Tensor, target_pose_enc: Tensor, *, detach_earlier: bool = True) -> tuple[Tensor, Tensor]:
    """Error of the motion between every two frames: independent of which frame is the origin.

    With ``x_camera = R x + t`` the motion from frame i to frame j is ``R_j R_i^T, t_j - R_j R_i^T t_i``. (The authors'
    code forms ``inverse(T_i) T_j`` from the same world-to-camera matrices, which does depend on the origin, and takes
    L1 distances of its entries.)

    Args:
        pose_enc, target_pose_enc: ``[B, T, 9]`` or ``[B, T, >= 7]`` in VGGT's convention: translation, quaternion
            (scalar last, any length > 0), world to camera; what follows (fields of view) is not read.
        detach_earlier: of two frames the earlier gets no gradient, so that a stream's frame answers for its own pose
            alone (section 3.4). False for poses that saw the whole clip, such as those of the copied camera tokens.

    Returns:
        ``(rotation, translation)``: mean over all ordered pairs of frames of the angle in radians between the two
        rotations, and of the length of the difference of the two translations; both 0 for one frame.

    Raises:
        ValueError: shapes do not fit.
    """
    if pose_enc.dim() != 3 or pose_enc.shape != target_pose_enc.shape or pose_enc.shape[2] < 7:
        raise ValueError(
            f"pose_enc and target_pose_enc must both be [B,T,9], got {list(pose_enc.shape)} and "
            f"{list(target_pose_enc.shape)}."
        )
    frames = pose_enc.shape[1]
    pairs = torch.arange(frames * frames, device=pose_enc.device)
    pairs = pairs[pairs // frames != pairs % frames]
    first, second = pairs // frames, pairs % frames
    ends = [pose_enc[:, first], pose_enc[:, second]]
    if detach_earlier:
        early = (first < second)[:, None]
        ends = [torch.where(early, ends[0].detach(), ends[0]), torch.where(early, ends[1], ends[1].detach())]
    rotation, shift = _motion_between(*ends)
    target_rotation, target_shift = _motion_between(target_pose_enc[:, first], target_pose_enc[:, second])
    off = _multiply(_conjugate(rotation), target_rotation)
    # atan2 instead of acos: its derivative stays finite where the rotations agree
    angle = 2 * torch.atan2(off[..., :3].norm(dim=-1), off[..., 3].abs())
    count = max(1, angle.numel())
    return angle.sum() / count, (shift - target_shift).norm(dim=-1).sum() / count


class ForcedAttention(NamedTuple):
    """What the attention forcing of a recipe needs of the forward pass.

    Attributes:
        layers: queries and keys by the block's number: of frame blocks, as the authors' code has it,
            ``[B * T, H, P, D]`` with a ``layout`` of one frame, or of global blocks, ``[B, H, T * P, D]``.
        layout: of the tokens of one item of these batches.
        visible: as in the blocks; None for full attention.
        patch: side of a patch in pixels.
        scale: of the logits; ``D ** -0.5`` if None.
    """

    layers: Mapping[int, tuple[Tensor, Tensor]]
    layout: TokenLayout
    visible: Visibility | None = None
    patch: int = 14
    scale: float | None = None


@dataclass(frozen=True)
class MoreRecipe:
    """The terms of a training step and their weights.

    The paper gives the terms; form and weight of the forcing are those of the authors' code, which takes it of the last
    frame block. The other weights are this project's, to be set per training.

    Attributes:
        pose: of the absolute encoding, Huber.
        rotation, translation: of :func:`relative_pose`, see there for ``detach_earlier``.
        depth: of :func:`confidence_regression`; ``certainty`` is its ``weight``.
        points: of the same for point maps.
        power: see :func:`confidence_regression`.
        motion: of :func:`motion_bce`.
        forcing: of :func:`attention_forcing`, summed over ``layers`` (None: every layer given).
        form, threshold, penalise: see :func:`attention_forcing`.
    """

    pose: float = 1.0
    rotation: float = 1.0
    translation: float = 1.0
    detach_earlier: bool = True
    depth: float = 1.0
    points: float = 1.0
    certainty: float = 0.2
    power: int = 2
    motion: float = 1.0
    forcing: float = 0.01
    layers: tuple[int, ...] | None = None
    form: str = "product"
    threshold: float | None = None
    penalise: str = "dynamic"

    def loss(
        self, predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor], attention: ForcedAttention | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and its terms, unweighted and detached.

        A term of weight 0 is not computed, and neither is one for which ``predictions`` or ``targets`` lacks the entry.

        Args:
            predictions: any of ``pose_enc [B,T,9]``, ``depth [B,T,H,W,1]`` with ``depth_conf [B,T,H,W]``,
                ``world_points [B,T,H,W,3]`` with ``world_points_conf [B,T,H,W]``, ``motion [B,T,H,W]`` (logits).
            targets: ``pose_enc``; ``depth [B,T,H,W]`` and ``world_points [B,T,H,W,3]`` in the predictions' unit;
                ``motion`` bool; ``valid`` bool ``[B,T,H,W]`` for depth and points, optional.
            attention: of the forward pass; None for no attention forcing.

        Raises:
            KeyError: a layer of ``layers`` is missing from ``attention``.
            ValueError: shapes do not fit, or there is nothing to compute.
        """
        terms: dict[str, tuple[float, Tensor]] = {}

        def both(name: str, *more: str) -> bool:
            return name in predictions and name in targets and all(m in predictions for m in more)

        if both("pose_enc"):
            encoding, target = predictions["pose_enc"], targets["pose_enc"]
            if self.pose:
                terms["pose"] = self.pose, _pose_distance(encoding, target)
            if self.rotation or self.translation:
                rotation, translation = relative_pose(encoding, target, detach_earlier=self.detach_earlier)
                terms["rotation"] = self.rotation, rotation
                terms["translation"] = self.translation, translation
        regression = {"weight": self.certainty, "valid": targets.get("valid"), "power": self.power}
        if self.depth and both("depth", "depth_conf"):
            depth, confidence = predictions["depth"].squeeze(-1), predictions["depth_conf"]
            terms["depth"] = self.depth, confidence_regression(depth, targets["depth"], confidence, **regression)
        if self.points and both("world_points", "world_points_conf"):
            points, confidence = predictions["world_points"], predictions["world_points_conf"]
            term = confidence_regression(points, targets["world_points"], confidence, **regression)
            terms["points"] = self.points, term
        if self.motion and both("motion"):
            terms["motion"] = self.motion, motion_bce(predictions["motion"], targets["motion"])
        if self.forcing and attention is not None:
            terms["forcing"] = self.forcing, self._forcing(targets["motion"], attention)
        if not terms:
            raise ValueError(
                f"predictions {sorted(predictions)} and targets {sorted(targets)} share no term of this recipe."
            )
        total = torch.stack([weight * term for weight, term in terms.values()]).sum()
        return total, {name: term.detach() for name, (_, term) in terms.items()}

    def _forcing(self, motion: Tensor, attention: ForcedAttention) -> Tensor:
        static = static_scores(motion, attention.patch)
        if motion.dim() == 4:  # the same patches, as the items of the blocks' batch: frames, or clips
            static = static.reshape(-1, attention.layout.frames, static.shape[-1])
        layers = attention.layers.keys() if self.layers is None else self.layers
        return torch.stack(
            [
                attention_forcing(
                    *attention.layers[layer],
                    static,
                    layout=attention.layout,
                    form=self.form,
                    threshold=self.threshold,
                    penalise=self.penalise,
                    visible=attention.visible,
                    scale=attention.scale,
                )
                for layer in layers
            ]
        ).sum()


def _pose_distance(encoding: Tensor, target: Tensor) -> Tensor:
    """Huber distance of pose encodings; of the two quaternions of one rotation, the target nearer to the prediction."""
    same = (encoding[..., 3:7] * target[..., 3:7]).sum(-1, keepdim=True) >= 0
    signed = torch.where(same, target[..., 3:7], -target[..., 3:7])
    return F.smooth_l1_loss(encoding, torch.cat((target[..., :3], signed, target[..., 7:]), dim=-1), beta=0.1)


def _motion_between(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation ``[..., 4]`` and translation ``[..., 3]`` from the first camera's frame to the second's."""
    unit = [F.normalize(x[..., 3:7], dim=-1) for x in (first, second)]
    rotation = _multiply(unit[1], _conjugate(unit[0]))
    return rotation, second[..., :3] - _rotate(rotation, first[..., :3])


def _conjugate(q: Tensor) -> Tensor:
    return torch.cat((-q[..., :3], q[..., 3:]), dim=-1)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product of quaternions ``[..., 4]``, scalar last."""
    av, aw, bv, bw = a[..., :3], a[..., 3:], b[..., :3], b[..., 3:]
    vector = aw * bv + bw * av + torch.linalg.cross(av, bv)
    return torch.cat((vector, aw * bw - (av * bv).sum(-1, keepdim=True)), dim=-1)


def _rotate(q: Tensor, x: Tensor) -> Tensor:
    """Vectors ``[..., 3]`` turned by unit quaternions ``[..., 4]``."""
    twice = 2 * torch.linalg.cross(q[..., :3], x)
    return x + q[..., 3:] * twice + torch.linalg.cross(q[..., :3], twice)


def _check_valid(valid: Tensor, like: Tensor) -> None:
    if valid.dtype != torch.bool or valid.shape != like.shape:
        raise ValueError(f"valid must be bool {list(like.shape)}, got {valid.dtype} {list(valid.shape)}.")
