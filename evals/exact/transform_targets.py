"""What transformed rewards ask for: the policy that maximises ``E[u] - gamma KL(pi | mu)`` is a posterior.

``u`` comes from ``align.rewards.transforms``, the expectation and the KL run over all answers of a world, and a table
of logits is trained to it. With p the probability that an answer is good, the optimum is ``mu p^(1/gamma) / Z``: at
gamma 1 it is ``mu`` given that the answer is good (arXiv:2402.00742).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from align.rewards.transforms import AllOf, AnyOf, LogSigmoidCentered, Not, Weighted

from .descent import minimise, starts
from .rows import Row, Stack, Target
from .solvers import normalised
from .worlds import World, make_world

Transform = Callable[[Mapping[str, Tensor]], Tensor]


def regularised(
    transform: Transform, world: World, columns: Mapping[str, Tensor], gamma: float, stack: Stack
) -> list[Tensor]:
    """The policies, (P, N) each, that training on ``E[u] - gamma KL`` reaches from each start.

    Args:
        transform: of columns (P * N,), as ``align score`` and the GRPO reward call it.
        columns: rewards and references, (P, N) each.
    """
    log_mu = stack.here(world.log_mu)
    u = transform({name: stack.here(values).flatten() for name, values in columns.items()}).view_as(log_mu)

    def objective(logits: Tensor) -> Tensor:
        logps = world.sequence_logps(logits)
        return (logps.exp() * (gamma * (logps - log_mu) - u)).sum(-1).mean()

    return [world.sequence_logps(minimise(objective, start)).exp() for start in starts(world, stack)]


def _world(stack: Stack) -> tuple[World, dict[str, Tensor], Tensor, Tensor]:
    """A world, the rewards and references of two goals, and the probability that an answer is good in each, (P, N)."""
    world = make_world(seed=stack.seed)
    second = make_world(seed=stack.seed + 100).reward
    columns = {}
    for name, reward in (("a", world.reward), ("b", second)):
        columns[name] = reward
        columns[f"{name}_reference"] = reward.quantile(0.85, dim=1, keepdim=True).expand_as(reward)
    good = [torch.sigmoid(columns[name] - columns[f"{name}_reference"]) for name in ("a", "b")]
    return world, columns, good[0], good[1]


A, B = LogSigmoidCentered("a", "a_reference"), LogSigmoidCentered("b", "b_reference")


def _row(
    method: str,
    quantity: str,
    transform: Transform,
    power: Callable[[Tensor, Tensor], Tensor],
    gamma: float,
    stack: Stack,
) -> Row:
    """Training against ``mu power(p, q) / Z``, p and q the probabilities that an answer is good in either goal."""
    world, columns, p, q = _world(stack)
    exact = normalised(world.log_mu + power(p, q).log())
    ours = regularised(transform, world, columns, gamma, stack)
    return Row.policy(method, quantity, exact, ours, world.reward, stack.tolerance(1e-5))


def check_lsc(stack: Stack) -> Iterator[Row]:
    """One reward, at the KL coefficient that makes it a posterior and at one that does not; and its opposite."""
    yield _row("lsc", "mu given good, gamma 1", A, lambda p, q: p, 1.0, stack)
    yield _row("lsc", "mu p^2 / Z, gamma 1/2", A, lambda p, q: p**2, 0.5, stack)
    yield _row("lsc", "mu given not good, by Not", Not(A), lambda p, q: 1 - p, 1.0, stack)


def check_all_of(stack: Stack) -> Iterator[Row]:
    """Two rewards: the posterior of good in both, and required so many times."""
    yield _row("all_of", "mu given good in both", AllOf([A, B]), lambda p, q: p * q, 1.0, stack)
    yield _row(
        "all_of",
        "weights 2, 1/2: mu p^2 q^.5 / Z",
        Weighted([A, B], [2.0, 0.5]),
        lambda p, q: p**2 * q**0.5,
        1.0,
        stack,
    )


def check_any_of(stack: Stack) -> Iterator[Row]:
    """Two rewards: the posterior of good in one at least."""
    yield _row(
        "any_of", "mu given good in one at least", AnyOf([A, B]), lambda p, q: 1 - (1 - p) * (1 - q), 1.0, stack
    )


TRANSFORMS: dict[str, Target] = {
    "lsc": Target(
        "closed form", "mu p(good)^(1/gamma) / Z, p = sigma(r - r_ref), gamma the KL's coefficient", check_lsc
    ),
    "all_of": Target("closed form", "mu p_1 p_2 / Z: good in both", check_all_of),
    "any_of": Target("closed form", "mu (1 - (1 - p_1)(1 - p_2)) / Z: good in one at least", check_any_of),
}
