"""MoRe on a real checkout with random weights: ``python tests/helpers/upstream_more.py NAME [--true-shapes]``.

``GATE4D_UPSTREAM_<NAME>`` gives the path of the checkout. Prints one JSON object: differences of the stream from the
causal forward relative to the largest entry, by how much the camera pass moves the cameras, CPU seconds, bytes held.
"""

import argparse
import importlib
import json
import os
import sys
import time
from unittest.mock import MagicMock

import torch
import upstream

import gate4d

CLASSES = {
    "VGGT": ("vggt.models.vggt", "VGGT", "Aggregator"),
    "STREAMVGGT": ("streamvggt.models.streamvggt", "StreamVGGT", "Aggregator"),
    "STREAM3R": ("stream3r.models.stream3r", "STream3R", "STreamAggregator"),
    "MORE": None,
}


class Mixin:
    """In place of the model hub's, which nothing here needs."""


def stub(name, **attributes):
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = MagicMock(**attributes)
        sys.modules[name.split(".")[0]] = sys.modules.get(name.split(".")[0], MagicMock())


def build(name, true):
    stub("huggingface_hub", PyTorchModelHubMixin=Mixin)
    stub("einops")
    stub("transformers.file_utils", ModelOutput=object)
    where, cls, aggregator = CLASSES[name]
    model = upstream.vggt_like(where, cls, true, aggregator)
    if not true:  # full-size heads would hide what the attention costs
        module, dim = importlib.import_module(where), 2 * 384
        model.depth_head = module.DPTHead(dim_in=dim, output_dim=2, activation="exp", conf_activation="expp1")
        model.point_head = module.DPTHead(dim_in=dim, output_dim=4, activation="inv_log", conf_activation="expp1")
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("gamma"):
                p.fill_(0.2)  # layer scales start at 1e-5: attention would not reach the outputs
            elif key.endswith(("camera_token", "register_token")):
                p.normal_()
    return model.eval()


class CamerasOnly(torch.nn.Module):
    """Aggregator and camera head."""

    def __init__(self, model):
        super().__init__()
        self.aggregator, self.camera_head = model.aggregator, model.camera_head

    def forward(self, images):
        return {"pose_enc": self.camera_head(self.aggregator(images)[0])[-1]}


def outputs(prediction):
    """Cameras and depths of a prediction, in the forms that the three models have."""
    frames = getattr(prediction, "ress", None)
    if frames is None:
        return [prediction["pose_enc"], prediction["depth"]]
    return [torch.stack([f[key] for f in frames], dim=1) for key in ("camera_pose", "depth")]


def far(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


def authors():
    """Of MoRe's own model the stream and the camera pass beside its forward, by key ranges and with a cache."""
    model = upstream.more_model(False, block_size=1, additional_token=True)
    images = torch.rand(5, 3, 56, 70)
    tokens, expected = model.aggregator(images[None])[0][-1], model(images[None])
    stream = upstream.more_model(False, block_size=0, additional_token=True, stream=True)
    stream.load_state_dict(model.state_dict())
    report = {}
    for name, m in (("ranges", model), ("cache", stream)):
        seen = []
        hook = m.camera_head.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][-1]))
        with gate4d.patch(m, method="more") as handle:
            result = handle.run(images)
        hook.remove()
        report[f"{name}: tokens"] = far(torch.cat(seen[: len(images)], dim=1), tokens[:, :, : seen[0].shape[2]])
        report[f"{name}: camera pass"] = far(result.cameras, expected["dup_pose_enc"])
    report["camera pass moves"] = far(expected["dup_pose_enc"], expected["pose_enc"])
    return report


def seconds(run):
    begin = time.process_time()
    run()
    return round(time.process_time() - begin, 2)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CLASSES)
    parser.add_argument("--true-shapes", action="store_true", help="true widths and tokens, 2 + 2 blocks: measures")
    args = parser.parse_args()
    root = os.environ[f"GATE4D_UPSTREAM_{args.name}"]
    sys.path[:0] = [os.path.join(root, folder) for folder in upstream.BUILDERS[args.name][0]]
    torch.manual_seed(0)
    if args.name == "MORE":
        print(json.dumps({"name": args.name, **authors()}))
        return
    model, report = build(args.name, args.true_shapes), {"name": args.name}
    if args.true_shapes:
        torch.set_num_threads(1)
        model, images = CamerasOnly(model), torch.rand(8, 3, 392, 518)
        for options in ({}, {"window": 3, "anchors": 1}, {"camera_pass": False}):
            with gate4d.patch(model, method="more", **options) as handle:
                stream = handle.method.stream(images)
                row = {"frames": [seconds(lambda s=stream: next(s)) for _ in images]}
                row["cache_bytes"] = sum(c.nbytes for c in stream.caches)
                row["row_bytes"] = sum(x.nbytes for kept in (stream.start, *stream.steps) for x in kept.values())
                if options.get("camera_pass", True):
                    row["camera_pass"] = seconds(stream.camera_pass)
                report[str(options)] = row
        for method in ("more", None):
            with gate4d.patch(model, method=method):
                report[f"clip at once, method {method}"] = seconds(lambda: model(images[None]))
    else:
        images = torch.rand(6, 3, 56, 70)
        clip = [{"img": image[None]} for image in images] if args.name == "STREAMVGGT" else images[None]
        with gate4d.patch(model, method="more") as handle:
            expected, stream = outputs(model(clip)), handle.method.stream(images)
            steps = list(stream)
            got = [torch.cat(x, dim=1) for x in zip(*(outputs(s.prediction) for s in steps), strict=True)]
            cameras = torch.stack([s.camera for s in steps], dim=1)
            report |= {key: far(*x) for key, *x in zip(("pose", "depth"), got, expected, strict=True)}
            report["camera pass"] = far(stream.camera_pass()[1], cameras)
        report["causality"] = far(outputs(model(clip))[0], expected[0])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
