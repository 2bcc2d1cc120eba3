"""The value of a candidate token or block, from the rewards of answers that go on from it (arXiv:2405.20495).

With a policy p, a reward r and a temperature beta in units of the reward, the aligned law of whole answers is
``rho_r(y) ∝ p(y) exp(r(y) / beta)``. Of what may follow a state and a candidate:

- **mean**: ``Q* = E_rho_r[r]``. Rollouts of a baseline that is aligned with r (direct transfer) give it as their mean.
  Those of one that is aligned with another reward r_BL (indirect transfer) give it with weights
  ``exp((r - r_BL) / beta)``.
- **soft**: ``V = beta log E_p[exp(r / beta)]``. With it, and ``alpha = beta``, the choice of tokens draws answers from
  rho_r, which with Q* it does not. Rollouts of the policy itself give it as they are; those of a baseline that is
  aligned with r_BL (r itself may be it) with weights ``exp(-r_BL / beta)``.

Weights are normalised by their own sum: their constant depends on the state and is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LEAST_ESS = 1.5
"""Effective number of rollouts under which weights are not trusted."""

Kind = Literal["mean", "soft"]


@dataclass(frozen=True)
class Estimate:
    """A value from rollouts.

    Args:
        value: in units of the reward.
        ess: effective number of rollouts, ``(sum w)^2 / sum w^2``; None where there are no weights.
        plain: whether it was too small, so that the weights were left out.
    """

    value: float
    ess: float | None = None
    plain: bool = False


def estimate(
    rewards: Sequence[float], baseline_rewards: Sequence[float] | None = None, *, kind: Kind = "mean", beta: float
) -> Estimate:
    """The value of a candidate from its rollouts; with equal weights where the effective number is under 1.5.

    Args:
        rewards: r of each rollout; -inf for one that must not be.
        baseline_rewards: r_BL of each, where the baseline is not aligned with r (``mean``), or is not the policy
            (``soft``).
        kind: of the value.
        beta: temperature, in units of the reward.

    Raises:
        ValueError: every weight is 0.
    """
    if baseline_rewards is None:
        return Estimate(weighted(rewards, [0.0] * len(rewards), kind=kind, beta=beta))
    log_weights = transfer_weights(rewards, baseline_rewards, kind=kind, beta=beta)
    shares = normalised(log_weights)
    ess = 1 / math.fsum(share * share for share in shares)
    plain = ess < LEAST_ESS
    return Estimate(
        weighted(rewards, [0.0] * len(rewards) if plain else log_weights, kind=kind, beta=beta), ess, plain
    )


def transfer_weights(
    rewards: Sequence[float], baseline_rewards: Sequence[float], *, kind: Kind, beta: float
) -> list[float]:
    """Log-weights of rollouts of a baseline that is aligned with another reward, up to a constant, nats.

    ``(r - r_BL) / beta`` takes them to the law that is aligned with r, of which ``mean`` is the mean; ``-r_BL / beta``
    to the policy, of which ``soft`` is the soft mean.
    """
    return [
        (reward - other if kind == "mean" else -other) / beta
        for reward, other in zip(rewards, baseline_rewards, strict=True)
    ]


def weighted(rewards: Sequence[float], log_weights: Sequence[float], *, kind: Kind, beta: float) -> float:
    """``sum w r / sum w``, or ``beta log (sum w exp(r / beta) / sum w)``: from the least r to the largest.

    Raises:
        ValueError: every weight is 0.
    """
    terms = [(share, reward) for share, reward in zip(normalised(log_weights), rewards, strict=True) if share]
    most = max(reward for _, reward in terms)
    if most == -math.inf:
        return most
    if kind == "mean":
        value = math.fsum(share * reward for share, reward in terms)
    else:
        value = most + beta * math.log(math.fsum(share * math.exp((reward - most) / beta) for share, reward in terms))
    return min(most, max(value, min(reward for _, reward in terms)))


def normalised(log_weights: Sequence[float]) -> list[float]:
    """The weights, divided by their sum.

    Raises:
        ValueError: every one is 0, so that nothing is known of the value.
    """
    most = max(log_weights)
    if most == -math.inf:
        raise ValueError("every rollout has weight 0: the reward rules out all that the baseline goes on with")
    weights = [math.exp(log_weight - most) for log_weight in log_weights]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
