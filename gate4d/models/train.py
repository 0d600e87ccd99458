"""Training of the small models: ``python -m gate4d.models.train --model alternating --steps 6000 --seed 0 --out DIR``.

MoRe's recipe (:class:`gate4d.methods.losses.MoreRecipe`) on rendered clips, full and causal over frames in turn.
Step ``n`` depends on the seed, ``n`` and the step before alone, so a resumed training equals an uninterrupted one bit
for bit on a CPU with the same number of threads. The learning rate is constant after its warm-up and falls to 0 over
the last ``cooldown`` steps; so a longer training may go on from a shorter one stopped before its cool-down.

Runs on CPUs; ``--device cuda`` is untested.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import procedural
from ..geometry import normalised
from ..methods.losses import ForcedAttention, MoreRecipe
from ..nn.control import observing
from ..terminal import progress
from ..visibility import Visibility
from .files import MODELS, WeightsError, build, read_safetensors, save_weights

VALIDATION_SEED = 2**20
OVERLAP = 0.5  # weight of mask_overlap


class TrainingDiverged(FloatingPointError):
    """The loss or its gradient is not finite; the last good checkpoint is kept."""


@dataclass(frozen=True)
class Config:
    """Everything that decides the weights.

    Attributes:
        model: name of the model.
        steps: of the whole training.
        seed: of the initial weights and of the clips.
        size: height and width of the clips in pixels.
        batch_frames: frames of a batch, which holds as many clips as fit.
        lengths: frames of a clip, drawn for every batch.
        pace: between which the cameras' speeds lie, see :func:`gate4d.data.procedural.batches`; wider than the
            evaluation set's.
        causal: share of the steps that are causal over frames.
        forcing: whether MoRe's attention forcing is part of the loss.
        pose: factor on the weights of the pose terms, whose gradients are the largest and, late, the least regular.
        lr, warmup, cooldown, weight_decay, clip: of AdamW; the gradient's norm is clipped.
        ema: decay of the averaged weights, which are what is exported.
        bf16: whether the model runs under bf16 autocast.
        log_depth_after: the step from which the logarithm of depth is regressed, before it depth itself, whose squares
            leave little but the far hills to the loss.
        arguments: of the model.
    """

    model: str = "alternating"
    steps: int = 6000
    seed: int = 0
    size: tuple[int, int] = (64, 80)
    batch_frames: int = 16
    lengths: tuple[int, ...] = (4, 8, 12)
    pace: tuple[float, float] = (0.1, 2.0)
    causal: float = 0.6
    forcing: bool = True
    pose: float = 1.0
    lr: float = 1e-3
    warmup: int = 100
    cooldown: int = 800
    weight_decay: float = 0.02
    clip: float = 1.0
    ema: float = 0.998
    bf16: bool = True
    log_depth_after: int = 0
    arguments: str = "{}"

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model must be one of {sorted(MODELS)}, got {self.model!r}.")
        for name in ("steps", "batch_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if max(self.lengths) > self.batch_frames:
            raise ValueError(f"lengths must be at most batch_frames={self.batch_frames}, got {self.lengths}.")

    def build(self) -> nn.Module:
        """The model with its initial weights."""
        torch.manual_seed(self.seed)
        return build(self.model, **json.loads(self.arguments))

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return self.lr * max(
            0.0, min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / max(1, self.cooldown))
        )


def recipe(config: Config) -> MoreRecipe:
    """The terms of the loss and their weights, those that the shipped weights were trained with.

    That is the paper's equation 8 on all global blocks, with a weight that makes up for its ``1/M``, not the authors'
    product on a frame block; and gradients to both frames of a pair.
    """
    poses = {"pose": 2.0 * config.pose, "rotation": 20.0 * config.pose, "translation": 30.0 * config.pose}
    forced = {"forcing": 100.0, "form": "score hinge", "threshold": 0.5}
    standard = MoreRecipe(**poses, **forced, detach_earlier=False, depth=1.0, motion=4.0)
    return standard if config.forcing else replace(standard, forcing=0.0)


def clips(config: Config, step: int, cache: Path | None = None) -> tuple[procedural.Batch, bool]:
    """The batch of a step, and whether the step is causal; depends on the seed, the step and the sizes alone."""
    rng = np.random.default_rng([config.seed, step, 7])
    length = int(rng.choice(config.lengths))
    causal = bool(rng.random() < config.causal)
    count = max(1, config.batch_frames // length)
    return rendered(count, length, config, config.seed, step, cache), causal


def rendered(count: int, length: int, config: Config, seed: int, step: int, cache: Path | None = None):
    """A batch of clips; ``cache`` is a folder where trainings on the same clips share them (colours in 8 bits)."""
    batches = procedural.batches(count, length, *config.size, seed=seed, start=step, pace=config.pace)
    if cache is None:
        return next(batches)
    sizes = "x".join(map(str, (count, length, *config.size)))
    path = cache / f"2-{seed}-{step}-{sizes}-{config.pace[0]:g}-{config.pace[1]:g}.pt"
    if not path.exists():
        batch = next(batches)
        atomically(path, lambda f: torch.save({**batch._asdict(), "images": (batch.images * 255).round().byte()}, f))
    stored = torch.load(path)
    return procedural.Batch(**{**stored, "images": stored["images"] / 255})


def atomically(path: Path, write: Any) -> None:
    """``write(temporary path)``, then rename, so that no reader and no interruption sees half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)


def targets_of(batch: procedural.Batch) -> dict[str, Tensor]:
    """What the model is to predict for a batch; see :func:`gate4d.geometry.normalised`."""
    pose_enc, depth, _ = normalised(batch.poses, batch.depth, batch.intrinsics)
    return {"pose_enc": pose_enc, "depth": depth, "motion": batch.masks}


class Watch:
    """Queries and keys of the global blocks during a forward pass, with their gradients."""

    def __init__(self, model: nn.Module):
        self.blocks = model.aggregator.global_blocks if hasattr(model, "aggregator") else []
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> Watch:
        self._watching = observing(
            (block.attn.control, lambda q, k, scale, i=i: self.seen.__setitem__(i, (q, k)))
            for i, block in enumerate(self.blocks)
        )
        self._watching.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._watching.__exit__(*exc_info)


def losses(
    model: nn.Module, batch: procedural.Batch, causal: bool, config: Config, step: int = 0
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss of a batch, its terms, and the predictions."""
    terms, targets = recipe(config), targets_of(batch)
    log_depth = step >= config.log_depth_after
    if log_depth:
        targets["depth"] = targets["depth"].log()
    if not hasattr(model, "aggregator"):
        with autocast(config, batch.images.device):
            predictions = model(batch.images)
        loss, parts = terms.loss(in_logs(predictions) if log_depth else predictions, targets)
        overlap = mask_overlap(predictions["motion"], batch.masks)
        return loss + OVERLAP * overlap, {**parts, "overlap": overlap.detach()}, predictions
    layout = model.aggregator.layout(batch.images)
    with Watch(model) as watch, autocast(config, batch.images.device):
        predictions = model(batch.images, causal=causal, camera_pass=causal)
    attention = None
    if config.forcing:
        rows = {i: (q[:, :, : layout.num_tokens], k) for i, (q, k) in watch.seen.items()}
        visible = Visibility.frame_causal(layout) if causal else None
        attention = ForcedAttention(rows, layout, visible, model.aggregator.patch_size)
    loss, parts = terms.loss(in_logs(predictions) if log_depth else predictions, targets, attention)
    overlap = mask_overlap(predictions["motion"], batch.masks)
    loss, parts = loss + OVERLAP * overlap, {**parts, "overlap": overlap.detach()}
    if causal:  # the copies of the camera tokens, which see all frames
        extra, more = terms.loss({"pose_enc": predictions["global_pose_enc"]}, {"pose_enc": targets["pose_enc"]})
        loss, parts = loss + extra, {**parts, **{f"global {name}": x for name, x in more.items()}}
    return loss, parts, predictions


def in_logs(predictions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Predictions with the logarithm of their depth."""
    return {**predictions, "depth": predictions["depth"].log()}


def mask_overlap(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - soft IoU of the batch's masks: beside the BCE, because few pixels move and the IoU is what is asked for."""
    p, masks = logits.sigmoid(), masks.to(logits.dtype)
    inter = (p * masks).sum()
    return 1 - (inter + 1) / (p.sum() + masks.sum() - inter + 1)


def autocast(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.bf16)


def iou(logits: Tensor, masks: Tensor) -> tuple[int, int]:
    """Pixels in the intersection and in the union of the predicted and the true mask."""
    found = logits > 0
    return int((found & masks).sum()), int((found | masks).sum())


class Training:
    """A training in a folder: ``last.pt`` (checkpoint), ``log.csv``, ``curves.png``."""

    def __init__(self, config: Config, out: Path, *, cache: Path | None = None, device: str = "cpu"):
        self.config, self.out, self.cache, self.device = config, Path(out), cache, torch.device(device)
        self.out.mkdir(parents=True, exist_ok=True)
        self.model = config.build().to(self.device)
        self.average = [p.detach().clone() for p in self.model.parameters()]
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)
        self.step = 0
        self.rows: list[dict[str, float]] = []

    @property
    def checkpoint(self) -> Path:
        return self.out / "last.pt"

    def save(self) -> None:
        """Write the checkpoint and the log."""
        state = {
            "config": asdict(self.config), "step": self.step, "model": self.model.state_dict(),
            "average": self.average, "optimizer": self.optimizer.state_dict(), "rows": self.rows,
        }  # fmt: skip
        atomically(self.checkpoint, lambda f: torch.save(state, f))
        atomically(self.out / "log.csv", self._write_log)

    def load(self, path: Path | None = None) -> None:
        """Go on from a checkpoint, this folder's or another's.

        Raises:
            ValueError: it is of another configuration (what concerns only later steps may differ, and the forcing).
        """
        state = torch.load(path or self.checkpoint, map_location=self.device, weights_only=True)
        free = ("steps", "cooldown", "forcing", "pose", "log_depth_after")
        theirs = {n: tuple(x) if isinstance(x, list) else x for n, x in state["config"].items()}
        for name, ours in asdict(self.config).items():
            if name not in free and theirs.get(name) != ours:
                raise ValueError(f"{name} must be {theirs.get(name)!r} as in the checkpoint, got {ours!r}.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.rows, self.average = state["step"], state["rows"], state["average"]

    def start_from(self, path: Path) -> list[str]:
        """Begin with what another model's exported weights have in common with this one, by name and shape.

        The encoder, the comparison of frames and the heads of the two models are the same modules. Returns the names.
        """
        tensors = {n.removeprefix("aggregator."): x for n, x in read_safetensors(path)[0].items()}
        own = dict(self.model.named_parameters())
        shared = [n for n, x in tensors.items() if n in own and own[n].shape == x.shape]
        if not shared:
            raise WeightsError(f"{path} and the model {self.config.model!r} have no parameter in common.")
        with torch.no_grad():
            for name in shared:
                own[name].copy_(tensors[name])
        self.average = [p.detach().clone() for p in self.model.parameters()]
        return shared

    def advance(self) -> dict[str, float]:
        """One step; returns what is logged.

        Raises:
            TrainingDiverged: the loss or the gradient is not finite; neither weights nor checkpoint were changed.
        """
        start = time.perf_counter()
        config, model = self.config, self.model
        batch, causal = clips(config, self.step, self.cache)
        batch = type(batch)(*(x.to(self.device) for x in batch))
        data = time.perf_counter() - start
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(self.step)
        loss, terms, predictions = losses(model, batch, causal, config, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        if not bool(torch.isfinite(loss + norm)):
            what = {name: round(float(x), 4) for name, x in terms.items()}
            raise TrainingDiverged(
                f"loss {float(loss.detach()):g}, gradient norm {float(norm):g} at step {self.step} (terms {what}); "
                f"the last good checkpoint is {self.checkpoint}."
            )
        self.optimizer.step()
        decay = min(config.ema, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(model.parameters()), 1 - decay)
        self.step += 1
        inter, union = iou(predictions["motion"], batch.masks)
        row = {
            "step": self.step, "causal": int(causal), "loss": float(loss.detach()), "gradient": float(norm),
            "inter": inter, "union": union, "data_s": data, "step_s": time.perf_counter() - start,
        }  # fmt: skip
        return {**row, **{name: float(x) for name, x in terms.items()}}

    def averaged(self) -> nn.Module:
        """A copy of the model with the averaged weights, in eval mode."""
        model = build(self.config.model, **json.loads(self.config.arguments)).to(self.device)
        with torch.no_grad():
            for p, mean in zip(model.parameters(), self.average, strict=True):
                p.copy_(mean)
        return model.eval()

    def run(self, *, minutes: float = float("inf"), every: int = 100, validate: int = 200, stop: int | None = None):
        """Train until ``steps`` (or ``stop``) or the minutes are over, with a progress display.

        Raises:
            TrainingDiverged: see :meth:`advance`.
        """
        end, last = time.monotonic() + 60 * minutes, min(self.config.steps, stop or self.config.steps)
        recent: list[dict[str, float]] = []
        with progress("training", total=last, done=self.step) as show:
            while self.step < last and time.monotonic() < end:
                recent.append(self.advance())
                if self.step % 20 == 0 or self.step == last:
                    self.rows.append(mean_row(recent))
                    recent = []
                    show(about(self.rows[-1]), done=self.step)
                if self.step % validate == 0:
                    self.rows[-1].update(self.validate())
                    show(about(self.rows[-1]), done=self.step)
                if self.step % every == 0:
                    self.save()
        self.save()
        curves(self.rows, self.out / "curves.png")

    @torch.no_grad()
    def validate(self, batches: int = 3) -> dict[str, float]:
        """Motion IoU, pose and depth errors of the averaged weights on clips of other seeds than those trained on."""
        model, out = self.averaged(), {}
        for mode in (False, True):
            inter = union = 0
            rotation, translation, depth = [], [], []
            for n in range(batches):
                batch = rendered(3, 8, self.config, VALIDATION_SEED, n, self.cache)
                batch, targets = type(batch)(*(x.to(self.device) for x in batch)), targets_of(batch)
                p = model(batch.images, causal=mode) if hasattr(model, "aggregator") else model(batch.images)
                a, b = iou(p["motion"], batch.masks)
                inter, union = inter + a, union + b
                terms = MoreRecipe(forcing=0.0).loss({"pose_enc": p["pose_enc"]}, targets)[1]
                rotation.append(float(terms["rotation"]))
                translation.append(float(terms["translation"]))
                depth.append(float(((p["depth"][..., 0] - targets["depth"]).abs() / targets["depth"]).mean()))
            means = {"iou": inter / max(1, union), "rotation": np.mean(rotation), "translation": np.mean(translation)}
            means["absrel"] = np.mean(depth)
            out.update({f"{'causal' if mode else 'full'} {name}": float(x) for name, x in means.items()})
            if not hasattr(model, "aggregator"):
                break
        return {f"val {name}": x for name, x in out.items()}

    def export(self, path: Path, **metadata: str) -> None:
        """Averaged weights in 16 bits, with the configuration that made them."""
        about = {"model": self.config.model, "arguments": self.config.arguments, "step": str(self.step)}
        save_weights(self.averaged(), path, {**about, "config": json.dumps(asdict(self.config)), **metadata})

    def _write_log(self, path: Path) -> None:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, names)
            writer.writeheader()
            writer.writerows(
                {n: f"{x:.5g}" if isinstance(x, float) else x for n, x in row.items()} for row in self.rows
            )


def mean_row(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over steps; the motion IoU is that of all their pixels."""
    names = dict.fromkeys(name for row in rows for name in row)
    out = {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
    inter, union = (sum(row[name] for row in rows) for name in ("inter", "union"))
    del out["inter"], out["union"], out["causal"]
    return {**out, "step": int(rows[-1]["step"]), "iou": inter / max(1, union)}


def about(row: dict[str, float]) -> str:
    """A row of the log in a line, what matters most first."""
    first = f"step {row['step']}: loss {row['loss']:.3f} IoU {row['iou']:.2f}"
    return "  ".join([first, *(f"{n} {x:.3g}" for n, x in row.items() if n not in ("step", "loss", "iou"))])


def curves(rows: list[dict[str, float]], path: Path) -> None:
    """The log as a picture: terms of the loss, motion IoU, pose and depth errors."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("the curves need matplotlib: pip install 'gate4d[demo]'.") from e
    matplotlib.use("Agg")
    panels = {
        "motion IoU": ["iou", "val full iou", "val causal iou"],
        "motion (BCE)": ["motion"],
        "depth": ["depth", "val full absrel", "val causal absrel"],
        "relative pose": ["rotation", "translation", "global rotation", "global translation"],
        "pose, validation": [f"val {m} {t}" for m in ("full", "causal") for t in ("rotation", "translation")],
        "attention forcing": ["forcing"],
    }
    figure = Figure((12, 6.5), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, lw=1, marker="." if name.startswith("val") else "")
        axis.set_title(title)
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gate4d.models.train", description=__doc__.splitlines()[0])
    for f in fields(Config):
        if f.name in ("forcing", "bf16", "size", "lengths", "pace"):
            continue
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default)
    parser.add_argument("--size", type=int, nargs=2, default=Config.size, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--lengths", type=int, nargs="+", default=Config.lengths, help="frames of a clip")
    parser.add_argument("--pace", type=float, nargs=2, default=Config.pace, metavar=("SLOWEST", "FASTEST"))
    parser.add_argument("--no-forcing", dest="forcing", action="store_false", help="leave attention forcing out")
    parser.add_argument("--fp32", dest="bf16", action="store_false", help="no bf16 autocast")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint, log and curves")
    parser.add_argument("--resume", nargs="?", const=True, help="go on from OUT/last.pt, or from the checkpoint given")
    parser.add_argument(
        "--start-from", type=Path, help="exported weights, of either model, for what they have in common"
    )
    parser.add_argument("--cache", type=Path, help="folder where trainings share rendered clips")
    parser.add_argument("--stop", type=int, help="stop at this step, before the cool-down of a longer training")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--device", default="cpu", help="untested elsewhere")
    parser.add_argument("--export", type=Path, help="write the averaged weights here at the end (16-bit safetensors)")
    args = parser.parse_args(argv)
    config = Config(**{f.name: getattr(args, f.name) for f in fields(Config)})
    config = replace(config, size=tuple(config.size), lengths=tuple(config.lengths), pace=tuple(config.pace))
    if args.cache is not None:
        args.cache.mkdir(parents=True, exist_ok=True)
    training = Training(config, args.out, cache=args.cache, device=args.device)
    if args.start_from is not None:
        training.start_from(args.start_from)
    if args.resume:
        training.load(None if args.resume is True else Path(args.resume))
    try:
        training.run(minutes=args.minutes, stop=args.stop)
    except TrainingDiverged as e:
        sys.exit(f"TrainingDiverged: {e}")
    if args.export is not None:
        command = ["python", "-m", "gate4d.models.train", *(sys.argv[1:] if argv is None else argv)]
        training.export(args.export, command=shlex.join(command), seed=str(config.seed))


if __name__ == "__main__":
    main()
