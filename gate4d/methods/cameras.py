"""Cameras among the predictions of the models, in either of the two forms that they have.

9 numbers are VGGT's encoding (see :mod:`gate4d.geometry`): world to camera, quaternion xyzw, two fields of view. 7
numbers are CUT3R's: camera to world, translation, then a quaternion with the scalar first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..geometry import decode_pose, invert, matrix_to_quaternion, quaternion_to_matrix

CAMERAS = ("pose_enc", "camera_pose")  # in the order of preference
WORLD_POINTS = ("world_points", "pts3d_in_other_view")
_SCALAR_LAST = [4, 5, 6, 3]  # of CUT3R's 7 numbers
_SCALAR_FIRST = [3, 0, 1, 2]  # of a quaternion xyzw


def camera_poses(encoding: Tensor) -> Tensor:
    """Camera to world ``[..., 4, 4]``, in the encoding's dtype, of encodings ``[..., 7]`` or ``[..., 9]``.

    Raises:
        ValueError: the encoding has another length.
    """
    if encoding.shape[-1] == 9:
        return invert(decode_pose(encoding, 1, 1)[0])
    if encoding.shape[-1] != 7:
        raise ValueError(f"encoding must have 7 or 9 numbers, got {list(encoding.shape)}.")
    pose = encoding.new_zeros((*encoding.shape[:-1], 4, 4))
    pose[..., :3, :3] = quaternion_to_matrix(encoding[..., _SCALAR_LAST])
    pose[..., :3, 3] = encoding[..., :3]
    pose[..., 3, 3] = 1
    return pose


def moved_camera(encoding: Tensor, base: Tensor) -> Tensor:
    """The encoding ``[B, ..., 7 or 9]`` of the same cameras in the world that ``base [B, 4, 4]`` maps theirs to."""
    base = _as(base, encoding.dim() - 1)
    pose = base @ camera_poses(encoding.to(base.dtype))
    if encoding.shape[-1] == 9:
        pose = invert(pose)
    quaternion = matrix_to_quaternion(pose[..., :3, :3])
    if encoding.shape[-1] == 7:
        quaternion = quaternion[..., _SCALAR_FIRST]
    return torch.cat((pose[..., :3, 3], quaternion, encoding[..., 7:].to(base.dtype)), dim=-1).to(encoding.dtype)


def moved_points(points: Tensor, base: Tensor) -> Tensor:
    """Points ``[B, ..., 3]`` moved by ``base [B, 4, 4]``, in their dtype."""
    base = _as(base, points.dim() - 1).to(torch.promote_types(points.dtype, torch.float32))
    return ((base[..., :3, :3] @ points.to(base.dtype)[..., None])[..., 0] + base[..., :3, 3]).to(points.dtype)


def moved_prediction(prediction: Mapping[str, Any], base: Tensor) -> dict[str, Any]:
    """A prediction whose cameras and world points are in the world that ``base [B, 4, 4]`` maps theirs to."""
    if not isinstance(prediction, Mapping):
        return prediction
    moved = dict(prediction)
    for name in CAMERAS:
        if isinstance(moved.get(name), Tensor):
            moved[name] = moved_camera(moved[name], base)
    for name in WORLD_POINTS:
        if isinstance(moved.get(name), Tensor):
            moved[name] = moved_points(moved[name], base)
    return moved


def predicted_camera(prediction: Any) -> Tensor | None:
    """The encoding ``[B, 7 or 9]`` of a prediction of one frame, None where it has none."""
    for name in CAMERAS:
        found = prediction.get(name) if isinstance(prediction, Mapping) else None
        if isinstance(found, Tensor) and found.shape[-1] in (7, 9):
            return found.flatten(1, -2)[:, 0] if found.dim() > 2 else found
    return None


def _as(base: Tensor, dims: int) -> Tensor:
    """``[B, 4, 4]`` with axes of 1 after the first, so that it broadcasts against ``dims`` leading axes."""
    return base.reshape(len(base), *(1,) * (dims - 1), 4, 4)
