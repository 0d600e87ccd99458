"""How good a reconstruction is: cameras after Sim(3) alignment, depth after scaling, motion masks, point clouds."""

from .cameras import (
    CameraErrors,
    PairErrors,
    Similarity,
    camera_errors,
    is_degenerate,
    pair_errors,
    relative_pose_errors,
    similarity,
)
from .depth import DepthErrors, depth_errors, mean_depth_errors
from .masks import (
    MaskScores,
    VideoScores,
    frame_boundaries,
    frame_ious,
    mask_counts,
    mask_iou,
    mask_scores,
    video_scores,
)
from .points import PointErrors, icp, normals, point_errors

__all__ = [
    "CameraErrors",
    "DepthErrors",
    "MaskScores",
    "PairErrors",
    "PointErrors",
    "Similarity",
    "VideoScores",
    "camera_errors",
    "depth_errors",
    "frame_boundaries",
    "frame_ious",
    "icp",
    "is_degenerate",
    "mask_counts",
    "mask_iou",
    "mask_scores",
    "mean_depth_errors",
    "normals",
    "pair_errors",
    "point_errors",
    "relative_pose_errors",
    "similarity",
    "video_scores",
]
