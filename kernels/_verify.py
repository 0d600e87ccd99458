"""Verify once: a kernel computes a tiny problem right on this device before it is trusted with a configuration.

The verdict is kept in memory and in a file of its own under the cache directory: ``$GATE4D_CACHE_DIR``, or
``$XDG_CACHE_HOME/gate4d``, or ``~/.cache/gate4d``. Its folder is named by what the verdict depends on: the GPU and its
driver, torch, Triton and the source of the kernels. ``GATE4D_VERIFY`` is ``1`` (a kernel that fails is passed over),
``0`` (nothing is tried) or ``strict`` (one that fails is an error).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODES = ("0", "1", "strict")
SLACK = 2.0  # times the error of torch at the same precision; one rounding step is granted besides
ORDERS = 32  # of summation tried in torch before a result is rejected: in a few of them it may happen to be exact
RETRY_AFTER = 24 * 3600.0  # seconds; what raised may have had reasons outside of the kernel, as a missing compiler


class MismatchError(Exception):
    """A kernel's result is further from float64 than torch at its precision lets expect."""


@dataclass
class Verdict:
    """What came of a trial.

    Attributes:
        operator, configuration: what was tried, in words.
        error: None where the kernel is right, else what was wrong.
        mismatch: whether it ran and was wrong, which stays so; what raised is tried again after a day.
        seconds: what the trial took, compilation included.
        when: Unix time.
    """

    operator: str
    configuration: str
    error: str | None = None
    mismatch: bool = False
    seconds: float = 0.0
    when: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Trial:
    """How an implementation is tried before its first use.

    Args:
        operator: its name, ``"attention: triton"``.
        describe: a request in words: everything that decides which code is compiled.
        run: computes a tiny problem of a request on the device of the request; raises :class:`MismatchError` where the
            result is wrong. It is called in a thread of its own.
    """

    operator: str
    describe: Callable[[Any], str]
    run: Callable[[Any], None]
    _verdicts: dict[Hashable, Verdict] = field(default_factory=dict)

    def failure(self, request: Any, *, trying: bool) -> str | None:
        """Why the implementation must not serve the request; None if it may, or if nobody knows.

        Args:
            request: hashable, with ``device_type`` and ``device_index``.
            trying: whether to try it now if it never was; else only what is known counts.
        """
        verdict = self._verdicts.get(request)
        if verdict is None:
            if mode() == "0" or not _exists(request):
                return None
            verdict = self._settle(request, trying and _can_try(request))
            if verdict is None:
                return None
        return None if verdict.error is None else f"it failed its check on this device ({verdict.error})"

    def settled(self, request: Any) -> bool:
        """Whether asking again would change nothing."""
        return request in self._verdicts or mode() == "0"

    def _settle(self, request: Any, trying: bool) -> Verdict | None:
        with _lock:
            if request in self._verdicts:
                return self._verdicts[request]
            words = self.describe(request)
            path = _path(request, self.operator, words)
            verdict = _read(path, self.operator, words)
            if verdict is None and trying:
                verdict = self._try(request, words)
                _write(path, verdict)
            if verdict is not None:
                self._verdicts[request] = verdict
            return verdict

    def _try(self, request: Any, words: str) -> Verdict:
        if request.device_type == "cuda":
            torch.cuda.synchronize(request.device_index)  # an error of the caller's own kernels surfaces as theirs
        begin, error, mismatch = time.perf_counter(), None, False
        raised = _in_a_thread(lambda: self.run(request))
        if isinstance(raised, torch.OutOfMemoryError):
            raise raised  # says nothing about the kernel
        if raised is not None:
            mismatch = isinstance(raised, MismatchError)
            text = " ".join(str(raised).split())[:400]
            error = text if mismatch else f"{type(raised).__name__}: {text}"
        took = time.perf_counter() - begin
        return Verdict(self.operator, words, error, mismatch, round(took, 3), time.time(), environment(request))


_lock = threading.Lock()
_warned: set[str] = set()


def mode() -> str:
    """``GATE4D_VERIFY``; ValueError where it is none of :data:`MODES`."""
    value = os.environ.get("GATE4D_VERIFY", "1")
    if value not in MODES:
        raise ValueError(f"GATE4D_VERIFY must be one of {list(MODES)}, got {value!r}.")
    return value


def report(operator: str, failure: str, instead: str) -> None:
    """Warn, once a process for each operator and error, that ``instead`` serves; RuntimeError in strict mode."""
    if mode() == "strict":
        raise RuntimeError(f"gate4d: {operator} is not used: {failure}. GATE4D_VERIFY=strict makes this an error.")
    text = f"{operator}: {failure}"
    if text in _warned:
        return
    _warned.add(text)
    warnings.warn(
        f"gate4d: {operator} is not used: {failure}; {instead} serves instead. `gate4d info` lists such verdicts, "
        f"which are kept in {directory()}; GATE4D_VERIFY=0 does without the check, GATE4D_VERIFY=strict raises.",
        RuntimeWarning,
        stacklevel=2,
    )


def device_of(request: Any) -> torch.device:
    """Where a request is tried."""
    return torch.device(request.device_type if request.device_index is None else f"cuda:{request.device_index}")


def _exists(request: Any) -> bool:
    """Whether there is a device to compute on: no meta tensors, no fake ones, which a dispatch mode makes."""
    if torch._C._len_torch_dispatch_stack():
        return False
    if request.device_type != "cuda":
        return request.device_type == "cpu"
    index = request.device_index
    return torch.cuda.is_available() and index is not None and index < torch.cuda.device_count()


def _can_try(request: Any) -> bool:
    """Not while a graph is recorded."""
    return request.device_type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _in_a_thread(task: Callable[[], None]) -> BaseException | None:
    """What ``task`` raises. Grad mode, inference mode, autocast, torch.func, default devices and modes belong to a
    thread: a new one has none of the caller's."""
    raised: list[BaseException] = []

    def body() -> None:
        try:
            task()
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=body, name="gate4d verify")
    thread.start()
    thread.join()
    return raised[0] if raised else None


# --- where verdicts lie


def _cache_folder() -> Path:
    own = os.environ.get("GATE4D_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gate4d"


def directory() -> Path:
    """The folder of all verdicts."""
    return _cache_folder() / "verified"


def tile_table() -> Path:
    """Where a user's own table of tile shapes is, or would be; a verdict depends on it."""
    return Path(os.environ.get("GATE4D_TUNED") or _cache_folder() / "tuned.json")


def environment(request: Any) -> dict[str, str]:
    """What a verdict depends on beside the configuration."""
    return {"device": _device(request.device_type, request.device_index), **_software()}


@cache
def _device(device_type: str, index: int | None) -> str:
    if device_type != "cuda":
        return f"{device_type} {platform.machine()}"
    p = torch.cuda.get_device_properties(index)
    return f"{p.name} {getattr(p, 'gcnArchName', '') or f'{p.major}.{p.minor}'}"


@cache
def _software() -> dict[str, str]:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    interpreted = {"interpreter": "yes"} if os.environ.get("TRITON_INTERPRET") == "1" else {}
    return {
        "driver": _driver(), "torch": f"{torch.__version__} {torch.version.git_version}", "triton": triton,
        "kernels": source_hash(), "tiles": _hash(table.read_text()) if (table := tile_table()).exists() else "shipped",
        **interpreted,
    }  # fmt: skip


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        known = getattr(torch._C, "_cuda_getDriverVersion", None)
        return str(known()) if known is not None and torch.cuda.is_available() else "unknown"


@cache
def source_hash() -> str:
    """Hash of every file of the kernels, tables of tile shapes included."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".json")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _hash(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:20]


def _folder(request: Any) -> Path:
    return directory() / _hash(*(f"{k}={v}" for k, v in environment(request).items()))


def _path(request: Any, operator: str, configuration: str) -> Path:
    return _folder(request) / f"{_hash(operator, configuration)}.json"


def _read(path: Path, operator: str, configuration: str) -> Verdict | None:
    """The verdict of a file; None where there is none, it is broken, of something else, or to be tried again."""
    try:
        found = Verdict(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    fits = (found.operator, found.configuration) == (operator, configuration)
    if not fits or not isinstance(found.error, (str, type(None))) or not isinstance(found.when, (int, float)):
        return None
    return None if found.error and not found.mismatch and time.time() - found.when > RETRY_AFTER else found


def _write(path: Path, verdict: Verdict) -> None:
    """In one step, so that no process reads half a file. A folder that cannot be written costs a trial a process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "w") as f:
            json.dump(vars(verdict), f, indent=1)
        os.replace(name, path)
    except OSError:
        return


def recorded(request: Any) -> list[Verdict]:
    """Every verdict on disk for the device of ``request`` and this software, failures first."""
    found = []
    for path in _folder(request).glob("*.json"):
        try:
            found.append(Verdict(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda v: (v.error is None, v.operator, v.configuration))


# --- the rule


def accept(
    rows: Callable[[int], dict[str, Tensor]],
    got: dict[str, Tensor],
    exact: dict[str, Tensor],
    allowances: dict[str, tuple[float, float]],
) -> None:
    """MismatchError unless every result is as close to float64 as torch at its precision.

    The error, its largest entry and its mean square, may be twice that of torch plus one rounding step of the result's
    magnitude. Torch's is the worst over orders of summation, drawn until the results pass, :data:`ORDERS` at most.

    Args:
        rows: the results of torch in its n-th order of summation.
        got, exact: the kernel's results, and the same in float64.
        allowances: of a result, the least magnitude that is rounded and how many steps of its dtype a rounding of it
            makes; 0 and 1 for those not named.
    """
    baselines: list[dict[str, Tensor]] = []
    for name, value in got.items():
        finite = exact[name].isfinite()
        bad = ~torch.where(finite, value.isfinite(), value == exact[name])
        if bad.any():
            raise MismatchError(f"{name}: {int(bad.sum())} of {value.numel()} entries are not finite as they should be")
    for order in range(ORDERS):
        baselines.append(rows(order))
        try:
            for name, value in got.items():
                magnitude, steps = allowances.get(name, (0.0, 1.0))
                step = steps * torch.finfo(value.dtype).eps
                _compare(name, value, exact[name], [b[name] for b in baselines], magnitude, step)
        except MismatchError:
            if order == ORDERS - 1:
                raise
        else:
            return


def _compare(name: str, got: Tensor, exact: Tensor, baselines: list[Tensor], magnitude: float, step: float) -> None:
    finite = exact.isfinite()
    exact = exact[finite]
    if not exact.numel():
        return
    error, *others = ((x.double()[finite] - exact).abs() for x in (got, *baselines))
    for kind, size in (("largest", _largest), ("rms", _rms)):
        allowed = SLACK * max(map(size, others)) + step * max(size(exact), magnitude)
        if not size(error) <= allowed:
            raise MismatchError(f"{name}: {kind} error {size(error):.2e} against float64, {allowed:.2e} is allowed")


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
