"""How good a reconstruction is: cameras after Sim(3) alignment, depth after scaling, motion masks."""

from .metrics import (
    CameraErrors,
    DepthErrors,
    Similarity,
    camera_errors,
    depth_errors,
    mask_counts,
    mask_iou,
    relative_pose_errors,
    similarity,
)

__all__ = [
    "CameraErrors",
    "DepthErrors",
    "Similarity",
    "camera_errors",
    "depth_errors",
    "mask_counts",
    "mask_iou",
    "relative_pose_errors",
    "similarity",
]
