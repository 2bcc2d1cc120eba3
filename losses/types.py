"""The carriers: what goes into a loss and what comes out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

LARGEST = 1e6
"""What losses take lies within +-this, in whatever unit: then its products with settings (1e12 at most, and as much in
the denominator), and the squares of these, do not overflow float32 (3e38). No answer has log-probs beyond it."""
LARGEST_DERIVED = 1e20
"""The same of what was computed from such numbers already (rewards, their shift, a KL, distances): rewards are up to
2e18, and products with one more setting do not overflow. It enters no square."""


@dataclass(frozen=True)
class SequenceLogps:
    """Log-probs of completions under one model: of B prompts, or of K answers to each of B prompts.

    Args:
        total: sum over a completion's tokens of ``log pi(token | what precedes it)``, nats, shape (B,) or (B, K).
        length: number of tokens in that sum (EOS counted, prompt and padding not), of the same shape.

    Raises:
        ValueError: the shapes differ, a length is not a whole number of at least 1, or a log-prob is NaN, infinite or
            beyond +-1e6.
    """

    total: Tensor
    length: Tensor

    def __post_init__(self) -> None:
        for name, given in (("total", self.total), ("length", self.length)):
            check_type(name, given, Tensor)
        if self.total.ndim not in (1, 2) or self.total.shape != self.length.shape:
            raise ValueError(
                f"total and length have shape (B,) or (B, K), not {tuple(self.total.shape)} and "
                f"{tuple(self.length.shape)}"
            )
        if self.length.dtype == torch.bool:
            raise ValueError("length is torch.bool: it counts tokens")
        wrong = ~(torch.isfinite(self.length) & (self.length == self.length.floor()) & (self.length >= 1))
        if bool(wrong.any()):
            value = float(self.length[wrong][0])
            rule = (
                "a completion has at least one token" if value.is_integer() else "it counts tokens, in whole numbers"
            )
            raise ValueError(f"length{first(wrong)} is {value:g}: {rule}")
        check_bounded("length", self.length)
        check_bounded("total", self.total)

    @classmethod
    def from_tokens(cls, logps: Tensor, mask: Tensor) -> SequenceLogps:
        """Totals and lengths from per-token log-probs.

        Args:
            logps: log-prob of each token, nats, shape (..., T) with one or two leading dimensions; summed in float32,
                float64 stays. What stands where the mask is false is never read, NaN included.
            mask: true (or 1) on the completion's tokens (EOS counted, prompt and padding not), of the same shape.

        Raises:
            ValueError: the shapes differ, the mask is neither true nor false somewhere, a completion is empty, or its
                log-prob is NaN, infinite or beyond +-1e6.
        """
        check_type("logps", logps, Tensor)
        mask = as_mask("mask", mask)
        if logps.shape != mask.shape:
            raise ValueError(f"logps and mask have the same shape, not {tuple(logps.shape)} and {tuple(mask.shape)}")
        values = logps.to(torch.promote_types(logps.dtype, torch.float32))
        return cls(torch.where(mask, values, values.new_zeros(())).sum(-1), mask.sum(-1))

    @property
    def mean(self) -> Tensor:
        """Mean log-prob per token, nats, of the shape of ``total``."""
        return self.total / self.length


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of B pairs under one model: the answer that was preferred and the one that was not.

    Raises:
        ValueError: the two differ in number, or are not of shape (B,).
    """

    chosen: SequenceLogps
    rejected: SequenceLogps

    def __post_init__(self) -> None:
        check_type("chosen", self.chosen, SequenceLogps)
        check_type("rejected", self.rejected, SequenceLogps)
        if self.chosen.total.ndim != 1 or self.rejected.total.ndim != 1:
            raise ValueError("a pair has one chosen and one rejected answer: log-probs of shape (B,) each")
        if self.chosen.total.shape != self.rejected.total.shape:
            raise ValueError(
                f"{len(self.chosen.total)} chosen and {len(self.rejected.total)} rejected: a pair has one of each"
            )


@dataclass(frozen=True)
class UnpairedLogps:
    """Log-probs of B single answers under one model, each with a thumb up or down.

    Args:
        sequence: totals (nats) and lengths (tokens), (B,) each.
        label: True for thumbs up, (B,), Boolean.

    Raises:
        ValueError: the shapes differ, or the labels are not Boolean.
    """

    sequence: SequenceLogps
    label: Tensor

    def __post_init__(self) -> None:
        check_type("sequence", self.sequence, SequenceLogps)
        check_type("label", self.label, Tensor)
        if self.label.dtype != torch.bool:
            raise ValueError(f"label is {self.label.dtype}: a thumb is up (True) or down (False)")
        if self.sequence.total.ndim != 1 or self.sequence.total.shape != self.label.shape:
            raise ValueError(
                f"sequence and label have shape (B,), not {tuple(self.sequence.total.shape)} and "
                f"{tuple(self.label.shape)}"
            )


@dataclass(frozen=True)
class LossOutput:
    """What a loss says of B rows, unreduced: the caller weighs and averages.

    Args:
        loss: shape (B,), or (B, K) for a loss that has a term for each of K answers.
        rewards: the loss's own implicit rewards, one per answer, detached, (B, K); for pairs K = 2, chosen first, for
            single answers K = 1.
        metrics: further quantities of shape (B,), detached, by name.
    """

    loss: Tensor
    rewards: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_rewards(cls, loss: Tensor, chosen: Tensor, rejected: Tensor) -> LossOutput:
        """The output of a pairwise loss whose implicit rewards are ``chosen`` and ``rejected``, (B,) each."""
        return cls(loss, torch.stack([chosen, rejected], dim=1).detach())

    @property
    def chosen_rewards(self) -> Tensor:
        """Implicit rewards of the chosen answers, (B,)."""
        return self.rewards[:, 0]

    @property
    def rejected_rewards(self) -> Tensor:
        """Implicit rewards of the rejected answers, (B,)."""
        return self.rewards[:, 1]


def check_type(name: str, given: object, wanted: type) -> None:
    """Raise a ValueError unless ``given`` is a tensor, or a carrier, of that type."""
    if not isinstance(given, wanted):
        what = given if given is None or isinstance(given, (int, float)) else f"a {type(given).__name__}"
        raise ValueError(f"{name} is {what}: it must be a {wanted.__name__}")


def check_bounded(name: str, values: Tensor, largest: float = LARGEST) -> None:
    """Raise a ValueError that names the first element which is NaN, infinite, or beyond +-``largest``."""
    check_type(name, values, Tensor)
    if values.is_complex():
        raise ValueError(f"{name} is complex: it must be real")
    bad = ~(torch.isfinite(values) & (values <= largest) & (values >= -largest))
    if bool(bad.any()):
        value = float(values[bad][0])
        rule = f"within +-{largest:g}, or float32 overflows" if math.isfinite(value) else "finite"
        raise ValueError(f"{name}{first(bad)} is {value:g}: it must be {rule}")


def as_mask(name: str, values: Tensor) -> Tensor:
    """A mask as Booleans.

    Raises:
        ValueError: an element is neither true nor false (1 nor 0), NaN included.
    """
    check_type(name, values, Tensor)
    bad = (values != 0) & (values != 1)
    if bool(bad.any()):
        raise ValueError(f"{name}{first(bad)} is {float(values[bad][0]):g}: it must be true or false (1 or 0)")
    return values.bool()


def first(where: Tensor) -> str:
    """Index of the first true element, as ``[3]`` or ``[3, 1]``; empty for a scalar."""
    return str([int(i) for i in where.nonzero()[0]]) if where.ndim else ""
