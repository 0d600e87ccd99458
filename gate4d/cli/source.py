"""``--model`` of the commands: a shipped model, one of upstream's by name, a factory of the user's, or a file."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from gate4d.models import WeightsError
from gate4d.models import load as load_shipped
from gate4d.models.checkpoints import read_checkpoint
from gate4d.models.zoo import ZOO, load_upstream, looks_like

from .theirs import theirs, watching_for_checkpoints

EPILOG = """\
--model takes the name of a shipped model (alternating, recurrent), a file of its weights, or one of these:
  dust3r, mast3r, monst3r, cut3r, ttt3r, vggt, streamvggt, stream3r, pi3, vggt-omega, depth-anything-3, map-anything,
with --checkout, the folder of its repository, and --checkpoint, its weights as upstream ships them. The checkpoint is
read as data, the checkout's code runs. A model of your own is MODULE:FACTORY: imports a Python module (from the current
folder, too) and calls FACTORY() without arguments, which returns the model with its checkpoint loaded; or with --trust
a file written by torch.save(model). Use only code and whole models that you trust.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model`` and what belongs to it."""
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="name, weights file, or MODULE:FACTORY; see below"
    )
    parser.add_argument("--checkout", metavar="DIR", help="of a model by name: the repository's folder; its code runs")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="of a model by name: file, folder, or owner/name at the Hugging Face hub"
    )
    parser.add_argument(
        "--trust", action="store_true", help="load a model saved whole (torch.save), which runs its code"
    )


def load(args: argparse.Namespace) -> nn.Module:
    """The model of parsed arguments, see :func:`load_model`."""
    return load_model(args.model, args.device, trust=args.trust, checkout=args.checkout, checkpoint=args.checkpoint)


def load_model(
    spec: str, device: str, *, trust: bool = False, checkout: str | None = None, checkpoint: str | None = None
) -> nn.Module:
    """The model that ``--model`` names, in eval mode on ``device``; see :func:`gate4d.models.zoo.load_upstream`.

    Raises:
        FileNotFoundError, ImportError: there is no such file or module.
        TypeError: the factory returned, or the file holds, something else than a module.
        ValueError: the factory does not exist, or a file that runs code is not trusted.
        TheirError: the module or the factory raised something.

    Warns:
        UserWarning: nothing that loads weights was called on the way, so they are random.
    """
    if spec in ZOO:
        if checkpoint is None:
            load_upstream(spec, None)  # says what is wanted
        with theirs(f"--model: building {spec}", WeightsError, FileNotFoundError, ImportError):
            return load_upstream(spec, checkpoint, checkout=checkout, device=device)
    for name, value in (("--checkout", checkout), ("--checkpoint", checkpoint)):
        if value is not None:
            raise ValueError(f"{name} belongs to a model by name, one of {', '.join(ZOO)}; --model is {spec}.")
    module, colon, factory = spec.partition(":")
    if colon and not Path(spec).exists():
        if "" not in sys.path:
            sys.path.insert(0, "")
        with watching_for_checkpoints() as loaded:
            make = getattr(_imported(module), factory, None)
            if not callable(make):
                raise ValueError(f"--model: module {module!r} has no factory {factory!r} that can be called.")
            with theirs(f"--model: {spec}()"):
                model = make()
        if isinstance(model, nn.Module) and not loaded:
            warnings.warn(
                f"--model: {spec} loaded no checkpoint (no torch.load, load_state_dict or safetensors was called): the "
                "weights are random, unless it has them from elsewhere.",
                stacklevel=2,
            )
    elif Path(spec).suffix in (".pt", ".pth", ".bin", ".ckpt"):
        if not trust:
            _point_to_names(Path(spec))
            raise ValueError(
                f"--model: {spec} is a pickle, which can run any code when it is loaded. If you trust it and it was "
                "written by torch.save(model), say --trust; for a checkpoint of weights, use MODULE:FACTORY."
            )
        if not Path(spec).is_file():
            raise FileNotFoundError(f"--model: there is no file {spec}.")
        with theirs(f"--model: loading {spec}", OSError):
            model = torch.load(spec, map_location=device, weights_only=False)
    else:
        return load_shipped(spec, device)
    if not isinstance(model, nn.Module):
        what = "; a checkpoint of weights needs MODULE:FACTORY" if isinstance(model, dict) else ""
        raise TypeError(f"--model: {spec} must be a torch.nn.Module, got {type(model).__name__}{what}.")
    return model.to(device).eval()


def _point_to_names(path: Path) -> None:
    """Say under which name a file of weights belongs, if it is one."""
    try:
        names = looks_like(read_checkpoint(path).state)
    except (WeightsError, FileNotFoundError):
        return
    which = " or ".join(names) or f"NAME, one of {', '.join(ZOO)}"
    raise ValueError(
        f"--model: {path} holds weights without the model's code: say --model {which} --checkout DIR --checkpoint "
        f"{path}, with the folder of the repository; or use MODULE:FACTORY."
    )


def _imported(module: str) -> ModuleType:
    if not module:
        raise ValueError("--model must be MODULE:FACTORY, got no module before the colon.")
    try:
        with theirs(f"--model: importing {module}", ModuleNotFoundError):
            return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is not None and (module == e.name or module.startswith(f"{e.name}.")):
            raise  # what was asked for is not there
        with theirs(f"--model: importing {module}"):
            raise
