"""Checkpoints as upstream projects ship them, read as data: nothing that a file asks for is run.

A pickle may hold tensors, plain containers, numbers, ``argparse.Namespace`` and OmegaConf's nodes (as dicts and lists);
whatever else it names is refused, before it is imported or called, by torch's own restricted unpickler.
"""

from __future__ import annotations

import argparse
import ast
import json
import pathlib
import pickle
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import WeightsError, read_safetensors

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Under which a file that is more than a state dict keeps it, and what the model was built with.
_STATES = ("model", "state_dict", "model_state_dict", "net", "weights")
_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass
class Checkpoint:
    """Tensors of a model, and what the file says of how it was built.

    Attributes:
        state: by name, on the CPU, in the dtypes of the file.
        prefix: what was taken off the front of every name, since wrappers put it there.
        config: constructor arguments by name (``config.json`` of a folder or the hub), None if there are none.
        args: the options of the training run that wrote it, None if there are none.
        source: for messages.
    """

    state: dict[str, Tensor]
    source: str
    config: dict[str, Any] | None = None
    args: dict[str, Any] | None = field(default=None, repr=False)
    prefix: str = ""

    def named_for(self, wanted: Collection[str]) -> dict[str, Tensor]:
        """The state under those of its names, with the prefix or a part of it, that most of ``wanted`` are.

        A class may keep its network in an attribute that is called like a wrapper's, such as ``model``.
        """
        parts = re.findall(r"[^.]+\.", self.prefix)
        fronts = ["".join(parts[n:]) for n in range(len(parts), -1, -1)]  # the shortest first: it wins a tie
        front = max(fronts, key=lambda f: sum(f + n in wanted for n in self.state))
        return {front + n: x for n, x in self.state.items()}


def read_checkpoint(path: str | Path) -> Checkpoint:
    """A file ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.ckpt``, or a folder as ``save_pretrained`` writes it.

    Raises:
        FileNotFoundError: there is nothing at ``path``, or a folder holds no weights.
        WeightsError: the file is cut short, holds no tensors, or asks for something that is no data.
        ImportError: the package safetensors is missing; names the extra.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file or folder {path}.")
    if path.suffix == ".safetensors":
        state, prefix = _tensors(read_safetensors(path, None)[0], path.name)
        return Checkpoint(state, path.name, prefix=prefix)
    return _extracted(read_pickle(path), path.name)


def read_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote, without running anything that the file names.

    Raises:
        WeightsError: the file is damaged, or names something that is no data.
    """
    try:
        with torch.serialization.safe_globals(_allowed()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, LookupError) as e:
        said = str(e)
        if found := re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", said):
            raise WeightsError(
                f"{path.name} is no file of weights alone: it asks for {found[1]}, which is no data. Nothing of it was "
                "run. If it is a model saved whole that you trust, use --trust; else ask for its state_dict."
            ) from None
        first = said.splitlines()[0] if said else repr(e)
        raise WeightsError(f"{path.name} is damaged or no checkpoint: {first}.") from None


def _dict(*factory: Any) -> dict[Any, Any]:
    """For a defaultdict."""
    return {}


class _Node:
    """An OmegaConf container or value: what pickle puts into it, and nothing else."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def _allowed() -> list[Any]:
    """What else a pickle may name, beside what torch allows: classes of data, or stand-ins for them."""
    omegaconf = {
        "omegaconf.dictconfig": ("DictConfig",),
        "omegaconf.listconfig": ("ListConfig",),
        "omegaconf.base": ("ContainerMetadata", "Metadata", "Node", "Container"),
        "omegaconf.nodes": (
            "AnyNode", "BooleanNode", "BytesNode", "FloatNode", "IntegerNode", "PathNode", "StringNode",
        ),
    }  # fmt: skip
    scalar = np._core.multiarray.scalar if hasattr(np, "_core") else np.core.multiarray.scalar  # type: ignore[attr-defined]
    return [
        argparse.Namespace,
        *((_Node, f"{module}.{name}") for module, names in omegaconf.items() for name in names),
        (_Node, "typing.Any"),
        (_dict, "collections.defaultdict"),
        *((kind, f"builtins.{kind.__name__}") for kind in (dict, list, tuple, set, int, float, str, bool)),
        *((pathlib.PurePosixPath, f"pathlib.{name}") for name in ("PosixPath", "PurePosixPath", "WindowsPath")),
        *((pathlib.PurePosixPath, f"pathlib._local.{name}") for name in ("PosixPath", "PurePosixPath")),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "bool")),
    ]


def plain(x: Any) -> Any:
    """Namespaces and OmegaConf nodes as dicts, lists and values."""
    if isinstance(x, argparse.Namespace):
        return plain(vars(x))
    if isinstance(x, _Node):
        return plain(x.__dict__.get("_content", x.__dict__.get("_val")))
    if isinstance(x, Mapping):
        return {str(n): plain(value) for n, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(map(plain, x)) if type(x) in (list, tuple) else list(map(plain, x))
    return x


def _extracted(content: Any, name: str) -> Checkpoint:
    if isinstance(content, Mapping) and not _is_state(content):
        state = next((content[n] for n in _STATES if _is_state(content.get(n))), None)
        if state is not None:
            args = next((content[n] for n in ("args", "cfg", "hyper_parameters") if n in content), None)
            config = content.get("config")
            known = [x if isinstance(x := plain(part), dict) else None for part in (config, args)]
            state, prefix = _tensors(state, name)
            return Checkpoint(state, name, known[0], known[1], prefix)
    if _is_state(content):
        state, prefix = _tensors(content, name)
        return Checkpoint(state, name, prefix=prefix)
    kind = type(content).__name__
    if isinstance(content, Mapping):
        kind = f"a dict of {', '.join(map(repr, list(content)[:6]))}"
    raise WeightsError(f"{name} must hold a state_dict, or a dict with one under {' or '.join(_STATES)}; got {kind}.")


def _is_state(x: Any) -> bool:
    return isinstance(x, Mapping) and bool(x) and all(isinstance(v, Tensor) for v in x.values())


def _tensors(state: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], str]:
    """Without the prefix that wrappers, in any order, gave every name; and that prefix."""
    found = {str(n): x.detach() for n, x in state.items()}
    if not found:
        raise WeightsError(f"{name} holds no tensor.")
    taken = ""
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in found)), ""):
        found, taken = {n.removeprefix(prefix): x for n, x in found.items()}, taken + prefix
    return found, taken


def _folder(path: Path) -> Checkpoint:
    names = ("model.safetensors", "pytorch_model.bin", "model.pt")
    weights = next((path / n for n in names if (path / n).is_file()), None)
    if weights is None:
        alone = [p for p in path.iterdir() if p.suffix in SUFFIXES]
        if len(alone) != 1:
            raise FileNotFoundError(f"checkpoint: the folder {path} must hold one of {', '.join(names)}; it has none.")
        weights = alone[0]
    read = read_checkpoint(weights)
    read.config = read_config(path / "config.json") or read.config
    return read


def read_config(path: Path) -> dict[str, Any] | None:
    """Constructor arguments in a JSON file, None if there is none.

    Raises:
        WeightsError: it is not a JSON object.
    """
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as e:
        raise WeightsError(f"{path.name} is no JSON: {e}.") from None
    if not isinstance(config, dict):
        raise WeightsError(f"{path.name} must hold the model's arguments by name, got {type(config).__name__}.")
    return config


def arguments_of(expression: str) -> dict[str, Any]:
    """Arguments by name of a call written as text, ``"Model(Config(depth=2, range=(-inf, inf)))"``, of all calls in it
    together. DUSt3R's family stores models like this, for ``eval``; here it is read as data.

    Raises:
        WeightsError: it is no call, or an argument is no number, text, None, truth value, tuple, list or dict.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        return _arguments(tree)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as e:
        raise WeightsError(
            f"the model must be written as one call with plain values, got {expression!r}: {e}"
        ) from None


def _arguments(call: ast.expr) -> dict[str, Any]:
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError("it is no call.")
    found: dict[str, Any] = {}
    for argument in call.args:
        found |= _arguments(argument)
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError("arguments must have names.")
        found[keyword.arg] = ast.literal_eval(_Infinities().visit(keyword.value))
    return found


class _Infinities(ast.NodeTransformer):
    """``inf`` and ``float("inf")`` are numbers here."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float("inf")) if node.id == "inf" else node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if isinstance(node.func, ast.Name) and node.func.id == "float" and len(node.args) == 1 and not node.keywords:
            return ast.Constant(float(ast.literal_eval(node.args[0])))
        return node
