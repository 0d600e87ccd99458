"""Weights in safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "weights"
MODELS = {"alternating": "AlternatingModel", "recurrent": "RecurrentModel"}


class WeightsError(ValueError):
    """A file of weights is corrupt, or does not belong to the model it is loaded into."""


def build(name: str, **arguments) -> nn.Module:
    """A model by name with random weights.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {sorted(MODELS)}, got {name!r}.")
    from . import alternating, recurrent

    return getattr({"alternating": alternating, "recurrent": recurrent}[name], MODELS[name])(**arguments)


def load(name_or_path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """A trained model in eval mode, fp32.

    Args:
        name_or_path: ``"alternating"`` or ``"recurrent"``, the models shipped, or a file that training exported.
        device: where it goes.

    Raises:
        FileNotFoundError: there is no such file, or no weights are shipped under this name.
        ImportError: the package safetensors is missing; names the extra.
        WeightsError: the file is corrupt, or its tensors are not those of the model it names; says what was wanted.
    """
    path = _path(name_or_path)
    tensors, about = read_safetensors(path)
    if about.get("model") not in MODELS:
        raise WeightsError(f"{path.name}: metadata must name a model of {sorted(MODELS)}, got {about.get('model')!r}.")
    arguments = _arguments(path.name, about.get("arguments", "{}"), tensors)
    try:
        with torch.device("meta"):  # shapes alone: what the metadata ask for is not made before it is known to fit
            shapes = build(about["model"], **arguments).state_dict()
    except Exception as e:  # whatever a constructor says of arguments that somebody wrote into a file
        said = f"{type(e).__name__}: {e}"
        raise WeightsError(f"{path.name}: metadata name arguments that make no {about['model']} model: {said}.") from e
    wanted = {n: list(x.shape) for n, x in shapes.items()}
    found = {n: list(x.shape) for n, x in tensors.items()}
    wrong = [f"{n}: wanted {s}, got {found.get(n, 'nothing')}" for n, s in wanted.items() if found.get(n) != s]
    wrong += [f"{n}: wanted nothing, got {s}" for n, s in found.items() if n not in wanted]
    if wrong:
        rest = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(f"{path.name} does not fit the model {about['model']!r}: {'; '.join(wrong[:3])}{rest}.")
    model = build(about["model"], **arguments)
    model.load_state_dict(tensors)
    return model.to(device).eval()


def metadata(name_or_path: str | Path) -> dict[str, str]:
    """What a file of weights says about its training; see :func:`load`."""
    with _opened(_path(name_or_path)) as file:
        return file.metadata() or {}


def save_weights(
    model: nn.Module, path: str | Path, about: Mapping[str, str], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a model's state_dict in 16 bits as safetensors; ``about`` becomes the file's metadata."""
    tensors = {name: x.detach().to("cpu", dtype).contiguous() for name, x in model.state_dict().items()}
    _safetensors().torch.save_file(tensors, path, metadata=dict(about))


def read_safetensors(
    path: str | Path, dtype: torch.dtype | None = torch.float32
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, in ``dtype`` (None: as they are), and metadata.

    Raises:
        ImportError: the package safetensors is missing; names the extra.
        WeightsError: the file is cut short, or is no safetensors file of finite numbers.
    """
    path = Path(path)
    with _opened(path) as file:
        tensors, about = {name: file.get_tensor(name).to(dtype) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    bad = [name for name, x in tensors.items() if not bool(torch.isfinite(x).all())]
    if bad:
        raise WeightsError(f"{path.name} is corrupt: {bad[0]} holds values that are not finite.")
    return tensors, about


def _path(name_or_path: str | Path) -> Path:
    path = FOLDER / f"{name_or_path}.safetensors" if str(name_or_path) in MODELS else Path(name_or_path)
    if not path.is_file():
        wanted = f"one of {sorted(MODELS)} or a file of weights"
        raise FileNotFoundError(f"name_or_path must be {wanted}, got {str(name_or_path)!r}: no file {path.name}.")
    return path


def _arguments(file: str, text: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of the model's constructor. Every size among them must show in the file: as that of a tensor, or as a number of
    blocks of which each has tensors. So nobody waits for a model of 10**9 blocks to be built."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise WeightsError(
            f"{file}: metadata must hold the model's arguments as JSON: {type(e).__name__}: {e}."
        ) from None
    if not isinstance(arguments, dict):
        raise WeightsError(f"{file}: metadata must hold the model's arguments by name, got {type(arguments).__name__}.")
    limit = max([len(tensors), *(n for x in tensors.values() for n in x.shape)])
    open_values = list(arguments.items())
    while open_values:
        name, value = open_values.pop()
        if isinstance(value, (list, tuple)):
            open_values += [(name, x) for x in value]
        elif isinstance(value, dict):
            open_values += [(name, x) for x in value.values()]
        elif isinstance(value, (int, float)) and not abs(value) <= limit:
            raise WeightsError(
                f"{file}: metadata ask for {name}={value}, and nothing in the file is larger than {limit}."
            )
    return arguments


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    package = _safetensors()
    try:
        with package.safe_open(path, "pt") as file:
            yield file
    except package.SafetensorError as e:
        raise WeightsError(f"{path.name} is no intact safetensors file: {e}.") from e


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as e:
        raise ImportError("weights are read and written with safetensors: pip install 'gate4d[demo]'.") from e
    return safetensors
