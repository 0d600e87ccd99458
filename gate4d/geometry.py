"""Cameras of the models: pose encodings, extrinsics and intrinsics, and points from depth.

Axes are those of OpenCV (x right, y down, z forward); pixel centres lie at integer + 1/2. A pose encoding ``[..., 9]``
is VGGT's: translation xyz and quaternion xyzw (scalar last) of world-to-camera, then the vertical and the horizontal
field of view in radians; the world is the camera of the first frame. The metric scale of a clip cannot be seen in it,
so translations and depths are in units of the mean depth of the first frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Quaternions xyzw ``[..., 4]`` of any length but 0 to rotations ``[..., 3, 3]``."""
    x, y, z, w = F.normalize(quaternion, dim=-1).unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """Rotations ``[..., 3, 3]`` to unit quaternions xyzw ``[..., 4]`` with w >= 0."""
    m = rotation.flatten(-2).unbind(-1)
    x, y, z, w = 1 + m[0] - m[4] - m[8], 1 - m[0] + m[4] - m[8], 1 - m[0] - m[4] + m[8], 1 + m[0] + m[4] + m[8]
    # Row i is 4 q_i q: each is right but for its length, and the longest has no cancellation.
    products = (
        (x, m[1] + m[3], m[2] + m[6], m[7] - m[5]),
        (m[1] + m[3], y, m[5] + m[7], m[2] - m[6]),
        (m[2] + m[6], m[5] + m[7], z, m[3] - m[1]),
        (m[7] - m[5], m[2] - m[6], m[3] - m[1], w),
    )
    candidates = torch.stack([torch.stack(row, dim=-1) for row in products], dim=-2)  # [..., 4, 4]
    longest = torch.stack((x, y, z, w), dim=-1).argmax(-1)[..., None, None].expand(*rotation.shape[:-2], 1, 4)
    quaternion = F.normalize(candidates.gather(-2, longest).squeeze(-2), dim=-1)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def invert(poses: Tensor) -> Tensor:
    """Rigid transforms ``[..., 4, 4]``, camera-to-world to world-to-camera and back."""
    rotation = poses[..., :3, :3].mT
    translation = -(rotation @ poses[..., :3, 3:])
    return torch.cat((torch.cat((rotation, translation), dim=-1), poses[..., 3:, :]), dim=-2)


def encode_pose(extrinsics: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """World-to-camera ``[..., 3 or 4, 4]`` and intrinsics ``[..., 3, 3]`` in pixels to pose encodings ``[..., 9]``."""
    fov_y = 2 * torch.atan(height / (2 * intrinsics[..., 1, 1]))
    fov_x = 2 * torch.atan(width / (2 * intrinsics[..., 0, 0]))
    rotation = matrix_to_quaternion(extrinsics[..., :3, :3])
    return torch.cat((extrinsics[..., :3, 3], rotation, fov_y[..., None], fov_x[..., None]), dim=-1)


def decode_pose(pose_enc: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pose encodings ``[..., 9]`` to world-to-camera ``[..., 4, 4]`` and intrinsics ``[..., 3, 3]`` in pixels.

    The principal point is the middle of the image.
    """
    extrinsics = pose_enc.new_zeros((*pose_enc.shape[:-1], 4, 4))
    extrinsics[..., :3, :3] = quaternion_to_matrix(pose_enc[..., 3:7])
    extrinsics[..., :3, 3] = pose_enc[..., :3]
    extrinsics[..., 3, 3] = 1
    intrinsics = pose_enc.new_zeros((*pose_enc.shape[:-1], 3, 3))
    intrinsics[..., 0, 0] = width / (2 * torch.tan(pose_enc[..., 8] / 2))
    intrinsics[..., 1, 1] = height / (2 * torch.tan(pose_enc[..., 7] / 2))
    intrinsics[..., 0, 2], intrinsics[..., 1, 2], intrinsics[..., 2, 2] = width / 2, height / 2, 1
    return extrinsics, intrinsics


def chained(steps: Tensor, before: Tensor | None = None) -> Tensor:
    """Pose encodings ``[B, T, 9]`` of frames from encodings of each relative to the frame before it.

    ``before [B, 9]`` is the encoding of the frame before the first; without one the first frame is the origin, whatever
    its step. Fields of view are those of the steps.
    """
    turns, shifts = quaternion_to_matrix(steps[..., 3:7]).unbind(1), steps[..., :3, None].unbind(1)
    with torch.autocast(steps.device.type, enabled=False):  # products of small turns leave nothing to 16 bits
        if before is None:
            turn, shift = torch.eye(3).to(steps).expand_as(turns[0]), torch.zeros_like(shifts[0])
        else:
            turn, shift = turns[0] @ quaternion_to_matrix(before[:, 3:7]), turns[0] @ before[:, :3, None] + shifts[0]
        found = [(turn, shift)]
        for by, along in zip(turns[1:], shifts[1:], strict=True):
            turn, shift = by @ turn, by @ shift + along
            found.append((turn, shift))
    turned, shifted = (torch.stack(x, dim=1) for x in zip(*found, strict=True))
    return torch.cat((shifted[..., 0], matrix_to_quaternion(turned), steps[..., 7:]), dim=-1)


def unproject(depth: Tensor, extrinsics: Tensor, intrinsics: Tensor) -> Tensor:
    """World points ``[..., H, W, 3]`` of depths ``[..., H, W]`` along the optical axis.

    ``extrinsics [..., 4, 4]`` are world-to-camera, ``intrinsics [..., 3, 3]`` in pixels.
    """
    height, width = depth.shape[-2:]
    y, x = (torch.arange(n, device=depth.device, dtype=depth.dtype) + 0.5 for n in (height, width))
    k = intrinsics[..., None, None]
    rays = torch.stack(
        torch.broadcast_tensors((x - k[..., 0, 2, :, :]) / k[..., 0, 0, :, :],
                                (y[:, None] - k[..., 1, 2, :, :]) / k[..., 1, 1, :, :]), dim=-1,
    )  # fmt: skip
    points = torch.cat((rays, torch.ones_like(rays[..., :1])), dim=-1) * depth[..., None]
    pose = invert(extrinsics)
    return points @ pose[..., None, :3, :3].mT + pose[..., None, None, :3, 3]


def normalised(poses: Tensor, depth: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a model is to predict for a clip: pose relative to the first frame, in units of its mean depth.

    Args:
        poses: camera-to-world ``[B, T, 4, 4]``, metres.
        depth: ``[B, T, H, W]``, metres along the optical axis.
        intrinsics: ``[B, T, 3, 3]``, pixels.

    Returns:
        ``pose_enc [B, T, 9]``, ``depth [B, T, H, W]`` in the clip's unit, and that unit in metres ``[B]``.
    """
    unit = depth[:, 0].mean((1, 2))
    relative = invert(poses) @ poses[:, :1]
    relative = torch.cat((relative[..., :3, :3], relative[..., :3, 3:] / unit[:, None, None, None]), dim=-1)
    pose_enc = encode_pose(relative, intrinsics, *depth.shape[-2:])
    return pose_enc, depth / unit[:, None, None, None], unit
