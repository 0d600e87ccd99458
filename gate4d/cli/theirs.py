"""Code of the user's: what fails in it is said to be theirs, and a model without a checkpoint is noticed."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TheirError(Exception):
    """An exception inside code that the user named.

    Attributes:
        traceback: of their code alone, as Python prints it.
    """

    def __init__(self, message: str, traceback: str):
        super().__init__(message)
        self.traceback = traceback


@contextmanager
def theirs(what: str, *passed: type[BaseException]) -> Iterator[None]:
    """Turns what their code raises into :class:`TheirError`; ``what`` says what it was doing.

    Exceptions of the types ``passed`` go through, and so does Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except passed:
        raise
    except (Exception, SystemExit) as e:
        said = f"exited with status {e.code}" if isinstance(e, SystemExit) else f"raised {type(e).__name__}"
        first = (str(e).strip().splitlines() or [""])[0]
        message = f"{what} {said}{f': {first}' if first and not isinstance(e, SystemExit) else ''}"
        raise TheirError(message.rstrip(".") + ".", _without_ours(e)) from e


def _without_ours(e: BaseException) -> str:
    """The traceback from the first frame on that is neither this file's nor that of the import machinery."""
    frames = traceback.extract_tb(e.__traceback__)
    ours = (__file__, functools.__file__, "<frozen importlib._bootstrap", "<frozen importlib._bootstrap_external>")
    start = next(
        (i for i, f in enumerate(frames) if not f.filename.startswith(ours) and "/gate4d/cli/" not in f.filename
         and "/importlib/__init__.py" not in f.filename),
        len(frames),
    )  # fmt: skip
    lines = traceback.format_list(frames[start:])
    lines = ["Traceback (most recent call last):\n", *lines] if lines else []
    return "".join([*lines, *traceback.format_exception_only(type(e), e)])


@contextmanager
def watching_for_checkpoints() -> Iterator[list[str]]:
    """A list that is filled with what loads weights while the block runs: torch.load, load_state_dict, safetensors."""
    import torch

    seen: list[str] = []
    places: list[tuple[Any, str]] = [(torch, "load"), (torch.nn.Module, "load_state_dict")]
    if "safetensors" in sys.modules or _importable("safetensors"):
        import safetensors.torch

        places += [(safetensors, "safe_open"), (safetensors.torch, "safe_open")]
        places += [(safetensors.torch, name) for name in ("load_file", "load", "load_model")]
    own = [(owner, name, getattr(owner, name)) for owner, name in places if hasattr(owner, name)]
    try:
        for owner, name, function in own:
            setattr(owner, name, _noting(function, name, seen))
        yield seen
    finally:
        for owner, name, function in own:
            setattr(owner, name, function)


def _noting(function: Any, name: str, seen: list[str]) -> Any:
    @functools.wraps(function, updated=())
    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return function(*args, **kwargs)

    return noted


def _importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None
