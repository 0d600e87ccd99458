"""Runs methods beside their authors' code on the same random weights.

``python tests/helpers/upstream_methods.py NAME``.

``GATE4D_UPSTREAM_<NAME>`` gives the path of the checkout. TTT3R needs ``GATE4D_UPSTREAM_CUT3R`` as well, the model that
the method runs on; EASI3R takes ``GATE4D_UPSTREAM_DUST3R`` (DUSt3R or MonST3R) if it is given, and runs the method on
that, else on the authors' fork. Prints one JSON object: largest relative differences of maps, states and predictions,
and shares of labels and pixels that differ. What the checkouts import and none of this runs (viewers, optical flow,
SAM 2) is stubbed where it is missing; einops, cv2, roma, transformers, accelerate and open3d must be there where a
checkout computes with them.
"""

import importlib.abc
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.nn.functional as F
import upstream

import gate4d
from gate4d.data.procedural import render_clip
from gate4d.methods.refine import refine_masks
from gate4d.methods.segmentation import dynamic_masks

UNUSED = (
    "torchvision", "third_party", "sam2", "trimesh", "seaborn", "evo", "gsplat", "tensorboard", "huggingface_hub",
    "plotly", "dash", "gradio", "pyglet", "matplotlib", "viser", "imageio", "lpips",
)  # fmt: skip


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last on the path: a mock in place of a module that nothing here runs."""

    def find_spec(self, name, path=None, target=None):
        known = name.split(".")[0] in UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec):
        module = MagicMock(name=spec.name, __path__=[], __spec__=spec, __version__="9.0.0")
        module.__name__ = spec.name
        return module

    def exec_module(self, module):
        pass


def far(got, expected):
    """Largest difference relative to the largest entry."""
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def lively(model, gain=2.0):
    """Weights with enough contrast that attention, and so the maps, depend on the image; layer scales opened."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gamma"):
                p.fill_(0.2)
            elif p.dim() > 1 and not p.abs().sum():
                p.normal_(0, 0.02)
            elif p.dim() == 2:
                p.mul_(gain)
    return model.eval()


def pictures(frames, height, width):
    return render_clip(frames, height, width).frames.movedim(-1, 1) / 255


@torch.no_grad()
def easi3r():
    """Two passes over the pairs of a window, with the authors' inference, aggregation, clustering and masks."""
    model = lively(upstream.dust3r(False, easi3r=True)[0])
    from dust3r.cloud_opt.base_opt import BasePCOptimizer
    from dust3r.cloud_opt.optimizer import PointCloudOptimizer
    from dust3r.image_pairs import make_pairs
    from dust3r.inference import inference

    images = pictures(7, 96, 128)
    shape = np.int32([images.shape[-2:]])
    views = [{"img": x[None] * 2 - 1, "true_shape": shape, "idx": i, "instance": str(i)} for i, x in enumerate(images)]

    def theirs():
        found = inference(make_pairs(views, "swinstride-5-noncyclic"), model, "cpu", batch_size=1, verbose=False)
        pairs = [(int(i), int(j)) for i, j in zip(found["view1"]["idx"], found["view2"]["idx"], strict=True)]
        arguments = [found[name] for name in ("view1", "view2", "pred1", "pred2")]
        scene = BasePCOptimizer(*arguments, use_atten_mask=True, verbose=False)
        scene.imshape = scene.imshapes[0]  # set by the optimiser itself, which also computes optical flow
        PointCloudOptimizer.get_motion_mask_from_attns(scene)
        names = ("cross_att_k_i_mean", "cross_att_k_i_var", "cross_att_k_j_mean", "cross_att_k_j_var")
        maps = [scene.dynamic_map, *(getattr(scene, f"{name}_fused") for name in names)]
        masks = torch.stack([m.cpu() for m in scene.dynamic_masks])
        return found, pairs, maps, scene.refined_dynamic_map, scene.dynamic_map_labels, masks

    passes = [theirs()]
    for view, mask in zip(views, passes[0][-1], strict=True):
        view["atten_mask"] = mask[None]
    passes.append(theirs())
    if "GATE4D_UPSTREAM_DUST3R" in os.environ:
        result = elsewhere("DUST3R", {"weights": model.state_dict(), "images": images})
    else:
        result = easi3r_method(model, images)
    report = {"pairs": len(result.pairs), "same_pairs": sorted(result.pairs) == sorted(passes[0][1])}
    for name, ours, (found, pairs, maps, scores, labels, masks) in zip(
        ("first", "second"), (result.first, result), passes, strict=True
    ):
        order = [pairs.index(p) for p in result.pairs]
        report[name] = {
            "maps": max(far(a, b) for a, b in zip(ours.maps, maps, strict=True)),
            "labels_that_differ": float((ours.masks.labels.view_as(labels) != labels).float().mean()),
            "patch_scores": far(ours.masks.patch_scores.view_as(scores), scores),
            "mask_pixels_that_differ": float((ours.masks.masks != masks).float().mean()),
            "dynamic": float(masks.float().mean()),
            "predictions": max(
                far(torch.cat([p[side][key] for p in ours.predictions]), found[f"pred{side + 1}"][key][order])
                for side, keys in enumerate((("pts3d", "conf"), ("pts3d_in_other_view", "conf")))
                for key in keys
            ),
        }
    before, after = (found["pred1"]["pts3d"] for found, *_ in passes)
    report["effect_of_the_gate"] = far(after[[passes[1][1].index(p) for p in passes[0][1]]], before)
    return report


@torch.no_grad()
def easi3r_method(model, images):
    with gate4d.patch(model, method="easi3r", seed=42) as handle:
        return handle.run(images)


def dust3r(path):
    """Another process of :func:`easi3r`, because both checkouts claim the same names."""
    given = torch.load(path, weights_only=False)
    model = upstream.dust3r(False, easi3r=True)[0].eval()
    model.load_state_dict(given["weights"])
    torch.save(easi3r_method(model, given["images"]), path)


def elsewhere(name, given):
    """What another checkout's process makes of ``given``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exchange.pt"
        torch.save(given, path)
        done = subprocess.run([sys.executable, __file__, name, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(path, weights_only=False)


def recurrent_inputs():
    """Views for CUT3R and TTT3R, the same in both processes, with a reset after the fourth."""
    images, yes, no = pictures(8, 64, 96), torch.tensor([True]), torch.tensor([False])
    return [
        {
            "img": x[None] * 2 - 1, "true_shape": torch.tensor([[64, 96]]), "idx": i, "instance": str(i),
            "ray_map": torch.full((1, 64, 96, 6), float("nan")), "camera_pose": torch.eye(4)[None], "img_mask": yes,
            "ray_mask": no, "update": yes, "reset": yes if i == 3 else no,
        }
        for i, x in enumerate(images)
    ]  # fmt: skip


@torch.no_grad()
def ttt3r():
    """The authors' loop on their fork here, the method on CUT3R in another process: state and outputs by frame."""
    model = lively(upstream.cut3r(False, model_update_type="ttt3r")[0])
    states, rollout = [], model._recurrent_rollout
    model._recurrent_rollout = lambda state, *args, **more: (
        states.append(state.clone()) or rollout(state, *args, **more)
    )
    outputs = model.forward_recurrent_lighter(recurrent_inputs(), device="cpu")[0]
    model.config.model_update_type = "cut3r"
    plain = model.forward_recurrent_lighter(recurrent_inputs(), device="cpu")[0]
    steps = elsewhere("CUT3R", {"weights": model.state_dict()})

    def worst(a, b):
        return max(far(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in y)

    rates = torch.stack([s.rate for s in steps[1:4]])
    return {
        "states": max(far(s.state, x) for s, x in zip(steps[:-1], states[1 : len(steps)], strict=True)),
        "predictions": worst([s.prediction for s in steps], outputs),
        "effect_of_the_rates": worst(plain, outputs),
        "rates": [float(rates.amin()), float(rates.amax())],
    }


@torch.no_grad()
def cut3r(path):
    """Another process of :func:`ttt3r`."""
    model = upstream.cut3r(False)[0].eval()
    model.load_state_dict(torch.load(path, weights_only=False)["weights"])
    with gate4d.patch(model, method="ttt3r") as handle:
        torch.save(list(handle.method.stream(recurrent_inputs())), path)


@torch.no_grad()
def vggt4d():
    """The authors' aggregator with masks; their maps, clusters and thresholds; their refinement on a rendered clip."""
    from vggt.models.aggregator import Aggregator
    from vggt4d.masks import dynamic_mask
    from vggt4d.masks.refine_dyn_mask import RefineDynMask
    from vggt4d.models.aggregator import AggregatorFor4D
    from vggt4d.utils.model_utils import organize_qk_dict

    size = {"embed_dim": 128, "num_heads": 2, "depth": 24, "patch_embed": "conv"}
    fork, plain = lively(AggregatorFor4D(**size)), Aggregator(**size).eval()
    plain.load_state_dict(fork.state_dict())
    images = pictures(9, 84, 112)
    grid = 6, 8
    to = torch.Tensor.to  # their maps are moved to "cuda" by name
    torch.Tensor.to = lambda x, *args, **more: x if args[:1] == ("cuda",) else to(x, *args, **more)
    tokens, _, features, encoded = fork(images[None], enable_memory_saving=False)
    dyn = dynamic_mask.extract_dyn_map(organize_qk_dict(features, len(images)), images)
    torch.Tensor.to = to
    scores, labels = dynamic_mask.cluster_attention_maps(encoded.unflatten(1, grid), dyn)
    pixels = F.interpolate(scores[:, None], size=images.shape[-2:], mode="bilinear")[:, 0]
    masks = pixels > dynamic_mask.adaptive_multiotsu_variance(pixels.numpy())
    masked = fork(images[None], masks[None], enable_memory_saving=False)[0]

    captured = []
    holder = torch.nn.Module()
    holder.aggregator = plain

    def run(batch):
        captured.append(holder.aggregator(batch)[0])
        return {"pose": captured[-1][-1]}

    holder.forward = run
    with gate4d.patch(holder, method="vggt4d", seed=42) as handle:
        result = handle.run(images)
    report = {
        "first_pass": far(captured[0][-1], tokens[-1]),
        "dyn": far(result.saliency.dyn[0].unflatten(1, grid), dyn),
        "labels_that_differ": float((result.masks.labels.view_as(labels) != labels).float().mean()),
        "mask_pixels_that_differ": float((result.masks.masks != masks).float().mean()),
        "dynamic": float(masks.float().mean()),
        "second_pass": far(captured[1][-1], masked[-1]),
        "effect_of_the_masks": far(tokens[-1], masked[-1]),
    }
    # The rest from their saliency, so that a threshold met to the last bit decides the same.
    same = dynamic_masks(dyn.flatten(1), encoded, grid, tuple(images.shape[-2:]), seed=42)
    report["mask_pixels_that_differ_from_their_dyn"] = float((same.masks != masks).float().mean())

    clip = render_clip(8, 84, 112)
    unit, poses = clip.depth[0].mean(), clip.poses.clone().float()
    poses[:, :3, 3] /= unit
    coarse = F.max_pool2d(clip.masks[:, None].float(), 9, 1, 4)[:, 0] > 0
    coarse[:, 10:30, 20:40] = True
    scene = images_of(clip), clip.depth / unit, clip.intrinsics.float().repeat(8, 1, 1), poses
    refiner = RefineDynMask(*scene[:2], coarse, scene[3], scene[2], torch.device("cpu"))
    theirs = refiner.refine_masks()
    ours = refine_masks(coarse, *scene)
    report["refined_pixels_that_differ"] = float((ours != theirs).float().mean())
    report["refined_iou"] = [float((m & clip.masks).sum() / (m | clip.masks).sum()) for m in (coarse, theirs, ours)]
    return report


def images_of(clip):
    return clip.frames.movedim(-1, 1) / 255


RUNS = {
    "EASI3R": ((".",), easi3r),
    "DUST3R": ((".",), dust3r),
    "TTT3R": (("src",), ttt3r),
    "CUT3R": (("src",), cut3r),
    "VGGT4D": ((".",), vggt4d),
}


def main():
    folders, run = RUNS[sys.argv[1]]
    root = os.environ[f"GATE4D_UPSTREAM_{sys.argv[1]}"]
    sys.path[:0] = [os.path.join(root, f) for f in folders]
    sys.meta_path.append(Stubs())
    torch.manual_seed(0)
    print(json.dumps(run(*sys.argv[2:])))


if __name__ == "__main__":
    main()
