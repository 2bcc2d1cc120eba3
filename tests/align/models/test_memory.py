"""Freed blocks go back to the system when asked for; what is free is what the system and its groups say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from align.models import memory, processors
from align.models.memory import free_memory

SCRIPT = """
import sys
from align.models.memory import release_freed

def resident() -> float:
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

large = bytearray(30 << 20)   # freeing it raises the size from which glibc maps a block by itself
del large
before = resident()
blocks = [bytearray(b"x" * (2 << 20)) for _ in range(100)]
held = blocks[1::2]
del blocks
if sys.argv[1] == "asked":
    assert release_freed()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_holes_are_given_back():
    """Of 100 blocks of 2 MiB every other one is freed: 105 MB live on, and most of 210 MB stay where nobody asks."""
    held = {}
    for how in ("asked", "not asked"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        held[how] = float(done.stdout)
    assert held["asked"] < 125
    assert held["not asked"] > 180


@pytest.mark.parametrize("names", memory._LIMITS)
def test_what_is_free_is_the_least_of_what_the_system_and_its_groups_leave(tmp_path, monkeypatch, names):
    """6.144 GB of the machine; 5 GB of an outer group, of which 3.5 are taken and 1 is pages of idle files: 2.5 GB."""
    limit, used, idle = names
    top = tmp_path / "sys/fs/cgroup" / ("" if limit == "memory.max" else "memory")
    inner = top / "outer/inner"
    inner.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/outer/inner\n" if limit == "memory.max" else "3:memory:/outer/inner\n")
    (tmp_path / "meminfo").write_text("MemTotal:  9000000 kB\nMemFree:  100 kB\nMemAvailable:    6000000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(processors, "SYSTEM", tmp_path / "sys")
    monkeypatch.setattr(processors, "GROUPS_OF_SELF", tmp_path / "own")
    (inner / limit).write_text("max\n")
    assert free_memory() == (6.144, "this machine")
    (inner.parent / limit).write_text("5000000000\n")
    (inner.parent / used).write_text("3500000000\n")
    (inner.parent / "memory.stat").write_text(f"anon 2500000000\n{idle} 1000000000\n")
    assert free_memory() == (2.5, "this control group")
    (tmp_path / "meminfo").unlink()
    assert free_memory() == (2.5, "this control group")
    (inner.parent / limit).unlink()
    assert free_memory()[0] > 0.5
