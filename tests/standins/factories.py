"""Small models whose predictions have the form of the real ones', for ``gate4d run``."""

import torch
import torch.nn.functional as F
from torch import nn

from . import croco, vggt


class DenseVggt(vggt.Vggt):
    """Pose encodings, depth and its confidence for every pixel, motion logits."""

    def __init__(self, **size):
        super().__init__(**size)
        self.dense = nn.Linear(self.aggregator.special.shape[-1], 3)

    def forward(self, images):
        tokens = self.aggregator(images)[-1]
        side = self.aggregator.patch_size
        grid = images.shape[-2] // side, images.shape[-1] // side
        maps = self.dense(tokens[:, :, 5:]).unflatten(2, grid)
        maps = maps.repeat_interleave(side, 2).repeat_interleave(side, 3)
        pose = self.camera_head(tokens[:, :, 0])
        pose = torch.cat((pose[..., :3], F.normalize(pose[..., 3:7], dim=-1), 0.5 + pose[..., 7:].sigmoid()), dim=-1)
        return {
            "pose_enc": pose,
            "depth": maps[..., :1].exp(),
            "depth_conf": 1 + maps[..., 1].exp(),
            "motion": maps[..., 2] - maps[..., 2].mean(),
        }


class StillVggt(DenseVggt):
    """Nothing moves."""

    def forward(self, images):
        out = super().forward(images)
        return {**out, "motion": out["motion"].clamp(max=-1.0)}


class DenseSmall(DenseVggt):
    """Built by its class alone."""

    def __init__(self):
        super().__init__(dim=32, heads=2)


class FailingVggt(DenseSmall):
    def forward(self, images):
        return {"depth": 1 // 0}


class BlindVggt(DenseVggt):
    """Its fields of view are 0, as those of VGGT with random weights."""

    def forward(self, images):
        out = super().forward(images)
        return {**out, "pose_enc": out["pose_enc"] * torch.tensor([1.0] * 7 + [0.0] * 2)}


class DenseCut3r(croco.Cut3rSteps):
    """Points of every pixel in the world, their confidence and the camera, as CUT3R names them."""

    def _forward_decoder_step(self, views, *args):
        result, state = super()._forward_decoder_step(views, *args)
        _, _, height, width = views[-1]["img"].shape
        points = result["pts3d"][..., :3]  # [B, 1 + patches, 3]
        grid = points[:, 1:].unflatten(1, (height // 16, width // 16))
        camera = F.pad(F.normalize(points[:, 0] + 1, dim=-1), (3, 1))
        dense = grid.repeat_interleave(16, 1).repeat_interleave(16, 2)
        return {"pts3d_in_other_view": dense, "conf": dense[..., 0].exp(), "camera_pose": camera}, state


def _build(cls, **size):
    torch.manual_seed(0)
    model = cls(**size).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(1.5)
    return model


def dense_vggt():
    return _build(DenseVggt, dim=32, heads=2)


def still_vggt():
    return _build(StillVggt, dim=32, heads=2)


def deep_vggt():
    return _build(DenseVggt, depth=24, dim=32, heads=2)


def loaded_vggt():
    model = dense_vggt()
    model.load_state_dict(model.state_dict())
    return model


def failing_vggt():
    return _build(FailingVggt)


def blind_vggt():
    return _build(BlindVggt, depth=24, dim=32, heads=2)


def dense_cut3r():
    return _build(DenseCut3r)


def no_model():
    return {"weight": torch.zeros(1)}
