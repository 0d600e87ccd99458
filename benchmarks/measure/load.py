"""How a fresh process finds what it is to run: by the name of a function, since only text reaches it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def load(setup: str) -> Callable[..., Any]:
    """The function named ``"module:function"``.

    Raises:
        AttributeError, ImportError: there is no such function or module.
    """
    module, function = setup.split(":")
    return getattr(importlib.import_module(module), function)
