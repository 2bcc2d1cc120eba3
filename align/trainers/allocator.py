"""Freed tensors go back to the system: on Linux, glibc would keep them for sizes that do not come again."""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3
BYTES = 1 << 20


def return_freed_memory() -> bool:
    """Have glibc map every block of 1 MiB or more by itself, and unmap it when it is freed.

    By default it raises that limit as large blocks are freed, and from then on cuts tensors from a heap that only
    grows: batches of changing width leave holes that nothing fits.

    Returns:
        Whether there was a glibc to tell.
    """
    if sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, BYTES))
    except (OSError, AttributeError):  # another C library
        return False
