"""How good a reconstruction is: cameras after Sim(3) alignment, depth after scaling, motion masks."""

from .metrics import (
    CameraErrors,
    DepthErrors,
    MaskScores,
    Similarity,
    camera_errors,
    depth_errors,
    frame_ious,
    mask_counts,
    mask_iou,
    mask_scores,
    mean_depth_errors,
    relative_pose_errors,
    similarity,
)

__all__ = [
    "CameraErrors",
    "DepthErrors",
    "MaskScores",
    "Similarity",
    "camera_errors",
    "depth_errors",
    "frame_ious",
    "mask_counts",
    "mask_iou",
    "mask_scores",
    "mean_depth_errors",
    "relative_pose_errors",
    "similarity",
]
