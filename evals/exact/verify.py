"""Losses, rewards and samplers against the truth, on a device, in a dtype: the rows of ``align verify``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from align.losses import LOSSES

from .decoding_targets import DECODERS
from .pal_targets import PAL
from .rows import Row, Stack
from .targets import TARGETS
from .transform_targets import TRANSFORMS

DTYPES = {"float64": torch.float64, "float32": torch.float32}
"""What a stack may compute in: in bf16 no optimum can be found to three digits, and losses go to float32 anyway."""


def names(only: Sequence[str] = ()) -> list[str]:
    """The losses, transforms, PAL and samplers to check, in the order of their tables; all of them if none is named.

    Raises:
        ValueError: a name that is in none of them.
    """
    known = [*LOSSES, *TRANSFORMS, *PAL, *DECODERS]
    for name in only:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"no loss, transform, model or sampler is named {name!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
            )
    return [name for name in known if not only or name in only]


def make_stack(device: str, dtype: str, seed: int = 0) -> Stack:
    """The stack of these names, once it was seen to hold a number.

    Raises:
        ValueError: an unknown dtype, or a device that is not there or cannot hold the dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}: it is one of {', '.join(DTYPES)}")
    try:
        torch.zeros((), device=device, dtype=DTYPES[dtype])
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"device {device} cannot hold {dtype} numbers: {str(error).splitlines()[0]}") from None
    return Stack(device, DTYPES[dtype], seed)


def verify(name: str, stack: Stack) -> list[Row]:
    """The comparisons of one method. What cannot be computed is a miss that says why, and does not stop the others."""
    if name not in TARGETS:
        return [Row(name, "no target: enter it in align.evals.exact.targets", 0.0, math.nan, math.nan, 0.0)]
    rows: list[Row] = []
    try:
        with _one_thread():
            for row in TARGETS[name].check(stack):
                rows.append(row)
    except Exception as error:
        what = str(error).splitlines()[0] if str(error) else "no message"
        rows.append(Row(name, f"{type(error).__name__}: {what}", math.nan, math.nan, math.nan, 0.0))
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    """The worlds are tiny: threads would spend ten times as long waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
