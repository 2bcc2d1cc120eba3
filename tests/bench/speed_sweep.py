"""Betas over one epoch: runs that share one pass of the reference, and runs that score it in each step."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from speed_ways import Setup, align


def sweep(setup: Setup, betas: Sequence[float], keep: Callable[[dict[str, Any]], None]) -> None:
    """A run of each beta in both ways, in turns: the model is loaded, references are read or made, all pairs seen."""
    os.environ["ALIGN_CACHE"] = str(setup.output.with_name("cache"))
    for beta in betas:
        for cached in (True, False):
            began = time.perf_counter()
            trainer = align(**{"loss.beta": beta, "data.reference_cache": str(cached).lower()})(setup)
            built = time.perf_counter() - began
            trainer.train()
            seconds = time.perf_counter() - began
            keep({"beta": beta, "cache": cached, "seconds": seconds, "built": built})
            print(f"  beta {beta:g}, {'with' if cached else 'without'} the cache: {seconds:.0f} s", flush=True)
            del trainer
            gc.collect()
