"""Peak memory of one call, in a fresh process.

A new process makes the inputs, starts torch's threads, and measures the growth of its resident set in one call (see
:mod:`.resident`). The bytes of the results are taken off. The call is the first one, so buffers that a library keeps
for later calls are counted.

A setup is a function of this package that returns a step; it is named as ``module:function``, so that the process
can import it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from .load import load
from .resident import ResidentMeter


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
    command = [sys.executable, "-m", "gate4d.benchmarks.measure.memory", request]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception|Result)\b", line)]
        why = errors[-1] if errors else f"it ended with status {done.returncode}"
        raise RuntimeError(f"{setup} in a fresh process: {why}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(step: Any) -> dict:
    """Measure one call of ``step`` in this process, which must not have made larger peaks before on other systems."""
    _settle()
    meter = ResidentMeter()
    meter.start()
    results = step()
    grown = meter.growth()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results if isinstance(t, Tensor)}
    size = sum(storages.values())
    return {"extra_bytes": max(0, grown - size), "result_bytes": size, "method": meter.method}


def _settle() -> None:
    """Start torch's threads and its autograd engine: none of it belongs to the call."""
    with torch.enable_grad():
        x = torch.rand(1024, 1024, requires_grad=True)
        torch.autograd.grad(torch.exp(x @ x), x, torch.ones(1024, 1024))  # with grad_outputs: it imports 30 MiB of code


def _main(request: str) -> None:
    wanted = json.loads(request)
    torch.set_num_threads(wanted["threads"])
    step = load(wanted["setup"])(**wanted["arguments"])
    print(json.dumps(measure(step)))


if __name__ == "__main__":
    _main(sys.argv[1])
