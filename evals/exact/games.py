"""Preference games whose equilibrium is known: what self-play should reach.

A game gives to every pair of answers the probability ``p(i > j)`` that i is preferred; it need not come from a reward
and may run in circles. The KL-regularised game of strength tau (preference units per nat) has one symmetric Nash
equilibrium, the policy ``pi ~ mu exp(p(. > pi) / tau)`` with ``p(i > pi) = sum_j pi_j p(i > j)`` (arXiv:2312.00886).

IPO-MD and Nash-MD play against a mixture of the policy and the reference instead (coefficient: the reference's
weight). With ``pi_b ~ pi^(1-b) mu^b`` over whole answers their fixed point makes that *mixture* the equilibrium, of
strength ``tau / (1 - b)``. What is sampled in practice is the mixture of next-token distributions, which is another
one as soon as answers have two tokens: the fixed point is then only ``pi ~ mu exp(p(. > pi_b) / tau)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.optimize import root
from torch import Tensor

from .worlds import World

Mixture = Callable[[Tensor], Tensor]


def biased_rock_paper_scissors() -> tuple[Tensor, Tensor]:
    """A game on three answers without a best one, ``p`` (1, 3, 3), and a reference for it, ``mu`` (1, 3)."""
    p = torch.tensor([[[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]]], dtype=torch.float64)
    return p, torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)


def circular_labels(prompts: int, answers: int, *, seed: int, spread: float = 1.5) -> Tensor:
    """A random game: ``sigma`` of a random skew-symmetric matrix, which no reward explains, (P, N, N)."""
    draw = torch.Generator().manual_seed(seed)
    skew = spread * torch.randn(prompts, answers, answers, generator=draw, dtype=torch.float64)
    return torch.sigmoid(skew - skew.transpose(1, 2))


def against(p: Tensor, opponent: Tensor) -> Tensor:
    """Probability that each answer is preferred to one of the opponent's, ``p(i > opponent)``, (P, N)."""
    return (p @ opponent[..., None])[..., 0]


def fixed_point(p: Tensor, mu: Tensor, tau: float, mixture: Mixture = lambda policy: policy) -> Tensor:
    """The policy with ``pi ~ mu exp(p(. > mixture(pi)) / tau)``, (P, N), by Newton's method.

    Solved first for a strong regulariser, where the answer is near mu, then for weaker ones down to tau.

    Args:
        p: (P, N, N).
        mu: (P, N), positive.
        tau: positive.
        mixture: what the policy plays against, given the policy; itself by default, and then the fixed point is the
            Nash equilibrium.

    Raises:
        RuntimeError: not found.
    """
    log_mu = mu.log()
    log_policy = log_mu

    def residual(x: Tensor, strength: float) -> Tensor:
        policy = x.softmax(-1)
        return x - (log_mu + against(p, mixture(policy)) / strength).log_softmax(-1)

    for strength in [tau * factor for factor in (16.0, 8.0, 4.0, 2.0, 1.0)]:
        found = root(
            lambda x, strength=strength: residual(torch.from_numpy(x).view_as(mu), strength).flatten().numpy(),
            log_policy.flatten().numpy(),
            tol=1e-13,
        )
        log_policy = torch.from_numpy(found.x).view_as(mu)
    worst = float(residual(log_policy, tau).abs().max())
    if worst > 1e-8:
        raise RuntimeError(f"no fixed point at tau = {tau}: residual {worst:.1e}")
    return log_policy.softmax(-1)


def nash(p: Tensor, mu: Tensor, tau: float) -> Tensor:
    """Nash equilibrium of the game with strength tau, (P, N)."""
    return fixed_point(p, mu, tau)


def nash_md(p: Tensor, mu: Tensor, tau: float, *, step: float, iterations: int) -> Tensor:
    """Tabular Nash-MD from mu, (P, N) (arXiv:2312.00886).

    ``log pi' = (1 - step tau) log pi + step tau log mu + step p(. > pi_b) + const`` with ``pi_b`` the sequence-level
    mixture of coefficient ``step * tau``. At a fixed step it ends where IPO-MD of that coefficient does; the
    equilibrium itself is its limit for small steps.
    """
    coefficient = step * tau
    log_mu = log_policy = mu.log()
    for _ in range(iterations):
        mixed = (1 - coefficient) * log_policy + coefficient * log_mu
        log_policy = (mixed + step * against(p, mixed.softmax(-1))).log_softmax(-1)
    return log_policy.exp()


def sequence_mixture(mu: Tensor, coefficient: float) -> Mixture:
    """The mixture of whole answers, ``pi^(1-b) mu^b / Z``."""
    return lambda policy: ((1 - coefficient) * policy.log() + coefficient * mu.log()).softmax(-1)


def token_mixture(world: World, coefficient: float) -> Mixture:
    """The mixture of next-token distributions, as it is sampled in practice, as a distribution over answers."""

    def mix(policy: Tensor) -> Tensor:
        tables = [world.table(policy).log_softmax(-1), world.reference.log_softmax(-1)]
        return world.sequence_logps((1 - coefficient) * tables[0] + coefficient * tables[1]).exp()

    return mix
