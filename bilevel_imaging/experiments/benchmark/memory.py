"""Memory of this process: the peak of a call, by the kernel's high-water mark (Linux), and what is freed."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

# of glibc's mallopt
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(call: Callable[[], Any]) -> float | None:
    """MiB by which resident memory rose during the call at most; ``None`` where the system can't tell.

    What the allocator keeps of earlier calls is given back first, so that it is counted again.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")
        before = _kilobytes("VmRSS")
    except (OSError, AttributeError):
        return None
    call()
    return max(0.0, _kilobytes("VmHWM") - before) / 1024


def keep_freed() -> bool:
    """Let the C library keep memory that tensors no longer need, up to 2 GiB, for the next ones, from now on.

    By default what a tensor of 32 MiB or more leaves goes back to the system at once, and so does much of what smaller
    ones leave; each new tensor then begins with a page fault for every 4 KiB.

    Returns:
        whether the C library could be told (glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, 2**30) and mallopt(TRIM_THRESHOLD, 2**31 - 1))


def _kilobytes(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return float(line.split()[1])
