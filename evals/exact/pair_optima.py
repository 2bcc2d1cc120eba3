"""Optima of the losses on pairs, by formula, root or solver: what ``pair_targets`` compares training with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .descent import every_pair
from .solvers import constrained, epigraph, newton
from .worlds import World


def flipped(world: World, share: float) -> Tensor:
    """The world's labels with a share of them turned round."""
    return (1 - share) * world.labels + share * world.labels.transpose(1, 2)


def each(world: World, solve: Callable[[int], Tensor]) -> Tensor:
    """One solution a prompt, stacked, (P, N)."""
    return torch.stack([solve(row) for row in range(len(world.reward))])


def expected(pair: Callable[[Tensor, Tensor], Tensor], p: Tensor) -> Tensor:
    """Mean over all pairs of ``p_ij pair(i, j) + p_ji pair(j, i)``, for the labels p (N, N) of one prompt."""
    i, j = every_pair(len(p))
    return (p[i, j] * pair(i, j) + p[j, i] * pair(j, i)).mean()


def logistic_optimum(world: World, labels: Tensor, margin: float = 0.0) -> Tensor:
    """The values u (P, N) at which the mean of ``p softplus(m - (u_i - u_j))`` is least, up to a shift."""

    def solve(row: int) -> Tensor:
        return newton(lambda u: expected(lambda i, j: F.softplus(margin - u[i] + u[j]), labels[row]), start)

    start = torch.zeros(world.reward.shape[1], dtype=torch.float64)
    return each(world, solve)


def constrained_optimum(world: World, pair: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """The policy at which the expectation of ``pair(S, i, j)`` is stationary, S its log-probs, (P, N)."""
    uniform = torch.full((world.reward.shape[1],), 1 / world.reward.shape[1], dtype=torch.float64).log()

    def solve(row: int) -> Tensor:
        return constrained(lambda s: expected(partial(pair, s), world.labels[row]), uniform).exp()

    return each(world, solve)


def cpo_optimum(world: World, beta: float, sft_weight: float) -> Tensor:
    """Convex in S, and falling when all S rise."""
    n = world.length

    def pair(s: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return F.softplus(-beta * (s[i] - s[j])) - sft_weight * s[i] / n[i]

    return constrained_optimum(world, pair)


def orpo_optimum(world: World, odds_weight: float, sft_weight: float) -> Tensor:
    """``-log sigma`` of the log odds ratio is ``softplus(logit P_l - logit P_w)``."""
    n = world.length

    def pair(s: Tensor, i: Tensor, j: Tensor) -> Tensor:
        mean = s / n
        logit = mean - torch.log(-torch.expm1(mean))
        return odds_weight * F.softplus(logit[j] - logit[i]) - sft_weight * mean[i]

    return constrained_optimum(world, pair)


def dpop_optimum(world: World, beta: float, penalty: float) -> Tensor:
    """Convex in the log-ratios; their fall below the reference in slacks."""
    n = world.reward.shape[1]

    def solve(row: int) -> Tensor:
        def objective(r: Tensor, fall: Tensor) -> Tensor:
            return expected(lambda i, j: F.softplus(-beta * (r[i] - r[j] - penalty * fall[i])), world.labels[row])

        below = -torch.eye(n, dtype=torch.float64)
        edge = world.log_mu[row]
        return (edge + epigraph(objective, below, torch.zeros(n, dtype=torch.float64), edge)).softmax(-1)

    return each(world, solve)


def slic_optimum(world: World, delta: float, sft_weight: float, *, reference: bool) -> Tensor:
    """A linear programme (with the sum of probabilities as its edge where likelihood counts)."""
    count = world.reward.shape[1]
    i, j = every_pair(count)
    better, worse = torch.cat([i, j]), torch.cat([j, i])
    hinge = F.one_hot(worse, count).double() - F.one_hot(better, count).double()

    def solve(row: int) -> Tensor:
        share = world.labels[row][better, worse] / len(i)
        liked = torch.zeros(count, dtype=torch.float64).index_add(0, better, share)

        def objective(s: Tensor, t: Tensor) -> Tensor:
            return share @ t - sft_weight * (liked @ s)

        margin = torch.full((len(better),), delta, dtype=torch.float64)
        if reference:
            return (world.log_mu[row] + epigraph(objective, hinge, margin, None)).softmax(-1)
        return epigraph(objective, hinge, margin, torch.zeros(count, dtype=torch.float64)).softmax(-1)

    return each(world, solve)


def borda(labels: Tensor, tau: float) -> Tensor:
    """Least squares of all ``u_i - u_j = (p_ij - 1/2) / tau``: ``(mean_j p_ij - 1/2) / tau``, (P, N)."""
    return (labels.mean(-1) - 0.5) / tau


def sft_optimum(world: World) -> Tensor:
    """``sum_i q_i S_i / |y_i|`` is largest at ``pi ~ q / |y|``, q the share of an answer among the chosen ones."""
    chosen = (world.labels.sum(-1) - 0.5) / world.length
    return chosen / chosen.sum(-1, keepdim=True)


def certain(world: World) -> Tensor:
    """The better answer is always preferred: labels 0 and 1."""
    return 0.5 * (1 + (world.reward[:, :, None] - world.reward[:, None, :]).sign())
