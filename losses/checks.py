"""What losses ask of their arguments; the messages name the argument, the row and the rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .types import SequenceLogps, check_type, first

LEAST, MOST = 1e-12, 1e12
"""Settings lie within: so neither they, nor their reciprocals, nor the squares of these overflow float32 (3e38), and
nor do products with log-ratios of 1e4 nats."""
ROUNDING = 1e-3  # by how much a mean log-prob may be over 0: bf16 and float32 sums round


def wide(x: Tensor) -> Tensor:
    """At least float32: a bf16 log-prob of -300 nats has a spacing of 2."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_positive(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is a positive number that float32 can compute with."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}: it must be positive")
    if not LEAST <= value <= MOST:
        raise ValueError(f"{name} is {value}: it must be from {LEAST:g} to {MOST:g}, or float32 overflows")


def check_not_negative(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is a number, 0 or more, that float32 can compute with."""
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}: it must not be negative")
    if value > MOST:
        raise ValueError(f"{name} is {value}: it must be {MOST:g} at most, or float32 overflows")


def check_none_negative(name: str, values: Tensor) -> None:
    """Raise a ValueError that names the first element below 0."""
    bad = values < 0
    if bool(bad.any()):
        raise ValueError(f"{name}{first(bad)} is {float(values[bad][0])}: it must not be negative")


def check_finite(name: str, values: Tensor) -> None:
    """Raise a ValueError that names the first element which is NaN or infinite."""
    check_type(name, values, Tensor)
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        raise ValueError(f"{name}{first(bad)} is {float(values[bad][0])}: it must be finite")


def check_shape(name: str, values: Tensor, shape: torch.Size | tuple[int, ...], what: str) -> None:
    """Raise a ValueError unless ``values`` has the shape of ``what`` (``"one a pair"``)."""
    check_type(name, values, Tensor)
    if tuple(values.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(values.shape)} and must have {tuple(shape)}: {what}")


def check_probability(name: str, values: Tensor) -> None:
    """Raise a ValueError that names the first element outside [0, 1], NaN included."""
    check_type(name, values, Tensor)
    bad = ~((values >= 0) & (values <= 1))
    if bool(bad.any()):
        raise ValueError(f"{name}{first(bad)} is {float(values[bad][0])}: a probability is in [0, 1]")


def check_reference(name: str, given: object, carrier: type) -> None:
    """Raise a ValueError unless the log-probs to compare with were given, in their carrier."""
    if given is None:
        raise ValueError(f"{name} is None: the loss compares the policy with a reference, and none was given")
    check_type(name, given, carrier)


def check_log_probs(name: str, answers: SequenceLogps) -> None:
    """Raise a ValueError that names the first answer whose mean log-prob is over 0, rounding aside."""
    totals = wide(answers.total.detach())
    over = totals > ROUNDING * answers.length
    if bool(over.any()):
        raise ValueError(
            f"{name}: total{first(over)} is {float(totals[over][0]):g}, and log-probs are at most 0: were "
            "negative log-likelihoods passed?"
        )


def log_ratio(policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
    """Sequence log-ratio ``log pi - log pi_ref``, nats, of the shape of ``total``, in float32 or better.

    Raises:
        ValueError: there is no reference, or the two differ in number of rows, or in the length of a completion.
    """
    check_type("policy", policy, SequenceLogps)
    check_reference("reference", reference, SequenceLogps)
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
