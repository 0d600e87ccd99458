"""Weights in files: safetensors, written and read without the package of that name."""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "weights"
MODELS = {"alternating": "AlternatingModel", "recurrent": "RecurrentModel"}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightsError(ValueError):
    """A file of weights is corrupt, or does not belong to the model it is loaded into."""


def build(name: str, **arguments) -> nn.Module:
    """A model by name with random weights.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {sorted(MODELS)}, got {name!r}.")
    return getattr(importlib.import_module(f"gate4d.models.{name}"), MODELS[name])(**arguments)


def load(name_or_path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """A trained model in eval mode, fp32.

    Args:
        name_or_path: ``"alternating"`` or ``"recurrent"``, the models shipped, or a file that training exported.
        device: where it goes.

    Raises:
        FileNotFoundError: there is no such file, or no weights are shipped under this name.
        WeightsError: the file is corrupt, or its tensors are not those of the model it names; says what was wanted.
    """
    path = FOLDER / f"{name_or_path}.safetensors" if str(name_or_path) in MODELS else Path(name_or_path)
    if not path.is_file():
        wanted = f"one of {sorted(MODELS)} or a file of weights"
        raise FileNotFoundError(f"name_or_path must be {wanted}, got {str(name_or_path)!r}: no file {path.name}.")
    tensors, about = read_safetensors(path)
    if about.get("model") not in MODELS:
        raise WeightsError(f"{path.name}: metadata must name a model of {sorted(MODELS)}, got {about.get('model')!r}.")
    model = build(about["model"], **json.loads(about.get("arguments", "{}")))
    wanted = {n: list(x.shape) for n, x in model.state_dict().items()}
    found = {n: list(x.shape) for n, x in tensors.items()}
    wrong = [f"{n}: wanted {s}, got {found.get(n, 'nothing')}" for n, s in wanted.items() if found.get(n) != s]
    wrong += [f"{n}: wanted nothing, got {s}" for n, s in found.items() if n not in wanted]
    if wrong:
        rest = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(f"{path.name} does not fit the model {about['model']!r}: {'; '.join(wrong[:3])}{rest}.")
    model.load_state_dict(tensors)
    return model.to(device).eval()


def metadata(name_or_path: str | Path) -> dict[str, str]:
    """What a file of weights says about its training; see :func:`load`."""
    path = FOLDER / f"{name_or_path}.safetensors" if str(name_or_path) in MODELS else Path(name_or_path)
    return _header(path, path.read_bytes())[1]


def save_weights(
    model: nn.Module, path: str | Path, about: Mapping[str, str], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a model's state_dict in 16 bits as safetensors; ``about`` becomes the file's metadata."""
    header, parts, offset = {"__metadata__": dict(about)}, [], 0
    code = {d: c for c, d in _DTYPES.items()}[dtype]
    for name, x in model.state_dict().items():
        data = x.detach().to("cpu", dtype).contiguous().view(torch.int16)
        data = data.numpy().tobytes()
        header[name] = {"dtype": code, "shape": list(x.shape), "data_offsets": [offset, offset + len(data)]}
        parts.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in fp32 and metadata.

    Raises:
        WeightsError: the file is cut short, or is no safetensors file of floating-point tensors.
    """
    path = Path(path)
    data = path.read_bytes()
    header, about, start = _header(path, data)
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            part = data[start + begin : start + end]
            if len(part) != end - begin:
                raise WeightsError(
                    f"{path.name} is cut short: {name} wants bytes up to {start + end}, got {len(data)}."
                )
            raw = torch.from_numpy(np.frombuffer(part, np.uint8).copy()).view(dtype)
            tensors[name] = raw.view(shape).float()
        except (KeyError, TypeError, RuntimeError) as e:
            raise WeightsError(f"{path.name} is corrupt: {name} is described as {entry} ({e}).") from e
    bad = [name for name, x in tensors.items() if not bool(torch.isfinite(x).all())]
    if bad:
        raise WeightsError(f"{path.name} is corrupt: {bad[0]} holds values that are not finite.")
    return tensors, about


def _header(path: Path, data: bytes) -> tuple[dict, dict[str, str], int]:
    try:
        (size,) = struct.unpack("<Q", data[:8])
        if size > len(data) - 8:
            raise ValueError(f"its header wants {size} bytes, the file has {len(data)}")
        header = json.loads(data[8 : 8 + size])
        return header, header.pop("__metadata__", {}), 8 + size
    except (ValueError, struct.error, AttributeError) as e:
        raise WeightsError(f"{path.name} is no safetensors file: {e}.") from e
