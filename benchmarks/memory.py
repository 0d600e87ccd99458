"""Peak memory, measured: the growth of the resident set of a fresh process during one call.

Method, on Linux: a new process makes the inputs, starts torch's threads, returns freed memory to the system, reads its
resident set (VmRSS), resets the high-water mark (5 to ``/proc/self/clear_refs``), makes the call once and reads the
high-water mark (VmHWM). Taken off are the bytes of the results and the growth of file-backed pages (code that is paged
in by a first call). The call is the first one, so buffers that a library keeps for later calls are counted. The
kernel's counters are exact to a few hundred KiB. Elsewhere ``ru_maxrss`` serves, which cannot be reset and therefore
shows growth only beyond the earlier peak: a lower bound, and said so.

A setup is a function of this package that returns a step; it is named as ``module:function``, so that the process
can import it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MIB = 2**20


def peak_growth(setup: str, *, threads: int, **arguments: Any) -> dict:
    """Peak memory of one call beyond what exists before it and what it returns, in a fresh process.

    Args:
        setup: ``"module:function"``; the function is called with ``arguments`` (which must go through JSON) and
            returns a callable whose results are tensors.
        threads: torch threads.

    Returns:
        ``{"extra_bytes": int, "result_bytes": int, "method": str}``.

    Raises:
        RuntimeError: the process failed, for example for want of memory; with its error.
    """
    request = json.dumps({"setup": setup, "threads": threads, "arguments": arguments})
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "gate4d.benchmarks.memory", request]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception|Result)\b", line)]
        why = errors[-1] if errors else f"it ended with status {done.returncode}"
        raise RuntimeError(f"{setup} in a fresh process: {why}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(step: Any) -> dict:
    """Measure one call of ``step`` in this process, which must not have made larger peaks before on other systems."""
    _settle()
    before, file_before = _resident("VmRSS"), _resident("RssFile")
    resettable = _reset_peak()
    earlier = _max_rss()
    results = step()
    if resettable:
        grown = _resident("VmHWM") - before - (_resident("RssFile") - file_before)
        method = "VmHWM of a fresh process, reset before the call"
    else:
        grown, method = _max_rss() - earlier, "ru_maxrss of a fresh process (a lower bound)"
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results if isinstance(t, Tensor)}
    size = sum(storages.values())
    return {"extra_bytes": max(0, grown - size), "result_bytes": size, "method": method}


def attention_step(
    implementation: str,
    shape: dict,
    frames: int,
    dtype: str = "float32",
    gate: str = "none",
    backward: bool = False,
    backend: str = "auto",
) -> Any:
    """The setup for attention: ``implementation`` is a builder of :mod:`.peers`, ``shape`` a registry row as a dict."""
    from . import cases, peers
    from .registry import AttentionShape

    inputs = cases.make_inputs(
        AttentionShape(**shape), frames, dtype=getattr(torch, dtype), gate=gate, requires_grad=backward
    )
    build = getattr(peers, implementation)
    if implementation == "gate4d_forward":

        def build(x: cases.Inputs, forward: Any = build) -> Any:
            return forward(x, backend=backend)

    if not backward:
        step = build(inputs)
        return lambda: torch.no_grad()(step)()
    return peers.with_backward(build, inputs, torch.randn_like(inputs.q))


def _settle() -> None:
    """Start torch's threads and its autograd engine and hand freed memory back: none of it belongs to the call."""
    with torch.enable_grad():
        x = torch.rand(1024, 1024, requires_grad=True)
        torch.autograd.grad(torch.exp(x @ x), x, torch.ones(1024, 1024))  # with grad_outputs: it imports 30 MiB of code
    del x
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


def _resident(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _resident("VmHWM") > 0


def _max_rss() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _main(request: str) -> None:
    wanted = json.loads(request)
    torch.set_num_threads(wanted["threads"])
    module, function = wanted["setup"].split(":")
    step = getattr(importlib.import_module(module), function)(**wanted["arguments"])
    print(json.dumps(measure(step)))


if __name__ == "__main__":
    _main(sys.argv[1])
