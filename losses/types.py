"""The carriers: what goes into a loss and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceLogps:
    """Log-probs of B completions under one model.

    Args:
        total: sum over a completion's tokens of ``log pi(token | what precedes it)``, nats, shape (B,).
        length: number of tokens in that sum (EOS counted, prompt and padding not), shape (B,).

    Raises:
        ValueError: the shapes differ, a completion is empty, or a log-prob is NaN or infinite.
    """

    total: Tensor
    length: Tensor

    def __post_init__(self) -> None:
        if self.total.ndim != 1 or self.total.shape != self.length.shape:
            raise ValueError(
                f"total and length have shape (B,), not {tuple(self.total.shape)} and {tuple(self.length.shape)}"
            )
        if bool((self.length < 1).any()):
            row = int((self.length < 1).nonzero()[0])
            raise ValueError(f"length[{row}] is {int(self.length[row])}: a completion has at least one token")
        if not bool(torch.isfinite(self.total).all()):
            row = int((~torch.isfinite(self.total)).nonzero()[0])
            raise ValueError(f"total[{row}] is {float(self.total[row])}: log-probs are finite")

    @property
    def mean(self) -> Tensor:
        """Mean log-prob per token, nats, shape (B,)."""
        return self.total / self.length


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of B pairs under one model: the answer that was preferred and the one that was not."""

    chosen: SequenceLogps
    rejected: SequenceLogps

    def __post_init__(self) -> None:
        if self.chosen.total.shape != self.rejected.total.shape:
            raise ValueError(
                f"{len(self.chosen.total)} chosen and {len(self.rejected.total)} rejected: a pair has one of each"
            )


@dataclass(frozen=True)
class LossOutput:
    """What a loss says of B rows, unreduced: the caller weighs and averages.

    Args:
        loss: shape (B,).
        rewards: the loss's own implicit rewards, one per answer, detached, (B, K); for pairs K = 2, chosen first.
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
