"""How many threads torch computes with: timed at the start of a run, unless the environment says it.

One for each core that this process may use suits products of matrices. Another number is taken where it is clearly
faster: half of them, as on a machine of many cores, which wait for each other, or one for each logical processor.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import linear, silu

from .processors import cores, usable

SAYS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SECONDS = 0.4  # that timing may take
FASTER = 1.2  # times as fast as one a core must be what takes its place
ALONE = 0.7  # of the processors asked for must be had, or other processes are timed
_ROUNDS, _FEWEST_ROWS, _MOST_ROWS = 3, 64, 1024


@dataclass(frozen=True)
class Threads:
    """A number of threads, and why."""

    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.count}: {self.reason}"

    @property
    def facts(self) -> dict[str, Any]:
        """For section ``speed`` of the manifest."""
        return {"threads": asdict(self)}


def choose_threads(before: Mapping[str, Any] | None = None) -> Threads:
    """Set torch's number of threads for a run.

    Args:
        before: section ``speed`` of the run that is gone on with: its sums are added up as they were.
    """
    chosen = _chosen((before or {}).get("threads", {}).get("count"))
    if chosen.count != torch.get_num_threads():
        torch.set_num_threads(chosen.count)
    return chosen


def _chosen(known: int | None) -> Threads:
    if said := next((name for name in SAYS if os.environ.get(name)), None):
        return Threads(torch.get_num_threads(), f"{said} says so")
    if known is not None and known <= usable():
        return Threads(known, "as before the run was interrupted")
    if torch.cuda.is_available():
        return Threads(torch.get_num_threads(), "not timed: the GPU computes")
    usual = min(cores(), usable())
    numbers = list(dict.fromkeys((usual, max(1, usual // 2), usable())))
    cause = f"one for each of {usual} cores" if usual > 1 else "there is one core"
    if len(numbers) == 1:
        return Threads(usual, cause)
    seconds = timed(numbers)
    if seconds is None:
        return Threads(usual, f"{cause}; not timed, as other processes are at work on them")
    best = min(numbers, key=seconds.__getitem__)
    if seconds[usual] <= FASTER * seconds[best]:
        best = usual
    others = ", ".join(f"{n} would take {seconds[n] / seconds[best]:.2f} times as long" for n in numbers if n != best)
    return Threads(best, f"{cause if best == usual else 'timed to be fastest'}; {others}")


def timed(numbers: Sequence[int]) -> dict[int, float] | None:
    """Seconds that a small layer takes with each number of threads, by turns, the least of a few.

    None where the first number does not get as many processors.
    """
    before, each = torch.get_num_threads(), SECONDS / (len(numbers) * (_ROUNDS + 1))
    into, out = (
        torch.full((3072, 576), 0.01),
        torch.full((576, 1536), 0.01),
    )  # no random numbers: the run's are its own

    def once(threads: int, rows: int) -> tuple[float, float]:
        """Seconds, and the processors that this process had in them."""
        torch.set_num_threads(threads)
        states = torch.ones(rows, 576, requires_grad=True)
        began, worked = time.perf_counter(), time.process_time()
        gate, up = linear(states, into).chunk(2, dim=-1)
        linear(silu(gate) * up, out).sum().backward()  # type: ignore[no-untyped-call]
        seconds = time.perf_counter() - began
        return seconds, (time.process_time() - worked) / seconds

    try:
        rows = _FEWEST_ROWS
        once(numbers[0], rows)  # threads are made
        while rows < _MOST_ROWS and 2 * once(numbers[0], rows)[0] < each:
            rows *= 2
        rounds = [[once(number, rows) for number in numbers] for _ in range(_ROUNDS)]
    finally:
        torch.set_num_threads(before)
    if max(found[0][1] for found in rounds) < ALONE * numbers[0]:
        return None
    return {number: min(found[place][0] for found in rounds) for place, number in enumerate(numbers)}
