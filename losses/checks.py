"""What losses ask of their arguments; the messages name the argument, the row and the rule."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .types import PairLogps, SequenceLogps, check_type, first

LEAST, MOST = 1e-12, 1e12
"""Settings lie within: so neither they, nor their reciprocals, nor the squares of these overflow float32 (3e38), and
nor do products with log-ratios of 1e4 nats."""
ROUNDING = 1e-3  # by how much a mean log-prob may be over 0: bf16 and float32 sums round


def wide(x: Tensor) -> Tensor:
    """At least float32: a bf16 log-prob of -300 nats has a spacing of 2."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_number(name: str, value: object) -> None:
    """Raise a ValueError unless ``value`` is a number; True and a tensor are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} is {value!r}: it must be a number")


def check_real(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is a number, of either sign, that float32 can compute with."""
    check_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}: it must be finite")
    if abs(value) > MOST:
        raise ValueError(f"{name} is {value}: it must be within +-{MOST:g}, or float32 overflows")


def check_whole(name: str, value: object) -> None:
    """Raise a ValueError unless ``value`` is a whole number; True and 2.0 are none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} is {value!r}: it must be a whole number")


def check_positive(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is a positive number that float32 can compute with."""
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} is {value}: it must be positive")
    if not LEAST <= value <= MOST:
        raise ValueError(f"{name} is {value}: it must be from {LEAST:g} to {MOST:g}, or float32 overflows")


def check_not_negative(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is a number, 0 or more, that float32 can compute with."""
    check_number(name, value)
    if not value >= 0:
        raise ValueError(f"{name} is {value}: it must not be negative")
    if value > MOST:
        raise ValueError(f"{name} is {value}: it must be {MOST:g} at most, or float32 overflows")


def check_share(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is a share of wrong labels: under a half, or they would say nothing."""
    check_number(name, value)
    if not 0 <= value < 0.5:
        raise ValueError(f"{name} is {value}: a share of wrong labels is in [0, 0.5)")


Positive = Annotated[float, check_positive]
NotNegative = Annotated[float, check_not_negative]
Share = Annotated[float, check_share]
"""Types of settings: a loss whose setting is ``beta: Positive`` has it checked when it is called, and before that when
``Loss`` is made with it."""


def check_settings(function: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first setting which is not what the function's annotation of it says.

    Numbers are finite, and within the range of their type above; whole numbers, text, Booleans and choices
    (``Literal``) are that. ``float`` takes either sign. Settings of any other type (``float | None``) go unchecked.
    """
    for name, rule in _rules(function).items():
        if name in settings:
            rule(name, settings[name])


@functools.cache
def _rules(function: Callable[..., Any]) -> dict[str, Callable[[str, Any], None]]:
    hints = setting_hints(function, include_extras=True)
    return {name: rule for name, hint in hints.items() if (rule := _rule(hint)) is not None}


def setting_hints(function: Callable[..., Any], *, include_extras: bool = False) -> dict[str, Any]:
    """The types of a loss's settings, its keyword-only parameters; ``Any`` where there is no annotation.

    Annotations of its tensors are not looked at: those may name what is imported for type checking alone.

    Args:
        include_extras: keep ``Annotated``.

    Raises:
        ValueError: an annotation names something that the function's module does not have.
    """
    found, names = {}, getattr(inspect.unwrap(function), "__globals__", {})
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        hint = Any if parameter.annotation is parameter.empty else parameter.annotation
        one = SimpleNamespace(__annotations__={name: hint})
        try:
            found[name] = get_type_hints(one, names, include_extras=include_extras)[name]
        except (NameError, AttributeError, SyntaxError, TypeError) as error:
            raise ValueError(
                f"{getattr(function, '__name__', function)}: the annotation of {name}, {hint!r}, cannot be resolved "
                f"({error}): settings are checked by it when they are given, so name a type that its module imports"
            ) from error
    return found


def _rule(hint: Any) -> Callable[[str, Any], None] | None:
    if get_origin(hint) is Annotated:
        rules = (rule for rule in hint.__metadata__ if callable(rule))
        return next(rules, None) or _rule(hint.__origin__)
    if get_origin(hint) is Literal:
        return functools.partial(_check_choice, choices=get_args(hint))
    if hint is float:
        return check_real
    if hint is int:
        return check_whole
    return functools.partial(check_type, wanted=hint) if hint in (bool, str) else None


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(map(str, choices))}")


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


def log_ratio(
    policy: SequenceLogps, reference: SequenceLogps, ours: str = "policy", theirs: str = "reference"
) -> Tensor:
    """Sequence log-ratio ``log pi - log pi_ref``, nats, of the shape of ``total``, in float32 or better.

    Args:
        policy, reference: log-probs of the same completions.
        ours, theirs: what messages call them.

    Raises:
        ValueError: there is no reference, or the two differ in number of rows, or in the length of a completion.
    """
    check_type(ours, policy, SequenceLogps)
    check_reference(theirs, reference, SequenceLogps)
    if policy.total.shape != reference.total.shape:
        raise ValueError(
            f"{ours} has shape {tuple(policy.total.shape)} and {theirs} has shape {tuple(reference.total.shape)}: "
            "both score the same completions"
        )
    unequal = policy.length != reference.length
    if bool(unequal.any()):
        counts = [int(answers.length[unequal][0]) for answers in (policy, reference)]
        raise ValueError(
            f"{ours}.length{first(unequal)} is {counts[0]} and {theirs}.length{first(unequal)} is {counts[1]}: both "
            "score the same completion"
        )
    return wide(policy.total) - wide(reference.total)


def log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """``log_ratio`` of the chosen and of the rejected answers, nats, (B,) each; raises as it does."""
    check_type("policy", policy, PairLogps)
    check_reference("reference", reference, PairLogps)
    return (
        log_ratio(policy.chosen, reference.chosen, "policy.chosen", "reference.chosen"),
        log_ratio(policy.rejected, reference.rejected, "policy.rejected", "reference.rejected"),
    )
