"""Loads the compiled kernels, or remembers why they are not there.

The CPU kernels are loaded on import, the opt-in CUDA C++ kernel when it is first asked for.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import torch

# The library lies in the installed package; this file may lie elsewhere, in an editable install.
_PACKAGE = Path(sys.modules[__package__.partition(".")[0]].__path__[0])
_error: str | None = None
_missing: dict[str, str | None] = {}


def _report() -> dict[str, str]:
    """What the build wrote down about what it left out."""
    path = _PACKAGE / "_build_report.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load() -> str | None:
    libraries = sorted(_PACKAGE.glob("_C.*so"))
    if not libraries:
        why = _report().get("skipped", "it was not built")
        return f"the compiled library is missing ({why}); install a C++ compiler and reinstall gate4d"
    try:
        torch.ops.load_library(libraries[-1])
    except OSError as e:
        name = libraries[-1].name
        return f"the compiled library {name} does not load ({e}); reinstall gate4d against torch {torch.__version__}"
    return None


_error = _load()


@cache
def cuda_library_error() -> str | None:
    """Why the CUDA C++ kernel cannot be used; None if it can. The first call loads it."""
    libraries = sorted(_PACKAGE.glob("_CUDA*.so"))
    if not libraries:
        why = _report().get("cuda", "it is built only with GATE4D_BUILD=cuda")
        return f"the CUDA C++ kernel is not installed ({why})"
    if torch.version.cuda is None:
        return f"the CUDA C++ kernel needs a CUDA build of torch, got torch {torch.__version__}"
    try:
        torch.ops.load_library(libraries[-1])
    except OSError as e:
        return f"the CUDA C++ kernel does not load ({e}); reinstall gate4d against torch {torch.__version__}"
    return None


def library_error() -> str | None:
    """Why the compiled CPU kernels cannot be used; None if they can."""
    return _error


def declare(operator: str) -> None:
    """To be called once the schema of ``gate4d::operator`` is defined: notes whether the library has its CPU kernel.

    The dispatcher is asked here and not at each call, where torch.compile could not trace the question.
    """
    missing = not torch._C._dispatch_has_kernel_for_dispatch_key(f"gate4d::{operator}", "CPU")
    _missing[operator] = "the compiled library has no kernel for it; reinstall gate4d" if missing else None


def kernel_error(operator: str) -> str | None:
    """Why the compiled CPU kernel of ``gate4d::operator`` cannot be used; None if it can."""
    return _missing[operator] if _error is None else _error
