"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Callable

import torch


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """Glibc's ``malloc_trim``, where there is a glibc."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library
        return None


def release_freed() -> bool:
    """Give the holes of the heap back.

    Rows of many widths leave holes that no later tensor fits, and glibc keeps them: a run grows to twice what it uses.
    Giving them back costs the page faults of the next batch, about a quarter of a training step, so call it between
    batches and not after each.

    Returns:
        Whether there was a glibc to ask.
    """
    trim = _trim()
    if trim is None:
        return False
    gc.collect()
    trim(0)
    return True


def let_go() -> None:
    """Free what nothing refers to any more, before the next model is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
