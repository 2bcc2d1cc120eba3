"""What losses ask of their arguments; the messages name the argument, the row and the rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .types import SequenceLogps, first


def wide(x: Tensor) -> Tensor:
    """At least float32: a bf16 log-prob of -300 nats has a spacing of 2."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_positive(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is a positive finite number."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}: it must be positive")


def check_not_negative(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is a finite number, 0 or more."""
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}: it must not be negative")


def check_finite(name: str, values: Tensor) -> None:
    """Raise a ValueError that names the first element which is NaN or infinite."""
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        raise ValueError(f"{name}{first(bad)} is {float(values[bad][0])}: it must be finite")


def check_shape(name: str, values: Tensor, shape: torch.Size | tuple[int, ...], what: str) -> None:
    """Raise a ValueError unless ``values`` has the shape of ``what`` (``"one a pair"``)."""
    if tuple(values.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(values.shape)} and must have {tuple(shape)}: {what}")


def check_probability(name: str, values: Tensor) -> None:
    """Raise a ValueError that names the first element outside [0, 1], NaN included."""
    bad = ~((values >= 0) & (values <= 1))
    if bool(bad.any()):
        raise ValueError(f"{name}{first(bad)} is {float(values[bad][0])}: a probability is in [0, 1]")


def log_ratio(policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
    """Sequence log-ratio ``log pi - log pi_ref``, nats, of the shape of ``total``, in float32 or better.

    Raises:
        ValueError: the two differ in number of rows, or in the length of a completion.
    """
    if policy.total.shape != reference.total.shape:
        raise ValueError(
            f"the policy has {_rows(policy.total)} and the reference {_rows(reference.total)}; both score the same "
            "completions"
        )
    unequal = policy.length != reference.length
    if bool(unequal.any()):
        raise ValueError(
            f"row {first(unequal)[1:-1]}: {int(policy.length[unequal][0])} tokens under the policy and "
            f"{int(reference.length[unequal][0])} under the reference; both score the same completion"
        )
    return wide(policy.total) - wide(reference.total)


def _rows(values: Tensor) -> str:
    return f"{len(values)} rows" if values.ndim == 1 else " x ".join(map(str, values.shape)) + " answers"
