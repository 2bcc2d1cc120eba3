"""How many processors this process may use: the machine's, less what affinity and control groups take away."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

SYSTEM = Path("/sys")
GROUPS_OF_SELF = Path("/proc/self/cgroup")


def allowed() -> list[int]:
    """The logical processors that the system's scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def quota() -> float:
    """How many processors' time the control groups grant; infinite without a limit. Linux, both versions."""
    limits = [math.inf]
    for folder in groups("cpu"):
        try:
            if (folder / "cpu.max").exists():
                most, period = (folder / "cpu.max").read_text().split()
            else:
                most, period = (_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            limits += [int(most) / int(period)] if most != "max" and int(most) > 0 else []
        except (OSError, ValueError):
            continue
    return min(limits)


def usable() -> int:
    """Processes or threads that can run at once: ``allowed``, within ``quota``, and at least one."""
    return max(1, math.floor(min(len(allowed()), quota()) + 0.5))


def cores() -> int:
    """Physical cores among ``allowed``: two logical processors that share one count once."""
    siblings = {
        _text(SYSTEM / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed()
    }
    return len(siblings)


def groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control group for a controller (``cpu``, ``memory``), and of those that hold it."""
    for line in _text(GROUPS_OF_SELF).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = SYSTEM / "fs/cgroup" / (controller if controllers else "")
        own = top / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(top) and folder.is_dir())


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
