"""What the self-play losses ask for: equilibria of games, and one step of an iteration in closed form.

The policy's own answers are enumerated with their probabilities, and held fixed in each gradient step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from scipy.special import lambertw
from torch import Tensor

from align.losses.catalogue import Loss
from align.losses.selfplay import mixture_logps
from align.losses.types import SequenceLogps

from .descent import every_pair, expected_pair_loss, follow, group, minimise, starts
from .games import (
    Mixture,
    against,
    biased_rock_paper_scissors,
    circular_labels,
    fixed_point,
    nash,
    nash_md,
    sequence_mixture,
    token_mixture,
)
from .rows import Row, Stack, Target
from .solvers import normalised, root
from .worlds import World, make_world

TOLERANCE = 1e-6
STEPS = 4000


def one_token_game() -> tuple[World, Tensor]:
    """Biased rock, paper, scissors as a world of three answers of one token, and its preferences (1, 3, 3)."""
    p, mu = biased_rock_paper_scissors()
    world = make_world(seed=0, prompts=1, alphabet=2, steps=1)
    return replace(world, reference=world.table(mu)), p


def two_step_game(stack: Stack) -> tuple[World, Tensor]:
    """A random game in circles on answers of one and two tokens, and its preferences (1, N, N)."""
    world = make_world(seed=stack.seed + 4, prompts=1, alphabet=1, steps=2)
    return world, circular_labels(1, len(world.length), seed=stack.seed + 4)


def play(world: World, p: Tensor, stack: Stack, tau: float, mixture: Mixture, name: str = "ipo") -> list[Tensor]:
    """Where a pair loss on pairs of the mixture's answers ends, (P, N) from each start."""
    loss, length, reference = Loss.of(name, beta=tau), stack.here(world.length), stack.here(world.log_mu)
    labels = stack.here(p)
    i, j = every_pair(len(world.length))

    def surrogate(logits: Tensor) -> Tensor:
        opponent = mixture(logits.detach())
        weights = 2 * opponent[:, i] * opponent[:, j]
        return expected_pair_loss(loss, world.sequence_logps(logits), reference, length, labels, weights)

    # The gradient of IPO is -4/tau times that of the game's payoff; DPO's is at most tau.
    rate = tau if name == "ipo" else 4 / tau
    return [
        world.sequence_logps(follow(surrogate, start, rate=rate, steps=STEPS, small=_small(stack))).exp()
        for start in starts(world, stack)
    ]


def play_nash_md_pg(world: World, p: Tensor, stack: Stack, tau: float, mixture: Mixture) -> list[Tensor]:
    """Where Nash-MD-PG against the mixture ends, (P, N) from each start."""
    loss, length, reference = Loss.of("nash_md_pg", beta=tau), stack.here(world.length), stack.here(world.log_mu)
    labels = stack.here(p)
    rows = length.expand(reference.shape).flatten()

    def surrogate(logits: Tensor) -> Tensor:
        policy = world.sequence_logps(logits)
        wins = against(labels, mixture(logits.detach())).clamp(0, 1).flatten()
        pair = [SequenceLogps(logps.flatten(), rows) for logps in (policy, reference)]
        out = loss.info.function(*pair, wins, **loss.settings)
        return (policy.detach().exp().flatten() * out.loss).sum() / len(policy)

    return [
        world.sequence_logps(follow(surrogate, start, rate=4.0, steps=STEPS, small=_small(stack))).exp()
        for start in starts(world, stack)
    ]


def _small(stack: Stack) -> float:
    return 1e-9 if stack.dtype == torch.float64 else 1e-6


def itself(world: World) -> Mixture:
    """Answers of the policy with these logits."""
    return lambda logits: world.sequence_logps(logits).exp()


def sampled_mixture(world: World, stack: Stack, coefficient: float) -> Mixture:
    """Answers of the library's token-level mixture with the reference."""
    reference = stack.here(world.reference)
    return lambda logits: world.sequence_logps(mixture_logps(logits, reference, coefficient=coefficient)).exp()


def check_online_ipo(stack: Stack) -> Iterator[Row]:
    """Online IPO and IPO-MD, with offline IPO and online DPO beside them."""
    tolerance = stack.tolerance(TOLERANCE)
    world, p = one_token_game()
    for tau in (1.0, 0.2):
        ours = play(world, p, stack, tau, itself(world))
        quantity = f"online: Nash at tau {tau:g}"
        yield Row.policy("ipo", quantity, nash(p, world.mu, tau), ours, world.reward, tolerance)
    # On pairs that the reference gave, each answer is held against the reference, and the game is never played.
    offline = play(world, p, stack, 0.2, lambda logits: stack.here(world.mu))
    borda = normalised(world.log_mu + against(p, world.mu) / 0.2)
    yield Row.policy("ipo", "offline: mu exp(p(. > mu)/tau)", borda, offline, world.reward, tolerance)
    yield Row.policy("ipo", "offline beside Nash, tau 0.2", nash(p, world.mu, 0.2), offline, world.reward, None)
    online = play(world, p, stack, 0.2, itself(world), "dpo")
    yield Row.policy("ipo", "online DPO beside it", nash(p, world.mu, 0.2), online, world.reward, None)
    tau, coefficient = 0.5, 0.5
    sampled = sampled_mixture(world, stack, coefficient)
    mixed = [sampled(stack.here(world.table(x.double().cpu()))) for x in play(world, p, stack, tau, sampled)]
    exact = nash(p, world.mu, tau / (1 - coefficient))
    quantity = "IPO-MD's mixture: Nash at 2 tau"
    yield Row.policy("ipo", quantity, exact, mixed, world.reward, tolerance)

    world, p = two_step_game(stack)
    ours = play(world, p, stack, 0.2, itself(world))
    yield Row.policy("ipo", "online, two tokens: Nash", nash(p, world.mu, 0.2), ours, world.reward, tolerance)
    sampled = sampled_mixture(world, stack, coefficient)
    ours = play(world, p, stack, 0.1, sampled)
    exact = fixed_point(p, world.mu, 0.1, token_mixture(world, coefficient))
    yield Row.policy("ipo", "IPO-MD, two tokens: fixed point", exact, ours, world.reward, tolerance)
    mixture, equilibrium = token_mixture(world, coefficient)(exact), nash(p, world.mu, 0.2)
    yield Row.policy("ipo", "its mixture beside Nash, 2 tau", equilibrium, [mixture], world.reward, None)


def check_nash_md_pg(stack: Stack) -> Iterator[Row]:
    """Against itself the equilibrium; against the mixture IPO-MD's fixed point, as tabular Nash-MD has it."""
    tolerance, name = stack.tolerance(TOLERANCE), "nash_md_pg"
    world, p = one_token_game()
    for tau in (1.0, 0.2):
        ours = play_nash_md_pg(world, p, stack, tau, itself(world))
        quantity = f"coefficient 0: Nash at tau {tau:g}"
        yield Row.policy(name, quantity, nash(p, world.mu, tau), ours, world.reward, tolerance)
    ours = play_nash_md_pg(world, p, stack, 0.5, sampled_mixture(world, stack, 0.5))
    exact = fixed_point(p, world.mu, 0.5, sequence_mixture(world.mu, 0.5))
    yield Row.policy(name, "coefficient 1/2: IPO-MD's", exact, ours, world.reward, tolerance)
    tabular = nash_md(p, world.mu, 0.5, step=1.0, iterations=500)
    yield Row.policy(name, "tabular Nash-MD, step 1/(2 tau)", exact, [tabular], world.reward, TOLERANCE)
    world, p = two_step_game(stack)
    ours = play_nash_md_pg(world, p, stack, 0.2, itself(world))
    yield Row.policy(name, "two tokens: Nash", nash(p, world.mu, 0.2), ours, world.reward, tolerance)


def scores(world: World, stack: Stack) -> Tensor:
    """Unbounded scores of each answer against the reference's answers in a random game, (P, N)."""
    p = circular_labels(*world.reward.shape, seed=stack.seed + 5)
    return against(p.logit(), world.mu)


def win_rates(world: World, stack: Stack) -> Tensor:
    """Win rate of each answer against the reference's answers in a random game, (P, N)."""
    return against(circular_labels(*world.reward.shape, seed=stack.seed + 5), world.mu)


def train_step(name: str, world: World, stack: Stack, values: Tensor, beta: float) -> list[Tensor]:
    """Where one iteration of GPO or SPPO from the reference ends, all answers in one group, (P, N) from each start.

    A form with a term for each answer is weighed with the answers' probabilities under the previous iterate.
    """
    loss, length, previous = Loss.of(name, beta=beta), stack.here(world.length), stack.here(world.log_mu)
    given = stack.here(values)

    def objective(logits: Tensor) -> Tensor:
        policy = group(world.sequence_logps(logits), length)
        out = loss.info.function(policy, group(previous, length), given, **loss.settings).loss
        return (previous.exp() * out).sum(-1).mean() if out.ndim == 2 else out.mean()

    return [world.sequence_logps(minimise(objective, start)).exp() for start in starts(world, stack)]


def check_step(
    name: str, values: Callable[[World, Stack], Tensor], centre: float, beta: float, stack: Stack
) -> Iterator[Row]:
    """Regression of differences reaches the closed form of the step."""
    world = make_world(seed=stack.seed)
    s = values(world, stack)
    exact = normalised(world.log_mu + (s - centre) / beta)
    ours = train_step(name, world, stack, s, beta)
    yield Row.policy(name, "pi_t exp(s/beta)/Z", exact, ours, world.reward, stack.tolerance(TOLERANCE))


def check_pointwise(name: str, values: Callable[[World, Stack], Tensor], centre: float, stack: Stack) -> Iterator[Row]:
    """The dropped-constant form reaches its own optimum, and how far that is from the closed form of the step."""
    world = make_world(seed=stack.seed)
    s = values(world, stack)
    for size in (0.3, 3.3):
        beta = float((s - centre).abs().max()) / size
        target = (s - centre) / beta
        exact, ours = pointwise_optimum(world, target), train_step(name, world, stack, s, beta)
        yield Row.policy(
            name, f"own optimum, max s/beta {size}", exact, ours, world.reward, stack.tolerance(TOLERANCE)
        )
        step = normalised(world.log_mu + target)
        yield Row.policy(name, "beside pi_t exp(s/beta)/Z", step, ours, world.reward, None)


def pointwise_optimum(world: World, target: Tensor) -> Tensor:
    """Least ``sum_i mu_i (h_i - t_i)^2`` with ``sum_i mu_i exp(h_i) = 1``, as a policy (P, N).

    Stationary where ``2 (h - t) + m exp(h) = 0``, so ``h = t - W(m exp(t) / 2)`` with Lambert's W, and m the root of
    the sum. At m > 0 the sum falls; where the targets themselves sum to less than 1, m is negative.
    """

    def ratio(m: float, row: int) -> np.ndarray:
        t = target[row].numpy()
        return np.asarray(t - lambertw(m * np.exp(t) / 2).real)

    def excess(m: float, row: int) -> float:
        return float((world.log_mu[row] + torch.from_numpy(ratio(m, row))).logsumexp(-1))

    policies = []
    for row in range(len(target)):
        low = -2 / float(np.e * target[row].exp().max())
        # m = low + exp(x): the principal branch ends at low.
        x = root(lambda x, row=row, low=low: -excess(low + float(np.exp(x)), row))  # type: ignore[misc]
        policies.append(world.log_mu[row] + torch.from_numpy(ratio(low + float(np.exp(x)), row)))
    return torch.stack(policies).softmax(-1)


def check_mdpo(stack: Stack) -> Iterator[Row]:
    """All inner steps of one update, on whole answers of the reference."""
    world, step_size = make_world(seed=stack.seed), 0.5
    loss, previous = Loss.of("mdpo", step_size=step_size), stack.here(world.log_mu)
    advantage = stack.here(world.reward)

    def objective(logits: Tensor) -> Tensor:
        policy = world.sequence_logps(logits)
        out = loss.info.function(policy.flatten(), previous.flatten(), advantage.flatten(), **loss.settings)
        return (previous.exp().flatten() * out.loss).sum() / len(policy)

    ours = [world.sequence_logps(minimise(objective, start)).exp() for start in starts(world, stack)]
    exact = normalised(world.log_mu + step_size * world.reward)
    yield Row.policy("mdpo", "pi_k exp(t A)/Z", exact, ours, world.reward, stack.tolerance(TOLERANCE))


_STEP = "pi_t exp(s/beta)/Z, s the mean score against pi_t"
_POINTWISE = "Lambert's W and a root; beside pi_t exp(s/beta)/Z, because a normalised policy cannot drop the constant"

SELFPLAY: dict[str, Target] = {
    "nash_md_pg": Target("solver", "Nash equilibrium: mu exp(p(. > pi)/beta)/Z, a fixed point", check_nash_md_pg),
    "gpo": Target("closed form", _STEP, partial(check_step, "gpo", scores, 0.0, 1.0)),
    "gpo_pointwise": Target("scalar root", _POINTWISE, partial(check_pointwise, "gpo_pointwise", scores, 0.0)),
    "sppo": Target("closed form", _STEP, partial(check_step, "sppo", win_rates, 0.5, 0.25)),
    "sppo_pointwise": Target("scalar root", _POINTWISE, partial(check_pointwise, "sppo_pointwise", win_rates, 0.5)),
    "mdpo": Target("closed form", "pi_k exp(t A)/Z", check_mdpo),
}
