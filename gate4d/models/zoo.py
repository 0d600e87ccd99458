"""Upstream models by name: which class of a checkout, and how it is built from a checkpoint.

The code of a checkout is imported and so runs; the checkpoint is only read (:mod:`.checkpoints`). Structure was read in
the repositories named; nothing of theirs is here. No checkpoint was available: building and loading were tried on the
real classes with random weights, in the files that their own code would write.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import SUFFIXES, Checkpoint, arguments_of, read_checkpoint, read_config
from .files import WeightsError

_HUB_FILES = ("model.safetensors", "model.pt", "pytorch_model.bin", "checkpoints.pth")


@dataclass(frozen=True)
class Upstream:
    """A model of an upstream repository.

    Attributes:
        repository: owner/name at GitHub.
        target: ``module:class``.
        hub: a checkpoint of it at the Hugging Face hub, owner/name.
        build: the class, its module and the checkpoint to a model.
        marks: starts of names, without a wrapper's prefix, all of which the weights of this model have.
        folders: of a checkout, those that go onto the path.
    """

    repository: str
    target: str
    hub: str
    build: Callable[[Any, ModuleType, Checkpoint], nn.Module]
    marks: tuple[str, ...]
    folders: tuple[str, ...] = (".",)


def _by_config(cls: Any, module: ModuleType, checkpoint: Checkpoint) -> nn.Module:
    """With those arguments of the checkpoint's ``config.json`` that the constructor has; else with its defaults."""
    config = checkpoint.config or {}
    parameters = inspect.signature(cls).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        config = {p.name: config[p.name] for p in parameters if p.name in config}
    return cls(**config)


def _dust3r(cls: Any, module: ModuleType, checkpoint: Checkpoint) -> nn.Module:
    """With the arguments of the call that the training run noted, or of ``config.json``."""
    return cls(**_family_arguments(checkpoint))


def _cut3r(cls: Any, module: ModuleType, checkpoint: Checkpoint) -> nn.Module:
    return cls(getattr(module, f"{cls.__name__}Config")(**_family_arguments(checkpoint)))


def _ttt3r(cls: Any, module: ModuleType, checkpoint: Checkpoint) -> nn.Module:
    model = _cut3r(cls, module, checkpoint)
    model.config.model_update_type = "ttt3r"
    return model


def _family_arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    """As the family's own loaders have them: frames are not turned to landscape, and have one aspect ratio."""
    args = checkpoint.args or {}
    if isinstance(args.get("model"), str):
        known = arguments_of(args["model"])
    elif checkpoint.config is not None:
        known = {n: x for n, x in checkpoint.config.items() if not n.startswith("_")}
        for name, x in known.items():  # JSON has no tuples, and may have no infinities
            known[name] = tuple(_number(y) for y in x) if isinstance(x, list) else x
    else:
        raise WeightsError(
            f"{checkpoint.source} says nothing of how its model was built: it must have the training run's args, with "
            "the model's call, or a config.json beside it."
        )
    if known.get("patch_embed_cls") == "ManyAR_PatchEmbed":
        known["patch_embed_cls"] = "PatchEmbedDust3R"
    return known | {"landscape_only": False}


def _number(x: Any) -> Any:
    return float(x) if isinstance(x, str) and x.lower().lstrip("+-") in ("inf", "infinity") else x


_VGGT_MARKS = ("aggregator.frame_blocks.", "aggregator.global_blocks.", "camera_head.")
ZOO = {
    "dust3r": Upstream(
        "naver/dust3r", "dust3r.model:AsymmetricCroCo3DStereo", "naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt", _dust3r,
        ("enc_blocks.", "dec_blocks.", "downstream_head1."),
    ),
    "mast3r": Upstream(
        "naver/mast3r", "mast3r.model:AsymmetricMASt3R",
        "naver/MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric", _dust3r,
        ("enc_blocks.", "dec_blocks2.", "downstream_head1.head_local_features."),
    ),
    "monst3r": Upstream(
        "Junyi42/monst3r", "dust3r.model:AsymmetricCroCo3DStereo",
        "Junyi42/MonST3R_PO-TA-S-W_ViTLarge_BaseDecoder_512_dpt", _dust3r,
        ("enc_blocks.", "dec_blocks.", "downstream_head1."),
    ),
    "cut3r": Upstream(
        "CUT3R/CUT3R", "dust3r.model:ARCroco3DStereo", "CUT3R/cut3r_512_dpt_4_64", _cut3r,
        ("enc_blocks.", "dec_blocks_state.", "pose_retriever."), ("src",),
    ),
    "ttt3r": Upstream(
        "Inception3D/TTT3R", "dust3r.model:ARCroco3DStereo", "CUT3R/cut3r_512_dpt_4_64", _ttt3r,
        ("enc_blocks.", "dec_blocks_state.", "pose_retriever."), ("src",),
    ),
    "vggt": Upstream("facebookresearch/vggt", "vggt.models.vggt:VGGT", "facebook/VGGT-1B", _by_config, _VGGT_MARKS),
    "streamvggt": Upstream(
        "wzzheng/StreamVGGT", "streamvggt.models.streamvggt:StreamVGGT", "lch01/StreamVGGT", _by_config,
        _VGGT_MARKS, ("src",),
    ),
    "stream3r": Upstream(
        "NIRVANALAN/STream3R", "stream3r.models.stream3r:STream3R", "yslan/STream3R", _by_config, _VGGT_MARKS,
    ),
    "pi3": Upstream(
        "yyfz/Pi3", "pi3.models.pi3:Pi3", "yyfz233/Pi3", _by_config,
        ("encoder.", "decoder.", "point_decoder.", "camera_decoder."),
    ),
    "vggt-omega": Upstream(
        "facebookresearch/vggt-omega", "vggt_omega.models:VGGTOmega", "facebook/VGGT-Omega", _by_config,
        ("aggregator.frame_blocks.", "aggregator.inter_frame_blocks."),
    ),
    "depth-anything-3": Upstream(
        "ByteDance-Seed/Depth-Anything-3", "depth_anything_3.api:DepthAnything3", "depth-anything/DA3-LARGE",
        _by_config, ("backbone.pretrained.", "head."), ("src",),
    ),
    "map-anything": Upstream(
        "facebookresearch/map-anything", "mapanything.models:MapAnything", "facebook/map-anything", _by_config,
        ("encoder.", "info_sharing."),
    ),
}  # fmt: skip


def load_upstream(
    name: str,
    checkpoint: str | Path | None,
    *,
    checkout: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """An upstream model with its checkpoint, in eval mode.

    Args:
        name: one of :data:`ZOO`.
        checkpoint: a file or folder (:func:`~gate4d.models.checkpoints.read_checkpoint`), or owner/name at the
            Hugging Face hub, which needs the package huggingface_hub.
        checkout: folder of the repository; None for a package that can be imported. Its code runs.
        device: where it goes.

    Raises:
        ValueError: there is no such name, or no checkpoint is given.
        FileNotFoundError: the checkout is not of that repository, or a checkpoint is not there or cannot be fetched.
        ImportError: the checkout, or something that it needs, cannot be imported.
        WeightsError: the checkpoint is damaged, or not of this model.

    Warns:
        UserWarning: the checkpoint has weights that the model has no place for.
    """
    if name not in ZOO:
        raise ValueError(f"model must be one of {', '.join(ZOO)}, got {name!r}.")
    known = ZOO[name]
    if checkpoint is None:
        raise ValueError(
            f"checkpoint must be given for {name}, whose weights are not shipped: a file, a folder, or a name at the "
            f"Hugging Face hub such as {known.hub}."
        )
    found = resolve(checkpoint)
    module = _module(known, None if checkout is None else Path(checkout))
    model = known.build(getattr(module, known.target.partition(":")[2]), module, found)
    _fill(model, found, name)
    return model.to(device).eval()


def resolve(checkpoint: str | Path) -> Checkpoint:
    """A file, a folder, or a name at the hub, read. Errors as of :func:`load_upstream`."""
    text = str(checkpoint)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith(".") and not text.endswith(SUFFIXES)
    if Path(text).exists() or not named:
        return read_checkpoint(text)
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ImportError(f"{text} is a name at the Hugging Face hub: pip install 'gate4d[hub]'.") from None
    missing: list[str] = []
    for name in _HUB_FILES:
        try:
            found = read_checkpoint(huggingface_hub.hf_hub_download(text, name))
        except errors.EntryNotFoundError as e:
            if isinstance(e, errors.LocalEntryNotFoundError):  # neither at the hub, which does not answer, nor cached
                missing.append(name)
            continue
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as e:
            said = str(e).strip().splitlines()
            raise FileNotFoundError(f"checkpoint: {text} cannot be had: {said[0] if said else e!r}") from None
        found.source = f"{text}/{name}"
        config = huggingface_hub.try_to_load_from_cache(text, "config.json")
        if config is None:
            try:
                config = huggingface_hub.hf_hub_download(text, "config.json")
            except (errors.EntryNotFoundError, errors.HfHubHTTPError, OSError):
                config = None
        found.config = read_config(Path(config)) if isinstance(config, str) else found.config
        return found
    if missing:
        raise FileNotFoundError(
            f"checkpoint: the Hugging Face hub cannot be reached, and {text} is not in its cache here. Fetch "
            f"{missing[0]} (or {missing[1]}) and config.json of {text} where there is a network, put them into a "
            "folder, and give that folder."
        )
    raise FileNotFoundError(f"checkpoint: {text} at the hub holds none of {', '.join(_HUB_FILES)}.")


def looks_like(names: Any) -> list[str]:
    """Of which models of :data:`ZOO` weights with these names may be."""
    names = list(names)
    fits = [
        (len(known.marks), title)
        for title, known in ZOO.items()
        if all(any(n.startswith(mark) for n in names) for mark in known.marks)
    ]
    return [title for marks, title in fits if marks == max(fits)[0]]


def _module(known: Upstream, checkout: Path | None) -> ModuleType:
    target = known.target.partition(":")[0]
    package = target.partition(".")[0]
    if checkout is not None:
        if not checkout.is_dir():
            raise FileNotFoundError(f"checkout: there is no folder {checkout}.")
        folders = [(checkout / f).resolve() for f in known.folders]
        if not any((f / package).is_dir() for f in folders):
            where = " or ".join(f"{f}/{package}" if f != "." else package for f in known.folders)
            raise FileNotFoundError(
                f"checkout: {checkout} is no checkout of {known.repository}: it has no folder {where}."
            )
        loaded = getattr(sys.modules.get(package), "__path__", None)
        if loaded and not any(Path(p).resolve().is_relative_to(checkout.resolve()) for p in loaded):
            raise ImportError(
                f"checkout: a package {package} was imported from {next(iter(loaded))} before; use a process of its "
                "own for each checkout."
            )
        for folder in reversed(folders):
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(target)
    except ModuleNotFoundError as e:
        if e.name != package:
            raise
        raise ImportError(
            f"the package {package} cannot be imported: give the folder of a checkout of {known.repository}."
        ) from None
    if not hasattr(module, known.target.partition(":")[2]):
        raise ImportError(f"{target} of this checkout has no class {known.target.partition(':')[2]}.")
    return module


def _fill(model: nn.Module, checkpoint: Checkpoint, name: str) -> None:
    """Load, and say by name what does not fit."""
    wanted = {n: tuple(x.shape) for n, x in model.state_dict().items()}
    state = checkpoint.named_for(wanted)
    shapes = [
        f"{n}: wanted {list(wanted[n])}, got {list(x.shape)}"
        for n, x in state.items()
        if n in wanted and tuple(x.shape) != wanted[n]
    ]
    missing, unexpected = _load(model, state) if not shapes else ([], [])
    parameters = {n for n, _ in model.named_parameters()}
    missing = [n for n in missing if n in parameters]
    if shapes or missing:
        others = [n for n in looks_like(checkpoint.state) if n != name]
        said = [f"{checkpoint.source} does not fit {name}"]
        said += [f"its tensors have other shapes ({_few(shapes)})"] if shapes else []
        said += [f"it lacks {_few(missing)}"] if missing else []
        said += [f"and has {_few(unexpected)}, for which there is no place"] if unexpected else []
        said += [f"it looks like weights of {' or '.join(others)}"] if others and not shapes else []
        raise WeightsError(f"{said[0]}: {'; '.join(said[1:])}.")
    if unexpected:
        warnings.warn(
            f"{checkpoint.source}: the model has no place for {_few(unexpected)}; these weights are left out.",
            stacklevel=3,
        )


def _load(model: nn.Module, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    found = model.load_state_dict(state, strict=False)
    return list(found.missing_keys), list(found.unexpected_keys)


def _few(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
