"""Peak memory of this process, as the system counts it: growth of the resident set since a chosen moment.

On Linux: free heap pages go back to the system, VmRSS is read, the high-water mark VmHWM is reset (5 to
``/proc/self/clear_refs``), and its growth is read later, less what file-backed pages grew (code that a first call pages
in). The kernel's counters are exact to a few hundred KiB. Elsewhere ``ru_maxrss`` serves, which cannot be reset: it
shows growth only beyond the earlier peak, a lower bound unless every peak exceeds the one before.

Measure in a process that has done nothing else: where earlier work has left free pages in the allocator, a call that
fits into them grows nothing.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

try:
    import resource
except ImportError:  # not a Unix system
    resource = None

MIB = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h
LINUX_METHOD = "peak resident set of a fresh process (VmHWM, reset before each count) minus the resident set before"
OTHER_METHOD = "peak resident set of a fresh process (ru_maxrss) minus its value at the beginning, a lower bound"


class ResidentMeter:
    """Growth of the resident set since :meth:`start`; ``method`` says how it is measured here."""

    def __init__(self) -> None:
        self.resettable = reset_peak()
        self.method = LINUX_METHOD if self.resettable else OTHER_METHOD
        self._before, self._files = _max_rss(), 0

    def start(self) -> None:
        """Hand free heap pages back, forget the peak, note what is resident. Without a mark that can be reset the
        baseline stays that of the construction."""
        if not self.resettable:
            return
        gc.collect()
        trim_heap()
        reset_peak()
        self._before, self._files = resident("VmRSS"), resident("RssFile")

    def growth(self) -> int:
        """Bytes of the peak since :meth:`start` beyond what was resident then."""
        if not self.resettable:
            return max(0, _max_rss() - self._before)
        return max(0, resident("VmHWM") - self._before - (resident("RssFile") - self._files))


def reset_peak() -> bool:
    """Reset this process's high-water mark; False where that is impossible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return resident("VmHWM") > 0


def resident(field: str) -> int:
    """Bytes of a field of ``/proc/self/status``; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


class GrowthLimit:
    """Lets allocations fail as an error in this process that exceed what it had at construction by too much."""

    def __init__(self) -> None:
        self._base = resident("VmData")
        self.possible = self._base > 0 and resource is not None
        if self.possible:
            self._before = resource.getrlimit(resource.RLIMIT_DATA)

    def set(self, max_bytes: int) -> None:
        """Allow so many bytes more, and never more than was allowed before; nothing where the system has no limits."""
        if self.possible:
            limits = [x for x in (self._base + max_bytes, *self._before) if x != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_DATA, (min(limits), self._before[1]))

    def lift(self) -> None:
        """Allow again what was allowed before."""
        if self.possible:
            resource.setrlimit(resource.RLIMIT_DATA, self._before)


def available_memory() -> int:
    """Bytes that a process can still take here: the system's figure, or the container's limit if that is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        try:
            available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (ValueError, OSError):
            return 4 << 30
    group = Path("/sys/fs/cgroup")
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # that cache can be dropped
        limit = int((group / "memory.max").read_text())
    except (OSError, ValueError, KeyError):  # no control group, or "max"
        return available
    return max(0, min(available, limit - used))


def keep_freed_memory(keep: bool) -> None:
    """Whether glibc's allocator keeps large blocks that are freed. If it does not, the resident set is what the program
    holds; if it does, time is the program's and not that of the system, which clears every page that it hands out.
    What glibc does by itself is in between and depends on where blocks happen to lie."""
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return
    mallopt(M_MMAP_THRESHOLD, 2**17)  # blocks from this size on are taken from the system and given back one by one,
    mallopt(M_MMAP_MAX, 0 if keep else 2**16)  # but no more than so many
    mallopt(M_TRIM_THRESHOLD, -1 if keep else 2**17)  # of free memory at the end of the heap; -1 keeps it all


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a CPU or a GPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        said in text for said in ("out of memory", "can't allocate memory", "bad_alloc")
    )


def _max_rss() -> int:
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def trim_heap() -> None:
    """Hand free heap pages back to the system."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(function: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), function)
    except (OSError, AttributeError, TypeError):  # another C library
        return None
