"""What a call must know of the device of its tensors, which need not be the current one."""

from __future__ import annotations

import torch

_capabilities: dict[int | None, tuple[int, int]] = {}


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None where there is none, as for fake tensors on a machine without one."""
    if device.index not in _capabilities:
        if not torch.cuda.is_available():
            return None
        _capabilities[device.index] = torch.cuda.get_device_capability(device)
    return _capabilities[device.index]
