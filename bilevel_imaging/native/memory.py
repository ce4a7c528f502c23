"""What the C library does with memory that tensors have freed."""

from __future__ import annotations

import ctypes

# of glibc's mallopt
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


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
