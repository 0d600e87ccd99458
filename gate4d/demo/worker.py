"""One implementation in a process of its own, so that its peak memory is its own.

``python -m gate4d.demo.worker CONFIG`` loads the clip and the model, prints a JSON line, then answers every JSON
request line on stdin with one JSON line on stdout.

Peak memory is the process's peak resident set during the forward passes minus its resident set just before them,
free heap pages handed back: whatever a pass touches counts, kernels' own scratch memory included; the loaded model
does not. On Linux the kernel's high-water mark is reset before every request. Elsewhere the mark of the process
since its warm-up serves, which is the same as long as requests grow.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from gate4d.demo.stack import IMPLEMENTATIONS, AlternatingStack

LINUX_METHOD = "peak resident set of a fresh process (VmHWM, reset before each count) minus the resident set before"
OTHER_METHOD = "peak resident set of a fresh process (ru_maxrss) minus its value after warm-up"


class MemoryMeter:
    """Peak memory since :meth:`start`, in bytes."""

    def __init__(self) -> None:
        self._resettable = _reset_peak()
        self.method = LINUX_METHOD if self._resettable else OTHER_METHOD
        self._before = self._peak()

    def start(self) -> None:
        """Hand free heap pages back to the system, forget the peak, note the memory in use."""
        if not self._resettable:
            return  # the mark since construction stays the baseline
        gc.collect()
        _trim_heap()
        _reset_peak()
        self._before = _status("VmRSS")

    def peak(self) -> int:
        """Bytes above the memory in use at :meth:`start`."""
        return max(0, self._peak() - self._before)

    def _peak(self) -> int:
        if self._resettable:
            return _status("VmHWM")
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no field {field}.")


def _trim_heap() -> None:
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def main(config: dict) -> None:
    """Serve requests ``{"frames", "strength", "save"}`` until stdin closes."""
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    data = np.load(config["clip"])
    frames, motion = torch.from_numpy(data["frames"]), torch.from_numpy(data["motion"])
    implementation = IMPLEMENTATIONS[config["implementation"]]
    options = {"window": config["window"], "sinks": config["sinks"]}
    with torch.inference_mode():
        model = AlternatingStack(**config["model"]).eval()
        model(frames[:1], motion[:1], implementation, strength=config["strength"], **options)  # warm-up
        meter = MemoryMeter()
        _say({"ready": True, "method": meter.method, "threads": torch.get_num_threads()})
        for line in sys.stdin:
            request = json.loads(line)
            n = request["frames"]
            meter.start()
            seconds: list[float] = []
            while not seconds or (sum(seconds) < config["repeat_seconds"] and len(seconds) < 5):
                begin = time.perf_counter()
                out = model(frames[:n], motion[:n], implementation, strength=request["strength"], **options)
                seconds.append(time.perf_counter() - begin)
            reply = {"seconds": statistics.median(seconds), "runs": len(seconds), "peak_bytes": meter.peak()}
            np.save(request["save"], out.float().numpy())
            del out
            _say(reply)


def _say(message: dict) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
