"""One contestant of a :mod:`.study` in a process of its own, so that its peak memory is its own.

``python -m gate4d.benchmarks.study_worker CONFIG`` makes the setup, runs two frames as warm-up, prints a JSON line,
then answers every JSON request line on stdin with one JSON line on stdout. Memory is the growth of the resident set
in a call (see :mod:`.resident`): whatever the call touches counts, kernels' own scratch memory included; the loaded
model and its inputs do not.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .resident import ResidentMeter, is_out_of_memory, limit_growth
from .timing import waited

WARM_UP_FRAMES = 2


def main(config: dict) -> None:
    """Serve requests ``{"frames", "save"}`` until stdin closes; ``save`` is a file for the outputs, or None."""
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    with torch.inference_mode():
        run = load(config["setup"])(**config["arguments"])
        for _ in run(WARM_UP_FRAMES):
            pass
        meter = ResidentMeter()
        limited = limit_growth(config["max_bytes"])
        _say({"limited": limited, "method": meter.method, "threads": torch.get_num_threads()})
        for line in sys.stdin:
            request = json.loads(line)
            meter.start()
            try:
                outputs, reply = _timed(run, request["frames"])
                reply["peak_bytes"] = meter.growth()
                if request["save"] is not None:
                    np.save(request["save"], torch.cat(outputs).float().numpy())
                del outputs
            except (RuntimeError, MemoryError) as e:
                if not is_out_of_memory(e):
                    raise
                _say({"out_of_memory": str(e).partition("\n")[0]})
            else:
                _say(reply)


def load(setup: str) -> Callable:
    """The function named ``"module:function"``."""
    module, function = setup.split(":")
    return getattr(importlib.import_module(module), function)


def _timed(run: Callable[[int], Iterable[Tensor]], frames: int) -> tuple[list[Tensor], dict]:
    outputs: list[Tensor] = []
    waited_before, begin = waited(), time.perf_counter()
    marks = [begin]
    for part in run(frames):
        outputs.append(part)
        marks.append(time.perf_counter())
    seconds = marks[-1] - begin
    latency = (marks[-1] - marks[-2]) / len(outputs[-1])
    waiting = None if waited_before is None else (waited() - waited_before) / seconds / torch.get_num_threads()
    return outputs, {"seconds": seconds, "latency": latency, "wait": waiting}


def _say(message: dict) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
