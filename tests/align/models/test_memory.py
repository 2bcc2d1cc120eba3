"""Freed blocks between blocks that live on go back to the system when asked for, and stay where nobody asks."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
