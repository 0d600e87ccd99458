"""Runs a real checkout with random weights unpatched and patched.

``python tests/helpers/upstream.py NAME [--true-shapes]``.

``GATE4D_UPSTREAM_<NAME>`` gives the path of the checkout. Prints one JSON object: largest relative difference, times,
CPU times, peak bytes of live tensors. One process per checkout, because several of them claim the same package names.
"""

import argparse
import contextlib
import functools
import importlib
import inspect
import json
import os
import sys
import time
import types
import weakref
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gate4d
from gate4d.nn import RoPE2D


def views(count, height, width, **more):
    shape = torch.tensor([[height, width]])
    return [
        {"img": torch.rand(1, 3, height, width) * 2 - 1, "true_shape": shape, "idx": i, "instance": str(i), **more}
        for i in range(count)
    ]


def dust3r(true, easi3r=False):
    from dust3r.model import AsymmetricCroCo3DStereo

    inf = float("inf")
    size = {"enc_embed_dim": 1024, "enc_depth": 2, "enc_num_heads": 16} if true else {
        "enc_embed_dim": 128, "enc_depth": 2, "enc_num_heads": 2}  # fmt: skip
    dec = (768, 12 if easi3r else 4, 12) if true else (192, 12, 12) if easi3r else (128, 2, 2)
    model = AsymmetricCroCo3DStereo(
        output_mode="pts3d", head_type="linear", depth_mode=("exp", -inf, inf), conf_mode=("exp", 1, inf),
        pos_embed="RoPE100", patch_embed_cls="PatchEmbedDust3R", landscape_only=False, img_size=(512, 512), **size,
        dec_embed_dim=dec[0], dec_depth=dec[1], dec_num_heads=dec[2],
    )  # fmt: skip
    inputs = views(2, *((288, 512) if true else (64, 96)))
    if easi3r:
        mask = torch.zeros(1, *inputs[0]["img"].shape[-2:], dtype=torch.bool)
        mask[:, :40, :40] = True
        inputs = [{**v, "atten_mask": mask} for v in inputs]
    return model, {"pair": lambda m: m(*inputs)}


def cut3r(true, loop="forward_recurrent", **config):
    from dust3r.model import ARCroco3DStereo, ARCroco3DStereoConfig

    inf = float("inf")
    shape = {
        "enc_embed_dim": 1024, "enc_depth": 2, "enc_num_heads": 16, "dec_embed_dim": 768, "dec_depth": 4,
        "dec_num_heads": 12, "state_size": 768,
    } if true else {
        "enc_embed_dim": 128, "enc_depth": 2, "enc_num_heads": 2, "dec_embed_dim": 128, "dec_depth": 2,
        "dec_num_heads": 2, "state_size": 64, "local_mem_size": 16, "state_dec_num_heads": 2,
    }  # fmt: skip
    model = ARCroco3DStereo(ARCroco3DStereoConfig(
        output_mode="pts3d+pose", head_type="linear", depth_mode=("exp", -inf, inf), conf_mode=("exp", 1, inf),
        pose_mode=("exp", -inf, inf), pos_embed="RoPE100", patch_embed_cls="PatchEmbedDust3R", landscape_only=False,
        img_size=(512, 512), state_pe="2d", rgb_head=True, pose_head=True, **shape,
    ))  # fmt: skip
    for name, value in config.items():
        setattr(model.config, name, value)
    rope = RoPE2D()  # upstream's Python version fails at the pose token's position -1; the encoder keeps its own
    for name, module in model.named_modules():
        if getattr(module, "rope", None) is not None and not name.startswith("enc_blocks."):
            module.rope = rope
    height, width = (288, 512) if true else (64, 96)
    yes, no = torch.tensor([True]), torch.tensor([False])
    inputs = views(
        2 if true else 4, height, width, ray_map=torch.full((1, height, width, 6), float("nan")),
        camera_pose=torch.eye(4)[None], img_mask=yes, ray_mask=no, update=yes, reset=no,
    )  # fmt: skip
    loops = dict.fromkeys(("forward_recurrent", loop))  # TTT3R: without and with its gate
    return model, {name: lambda m, name=name: getattr(m, name)(inputs, device="cpu")[0] for name in loops}


def vggt_like(module_name, class_name, true, aggregator="Aggregator"):
    """A VGGT copy whose depth and heads are fixed in its code: the classes its module names are given other sizes."""
    module = importlib.import_module(module_name)
    sizes = {"embed_dim": 1024, "num_heads": 16} if true else {"embed_dim": 384, "num_heads": 6}

    def sized(cls, **kwargs):
        return lambda *args, **given: cls(*args, **{**given, **kwargs})

    def dpt(cls):
        return lambda *args, **given: cls(*args, **{**given, "intermediate_layer_idx": [0, 1, 2, 3], "features": 64,
                                                    "out_channels": [64, 64, 64, 64]})  # fmt: skip

    setattr(module, aggregator, sized(getattr(module, aggregator), depth=2 if true else 4, patch_embed="conv", **sizes))
    module.DPTHead = dpt(module.DPTHead)
    model = getattr(module, class_name)(embed_dim=sizes["embed_dim"])
    model.depth_head = model.point_head = model.track_head = None  # depth barely reacts; poses and tokens do
    return model


def images(true, frames):
    return torch.rand(1, frames, 3, *((392, 518) if true else (56, 70)))


def vggt(true):
    model = vggt_like("vggt.models.vggt", "VGGT", true)
    batch = images(true, 3)

    def run(m):
        tokens = m.aggregator(batch)[0]
        return [tokens[-1], m.camera_head(tokens)[-1]]

    return model, {"clip": run}


def fastvggt(true):
    """One attention module: the whole model casts to bf16 in its code."""
    layers = [importlib.import_module(f"vggt.layers.{name}") for name in ("attention", "rope")]
    rows, columns = (28, 37) if true else (6, 8)
    dim, heads = (1024, 16) if true else (128, 2)
    rope = layers[1].RotaryPositionEmbedding2D()
    model = nn.Module()
    model.attn = layers[0].Attention(dim, heads, qk_norm=True, rope=rope, patch_width=columns, patch_height=rows)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) + 1
    pos = torch.cat((torch.zeros(5, 2, dtype=torch.long), grid)).repeat(1, 3, 1)
    x = torch.randn(1, pos.shape[1], dim)
    return model, {"plain": lambda m: m.attn(x, pos=pos), "merged": lambda m: m.attn(x, pos=pos, global_merging=3)}


def streamvggt(true):
    model = vggt_like("streamvggt.models.streamvggt", "StreamVGGT", true)
    batch = images(true, 12 if true else 4)

    def clip(m):
        tokens = m.aggregator(batch[:, :4])[0]
        return [tokens[-1], m.camera_head(tokens)[-1]]

    def stream(m):
        past, past_camera, results, times = [None] * m.aggregator.depth, [None] * m.camera_head.trunk_depth, [], []
        for i in range(batch.shape[1]):
            begin = time.process_time()
            tokens, _, past = m.aggregator(batch[:, i : i + 1], past_key_values=past, use_cache=True, past_frame_idx=i)
            pose, past_camera = m.camera_head(tokens, past_key_values_camera=past_camera, use_cache=True)
            times.append(time.process_time() - begin)
            results += [tokens[-1], pose[-1]]
        stream.seconds = times
        cache = getattr(past[0][0], "cache", None)
        stream.bytes = sum(x.numel() * x.element_size() for x in past[0]) if cache is None else cache.nbytes
        return results

    return model, {"clip": clip, "stream": stream}


def stream3r(true):
    model = vggt_like("stream3r.models.stream3r", "STream3R", true, aggregator="STreamAggregator")
    batch = images(true, 8)
    model.depth_head, model.point_head = None, None

    def clip(mode):
        def run(m):
            tokens = m.aggregator(batch, mode=mode)[0]
            return [tokens[-1], m.camera_head(tokens, mode=mode)[-1]]

        return run

    def session(mode):
        def run(m):
            caches = [[None, None] for _ in range(m.aggregator.depth)]
            results = []
            for i in range(batch.shape[1]):
                tokens, _, caches = m.aggregator(batch[:, i : i + 1], mode=mode, kv_cache_list=caches)
                results.append(tokens[-1])
                size = tokens[-1].shape[2]
                if mode == "window":  # as its session cuts the cache
                    for pair in caches:
                        for part in range(2):
                            x = pair[part]
                            pair[part] = torch.cat((x[:, :, :size], x[:, :, max(size, x.size(2) - 5 * size) :]), dim=2)
            return results

        return run

    runs = {mode: clip(mode) for mode in ("causal", "window", "full")}
    return model, {**runs, **{f"session {mode}": session(mode) for mode in ("causal", "window")}}


def pi3(true):
    model = importlib.import_module("pi3.models.pi3").Pi3()
    model.encoder.blocks, model.decoder = model.encoder.blocks[:2], model.decoder[:4]
    batch = images(true, 2)
    return model, {"clip": lambda m: {k: v for k, v in m(batch).items() if isinstance(v, torch.Tensor)}}


def omega(true):
    from vggt_omega.models.aggregator import Aggregator

    model = Aggregator(depth=4, register_attention_block_indices=[2], cached_layer_indices=(1, 3))
    for module in model.modules():
        if hasattr(module, "bias_mask"):
            module.bias_mask.fill_(1.0)
            third = len(module.bias_mask) // 3
            module.bias_mask[third : 2 * third] = 0
    batch = torch.rand(1, 2, 3, *((384, 384) if true else (64, 96)))
    return model, {"clip": lambda m: [x for x in tree_leaves(m(batch)) if isinstance(x, torch.Tensor)]}


def stub(name, **attributes):
    """A module that need not be installed, with its parents."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:n]), types.ModuleType(parts[n - 1]))
    vars(sys.modules[name]).update(attributes)


def range_kernel(q, k, v, q_ranges, k_ranges, attn_type_map, softmax_scale=None, **_):
    """MagiAttention's kernel runs on Hopper; here a dense mask over ``[N, H, D]``."""
    mask = torch.zeros(len(q), len(k), dtype=torch.bool)
    for (a, b), (c, d) in zip(q_ranges.tolist(), k_ranges.tolist(), strict=True):
        mask[a:b, c:d] = True
    parts = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=softmax_scale)
    return out[0].transpose(0, 1).contiguous(), None


def more_model(true, **options):
    """MoRe's model; its code wants 24 + 24 blocks. Its plain aggregator is mended so that it runs."""
    stub("magi_attention.functional.flex_flash_attn", flex_flash_attn_func=range_kernel)
    stub("magi_attention.common.enum", AttnMaskType=object)
    for name in ("einops", "matplotlib.pyplot", "huggingface_hub"):
        try:
            importlib.import_module(name)
        except ImportError:
            stub(name, rearrange=None, repeat=None, PyTorchModelHubMixin=type("Mixin", (), {}))
    module = importlib.import_module("vggt.models.vggt")
    dim = 1024 if true else 128
    made = {}
    for name in ("Aggregator", "StreamAggregator"):
        cls = importlib.import_module("vggt.models.aggregator").__dict__[name]
        made[name] = functools.partial(mended(cls), patch_embed="conv")
    with mock.patch.multiple(module, **made, DPTHead=lambda **k: nn.Identity(), TrackHead=None):
        model = module.VGGT(embed_dim=dim, enable_track=False, **options)
    model.depth_head = model.point_head = model.motion_head = None
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gamma"):
                p.fill_(0.2)
            elif name.endswith(("camera_token", "register_token")):
                p.normal_()
    return model.eval()


def mended(cls):
    """The aggregator calls its own method with an argument that it does not take."""
    method = cls._process_global_attention
    if "save_attn" in inspect.signature(method).parameters or cls.__name__ != "Aggregator":
        return cls
    accepts = lambda self, *args, save_attn=0, **call: method(self, *args, **call)  # noqa: E731
    return type(cls.__name__, (cls,), {"_process_global_attention": accepts})


class MoreModels(nn.Module):
    """The two configurations of MoRe's stream: a clip by key ranges, and frames with a cache."""

    def __init__(self, true):
        super().__init__()
        self.clip = more_model(true, block_size=1, additional_token=True)
        self.stream = more_model(true, block_size=0, stream=True)


def more(true):
    batch = images(true, 3)

    def stream(m):
        aggregator = m.stream.aggregator
        aggregator.global_kv_cache = [{"k": None, "v": None} for _ in range(aggregator.depth)]
        return [m.stream(batch[:, i : i + 1])["pose_enc"] for i in range(batch.shape[1])]

    def clip(m):
        out = m.clip(batch)
        return [out[name] for name in ("attn_weight", "pose_enc", "dup_pose_enc")] + m.clip.aggregator(batch)[0]

    return MoreModels(true), {"clip": clip, "stream": stream}


BUILDERS = {
    "DUST3R": ((".",), dust3r),
    "EASI3R": ((".",), lambda true: dust3r(true, easi3r=True)),
    "CUT3R": (("src",), cut3r),
    "TTT3R": (("src",), lambda true: cut3r(true, "forward_recurrent_lighter", model_update_type="ttt3r")),
    # Forks of TTT3R, which read its maps in other ways.
    "RECAL3R": (("src",), lambda true: cut3r(true, "forward_recurrent_lighter", model_update_type="recal3r")),
    "TTSA3R": (("src",), cut3r),
    "FILT3R": (("src",), lambda true: cut3r(true, "forward_recurrent_lighter", model_update_type="filt3r")),
    "VGGT": (("src", "."), vggt),
    "FASTVGGT": ((".",), fastvggt),
    "STREAMVGGT": (("src",), streamvggt),
    "STREAM3R": ((".",), stream3r),
    "PI3": ((".",), pi3),
    "VGGT_OMEGA": ((".",), omega),
    "MORE": ((".",), more),
}


class PeakBytes(TorchDispatchMode):
    """Peak of the bytes of tensors made inside and alive at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def release(self, key, size):
        self.known.discard(key)
        self.live -= size


def tensors(result):
    return [x.detach().float() for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def measure(run, model, memory):
    tracker = PeakBytes() if memory else contextlib.nullcontext()
    wall, begin = time.perf_counter(), time.process_time()
    with tracker:
        result = run(model)
    # Of all threads; unlike wall time it does not grow when others use the machine.
    report = {"cpu_seconds": round(time.process_time() - begin, 3)}
    report["seconds"] = round(time.perf_counter() - wall, 3)
    if memory:
        report["peak_mib"] = round(tracker.peak / 2**20, 1)
    if hasattr(run, "seconds"):
        report |= {"frame_cpu_seconds": [round(s, 3) for s in run.seconds], "cache_bytes": run.bytes}
    return tensors(result), report


def faster(one, other):
    return {**one, **other} if other["cpu_seconds"] < one["cpu_seconds"] else one


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=sorted(BUILDERS))
    parser.add_argument("--true-shapes", action="store_true", help="true widths, heads and tokens, fewer layers")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--repeat", type=int, default=0, help="more rounds; the fastest counts")
    parser.add_argument("--runs", nargs="*", help="names of runs, all if not given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--window", type=int, help="option of patch: frames that a stream keeps")
    parser.add_argument("--anchors", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options = {} if args.window is None else {"window": args.window, "anchors": args.anchors}
    folders, build = BUILDERS[args.name]
    root = os.environ[f"GATE4D_UPSTREAM_{args.name}"]
    sys.path[:0] = [os.path.join(root, f) for f in folders]
    os.chdir(root)
    torch.manual_seed(0)
    model, runs = build(args.true_shapes)
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.2)  # layer scales start at 1e-5: attention would not reach the outputs
            elif isinstance(parameter, nn.Parameter) and parameter.dim() > 1 and not parameter.abs().sum():
                parameter.normal_(0, 0.02)
        keys, report = list(model.state_dict()), {"name": args.name, "runs": {}}
        for name, run in runs.items():
            if args.runs and name not in args.runs:
                continue
            expected, before = measure(run, model, args.memory)
            with gate4d.patch(model, **options) as handle:
                got, after = measure(run, model, args.memory)
                assert list(model.state_dict()) == keys
                report["families"], report["modules"] = handle.table.families, len(handle.table)
                report["notes"] = handle.table.notes
                report["parts"] = [part.__name__ for _, part in handle.table.parts]
                report["unused"] = [r.name for r in handle.table if r.tokens is None]
            for _ in range(args.repeat):  # alternating, so that a slow spell of the machine meets both
                before = faster(before, measure(run, model, False)[1])
                with gate4d.patch(model, **options):
                    after = faster(after, measure(run, model, False)[1])
            restored = tensors(run(model)) if not args.true_shapes else expected
            difference = [
                float((a - b).nan_to_num().abs().max() / b.nan_to_num().abs().max().clamp(min=1e-30))
                for a, b in zip(got, expected, strict=True)
            ]
            report["runs"][name] = {
                "difference": max(difference),
                "restored": all(
                    torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(restored, expected, strict=True)
                ),
                "unpatched": before,
                "patched": after,
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
