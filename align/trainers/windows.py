"""The order of prompts in online training, where several optimiser steps may learn from the same answers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class Windows(Sampler[int]):
    """Row numbers in random order, in windows that come ``repeats`` times in a row.

    A window is what one optimiser step learns from, over all micro-batches and processes. Rows that fill no window at
    the end of an epoch are left out of it; each epoch has its own order.

    Args:
        rows: how many there are.
        size: of a window.
        repeats: optimiser steps on a window.
        seed: of the order.

    Raises:
        ValueError: fewer rows than a window has.
    """

    def __init__(self, rows: int, size: int, repeats: int, seed: int) -> None:
        if rows < size:
            raise ValueError(f"{rows:,} prompts, and a step takes {size:,}: use fewer a step, or more prompts")
        self.rows, self.size, self.repeats, self.seed = rows, size, repeats, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Of which the order is asked for next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows // self.size * self.size * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        for start in range(0, self.rows - self.size + 1, self.size):
            for _ in range(self.repeats):
                yield from order[start : start + self.size]
