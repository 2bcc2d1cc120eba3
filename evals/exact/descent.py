"""Training in a finite world: gradient descent on a loss's exact expected value, from several starts.

The expectation runs over every prompt, pair and label, so there is no noise: what training reaches is what the loss
asks for. Minima of fixed functions are found with L-BFGS, kinked ones with Adam after it; where the data
come from the policy itself (self-play) there is no function to minimise, and ``follow`` takes plain gradient
steps with the data held fixed in each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from align.losses.catalogue import Loss
from align.losses.types import PairLogps, SequenceLogps

from .rows import Stack
from .worlds import World

Objective = Callable[[Tensor], Tensor]


def minimise(objective: Objective, start: Tensor, *, iterations: int = 400, rounds: int = 3) -> Tensor:
    """Where L-BFGS with strong Wolfe steps ends; several rounds, so that one that stalls starts afresh."""
    x = start.detach().clone().requires_grad_(True)
    small = 1e-12 if x.dtype == torch.float64 else 1e-7

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = objective(x)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    for _ in range(rounds):
        optimiser = torch.optim.LBFGS(
            [x],
            max_iter=iterations,
            max_eval=2 * iterations,
            history_size=30,
            tolerance_grad=small,
            tolerance_change=small**2,
            line_search_fn="strong_wolfe",
        )
        optimiser.step(closure)  # type: ignore[no-untyped-call]
        if x.grad is not None and float(x.grad.abs().max()) <= small:
            break
    return x.detach()


def minimise_kinked(objective: Objective, start: Tensor, *, steps: int = 400) -> Tensor:
    """For hinges, at whose kinks L-BFGS stalls: Adam from where it does, with a step that shrinks by 1e5 in all."""
    x = minimise(objective, start, iterations=60, rounds=2).requires_grad_(True)
    optimiser = torch.optim.Adam([x], lr=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, gamma=1e-5 ** (1 / steps))
    for _ in range(steps):
        optimiser.zero_grad()
        objective(x).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return x.detach()


def follow(surrogate: Objective, start: Tensor, *, rate: float, steps: int, small: float = 1e-10) -> Tensor:
    """Plain gradient steps on a surrogate that is made anew at each point; ends early where the gradient vanishes."""
    x = start.detach().clone()
    for _ in range(steps):
        x.requires_grad_(True)
        (gradient,) = torch.autograd.grad(surrogate(x), x)
        x = (x - rate * gradient).detach()
        if float(gradient.abs().max()) < small:
            break
    return x


def starts(world: World, stack: Stack) -> list[Tensor]:
    """Three tables of logits to start from: the reference, the uniform one, and a random one."""
    draw = torch.Generator().manual_seed(stack.seed + 1)
    random = torch.randn(world.reference.shape, generator=draw, dtype=torch.float64)
    return [stack.here(x) for x in (world.reference, torch.zeros_like(random), 2 * random)]


def group(logps: Tensor, length: Tensor) -> SequenceLogps:
    """All N answers to each prompt as one group, from log-probs (P, N) and lengths (N,)."""
    return SequenceLogps(logps, length.expand(logps.shape))


def every_pair(answers: int) -> tuple[Tensor, Tensor]:
    """The pairs i < j of N answers, row-major, (N(N-1)/2,) each."""
    i, j = torch.triu_indices(answers, answers, 1)
    return i, j


def expected_pair_loss(
    loss: Loss,
    policy: Tensor,
    reference: Tensor,
    length: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    hard: bool = False,
) -> Tensor:
    """Exact expectation of a loss on pairs.

    Args:
        policy, reference: log-probs of every answer, (P, N).
        length: tokens of each answer, (N,).
        labels: probability that answer i is preferred to j, (P, N, N).
        weights: probability of each pair i < j, row-major, (P, M), constant; None: all alike.
        hard: sure labels, each order of a pair weighed with its probability, also where the loss takes soft ones.
    """
    i, j = (index.to(policy.device) for index in every_pair(policy.shape[1]))
    p = labels[:, i, j]
    share = torch.full_like(p, 1 / p.shape[1]) if weights is None else weights
    if hard or not loss.info.soft:
        i, j = torch.cat([i, j]), torch.cat([j, i])
        share = torch.cat([share * p, share * (1 - p)], dim=1)
    pairs = [_pairs(logps, length, i, j) for logps in (policy, reference)]
    soft = () if hard or not loss.info.soft else (p.flatten(),)
    out = loss(pairs[0], pairs[1], *soft)
    return (share.flatten() * out.loss).sum() / len(policy)


def _pairs(logps: Tensor, length: Tensor, i: Tensor, j: Tensor) -> PairLogps:
    def side(index: Tensor) -> SequenceLogps:
        total = logps[:, index]
        return SequenceLogps(total.flatten(), length[index].expand(total.shape).flatten())

    return PairLogps(side(i), side(j))


def train_pairs(
    loss: Loss,
    world: World,
    stack: Stack,
    *,
    labels: Tensor | None = None,
    hard: bool = False,
    kinked: bool = False,
    steps: int = 400,
    rounds: int = 3,
) -> list[Tensor]:
    """The policies, (P, N) each, that training on every pair of the world reaches from each start.

    Args:
        labels: (P, N, N); None: the world's.
        hard: as in ``expected_pair_loss``.
        kinked: the loss has kinks at its optimum.
        steps: of Adam, where it has.
        rounds: of L-BFGS; one is enough to see that there is no optimum.
    """
    reference = stack.here(world.log_mu)
    length = stack.here(world.length)
    wanted = stack.here(world.labels if labels is None else labels)

    def objective(logits: Tensor) -> Tensor:
        return expected_pair_loss(loss, world.sequence_logps(logits), reference, length, wanted, hard=hard)

    def end(start: Tensor) -> Tensor:
        return minimise_kinked(objective, start, steps=steps) if kinked else minimise(objective, start, rounds=rounds)

    return [world.sequence_logps(end(start)).exp() for start in starts(world, stack)]
