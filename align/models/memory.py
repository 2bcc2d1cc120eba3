"""Memory: what is free for this process, and what it freed given back to the system."""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .processors import groups

MEMINFO = Path("/proc/meminfo")
# Of control groups, versions 2 and 1: the limit, what is taken of it, and of that what is given up when asked for.
_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


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


def free_memory() -> tuple[float, str]:
    """GB (10^9 bytes) that this process can still take where it trains, and of what, in words for a log.

    On a CPU what the system has free, or gives up when asked for, or what a control group leaves, whichever is less;
    all of the machine's memory where the system does not tell.
    """
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 1e9, "the GPU"
    left = {"this machine": _available(), "this control group": _left_by_groups()}
    what = min(left, key=left.__getitem__)
    return left[what] / 1e9, what


def _available() -> float:
    found = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text()) if MEMINFO.exists() else None
    return 1024.0 * int(found[1]) if found else float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _left_by_groups() -> float:
    """Bytes that the narrowest limit leaves; infinite without one."""
    left = [math.inf]
    for folder in groups("memory"):
        for limit, used, idle in _LIMITS:
            try:
                most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such file, or no limit ("max")
                continue
            left.append(most - taken + int(stat.get(idle, 0)))
    return min(left)
