"""One contestant of :mod:`.processes` in a process of its own, so that its peak memory is its own.

``python -m gate4d.benchmarks.measure.worker CONFIG`` makes the setup, runs two frames as warm-up, prints a JSON line,
then answers every JSON request line on stdin with one JSON line on stdout. Memory is the growth of the resident set
in a request (see :mod:`.resident`): whatever it touches counts, kernels' own scratch memory included; the loaded model
and its inputs do not.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .load import load
from .processes import Run
from .resident import GrowthLimit, ResidentMeter, is_out_of_memory, keep_freed_memory, trim_heap
from .rounds import waited

WARM_UP_FRAMES = 2


def main(config: dict) -> None:
    """Serve requests until stdin closes.

    - ``{"frames", "max_bytes", "save"}``: one run whose memory is measured; ``save`` is a file for the outputs.
    - ``{"frames", "max_bytes", "calls", "together"}``: so many runs, whose mean is the time. Freed memory is kept; it
      stays kept afterwards if the contestants fit into memory ``together``. If so, others run between the parts: after
      each the process says ``{"more": true}`` and waits for a line.

    The process may have ``max_bytes`` more than before the first request.
    """
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    with torch.inference_mode():
        run = load(config["setup"])(**config["arguments"])
        for _ in run(WARM_UP_FRAMES):
            pass
        meter, limit = ResidentMeter(), GrowthLimit()
        _say({"limited": limit.possible, "method": meter.method, "threads": torch.get_num_threads()})
        for line in sys.stdin:
            request = json.loads(line)
            limit.set(request.pop("max_bytes"))
            first = "save" in request
            keep_freed_memory(not first)
            try:
                reply = _first(run, meter, **request) if first else _timed(run, **request)[1]
            except (RuntimeError, MemoryError) as e:
                if not is_out_of_memory(e):
                    raise
                reply = {"out_of_memory": str(e).partition("\n")[0]}
            if not (first or request["together"]):
                trim_heap()
            _say(reply)


def _first(run: Run, meter: ResidentMeter, frames: int, save: str) -> dict:
    meter.start()
    outputs, reply = _timed(run, frames, 1, False)
    reply["peak_bytes"] = meter.growth()
    np.save(save, torch.cat(outputs).float().numpy())
    return reply


def _timed(run: Run, frames: int, calls: int, together: bool) -> tuple[list[Tensor], dict]:
    seconds = latency = waiting = 0.0
    for _ in range(calls):
        outputs: list[Tensor] = []
        parts, since = iter(run(frames)), 0.0
        while True:
            waited_before, begin = waited(), time.perf_counter()
            part = next(parts, None)
            took = time.perf_counter() - begin
            seconds += took / calls
            if waited_before is not None:
                waiting += max(0.0, waited() - waited_before) / calls
            if part is None:
                break
            since += took
            if len(part):
                outputs.append(part)
                last, since = since / len(part), 0.0
            if together:
                _say({"more": True})
                if not sys.stdin.readline():
                    raise SystemExit
        latency += last / calls
    wait = None if waited_before is None else waiting / seconds / torch.get_num_threads()
    return outputs, {"seconds": seconds, "latency": latency, "wait": wait}


def _say(message: dict) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
