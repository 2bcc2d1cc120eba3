"""What the losses on pairs and rankings ask for.

All pairs of a world's answers are trained on, with Bradley-Terry labels unless a row says otherwise. In the formulas
``r`` is the world's reward, ``mu`` the reference, ``|y|`` a length, ``a = log(pi / mu) / |y|`` a mean log-ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.losses.catalogue import Loss
from align.losses.types import SequenceLogps

from .descent import expected_pair_loss, minimise, starts, train_pairs
from .games import circular_labels
from .pair_optima import (
    borda,
    certain,
    cpo_optimum,
    dpop_optimum,
    flipped,
    logistic_optimum,
    orpo_optimum,
    sft_optimum,
    slic_optimum,
)
from .rows import Row, Stack, Target
from .selfplay_targets import check_online_ipo
from .solvers import normalised, odds, per_token
from .worlds import World, make_world, total_variation

TOLERANCE = 1e-6
KINKED = 1e-4
STEEP = 1e-3


@dataclass(frozen=True)
class Case:
    """One end of training that is known.

    Args:
        quantity: what the row says.
        settings: of the loss.
        exact: the optimum in a world, (P, N).
        labels: the labels to train on, (P, N, N); the world's by default.
        hard: sure labels in their proportion, in place of soft ones.
        kinked: the loss has kinks at its optimum; then the world is smaller, and its rewards are spread more, as
            nearly even labels leave a hinge nearly flat.
        steep: one side of the kinks is so steep that descent takes longer and ends less near.
    """

    quantity: str
    settings: dict[str, Any]
    exact: Callable[[World], Tensor]
    labels: Callable[[World], Tensor] = field(default=lambda world: world.labels)
    hard: bool = False
    kinked: bool = False
    steep: bool = False


def check_cases(name: str, cases: list[Case], stack: Stack) -> Iterator[Row]:
    """Train to each case's optimum."""
    for case in cases:
        world = (
            make_world(seed=stack.seed, prompts=1, steps=2, spread=2.0) if case.kinked else make_world(seed=stack.seed)
        )
        loss = Loss.of(name, **case.settings)
        ours = train_pairs(
            loss,
            world,
            stack,
            labels=case.labels(world),
            hard=case.hard,
            kinked=case.kinked,
            steps=1000 if case.steep else 400,
        )
        tolerance = stack.tolerance(STEEP if case.steep else KINKED if case.kinked else TOLERANCE)
        yield Row.policy(name, case.quantity, case.exact(world), ours, world.reward, tolerance)


def _circular(world: World) -> Tensor:
    return circular_labels(*world.reward.shape, seed=7)


def check_dpo(stack: Stack) -> Iterator[Row]:
    """The optimum, with soft and with sure labels, with smoothing; and certain labels, where there is none."""
    cases = [
        Case("mu exp(r/beta)/Z", {"beta": 0.5}, lambda w: normalised(w.log_mu + w.reward / 0.5)),
        Case("the same, sure labels", {"beta": 0.5}, lambda w: normalised(w.log_mu + w.reward / 0.5), hard=True),
        Case(
            "label_smoothing 0.1 (Newton)",
            {"beta": 0.5, "label_smoothing": 0.1},
            lambda w: normalised(w.log_mu + logistic_optimum(w, flipped(w, 0.1)) / 0.5),
        ),
    ]
    yield from check_cases("dpo", cases, stack)
    world = make_world(seed=stack.seed, steps=2)
    loss, reference, length = Loss.of("dpo", beta=0.5), stack.here(world.log_mu), stack.here(world.length)
    sure = certain(world)

    def objective(logits: Tensor) -> Tensor:
        return expected_pair_loss(loss, world.sequence_logps(logits), reference, length, stack.here(sure))

    def least_margin(logits: Tensor) -> float:
        reward = 0.5 * (world.sequence_logps(logits) - reference).double().cpu()
        return float((reward[:, :, None] - reward[:, None, :])[sure > 0.5].min())

    ends = [least_margin(minimise(objective, start, iterations=25, rounds=1)) for start in starts(world, stack)]
    yield Row.at_least("dpo", "sure labels: margin, 25 steps", 8.0, min(ends))


def check_ipo(stack: Stack) -> Iterator[Row]:
    """Offline, whatever the labels; then on the policy's own answers."""
    cases = [
        Case("mu exp((mean p - 1/2)/beta)/Z", {"beta": 0.2}, lambda w: normalised(w.log_mu + borda(w.labels, 0.2))),
        Case(
            "the same, labels in circles",
            {"beta": 0.2},
            lambda w: normalised(w.log_mu + borda(_circular(w), 0.2)),
            labels=_circular,
        ),
        Case(
            "the same, sure labels",
            {"beta": 0.2},
            lambda w: normalised(w.log_mu + borda(certain(w), 0.2)),
            labels=certain,
            hard=True,
        ),
    ]
    yield from check_cases("ipo", cases, stack)
    yield from check_online_ipo(stack)


def check_ln_dpo(stack: Stack) -> Iterator[Row]:
    """The root's optimum, and how far dividing by Z would be from it."""

    def exact(world: World) -> Tensor:
        return per_token(world.reward / 2.0, world.length, world.log_mu)

    yield from check_cases("ln_dpo", [Case("mu exp(|y|(r/beta + c))", {"beta": 2.0}, exact)], stack)
    world = make_world(seed=stack.seed)
    divided = normalised(world.log_mu + world.length * world.reward / 2.0)
    yield Row.policy("ln_dpo", "beside mu exp(|y| r/beta)/Z", exact(world), [divided], world.reward, None)


def check_slic(stack: Stack) -> Iterator[Row]:
    """Soft labels have an optimum; certain ones a region of zero loss, in which each start ends elsewhere."""
    cases = [
        Case(
            "soft labels (linear programme)",
            {"beta": 0.5},
            lambda w: slic_optimum(w, 1 / 0.5, 0.0, reference=True),
            kinked=True,
        )
    ]
    yield from check_cases("slic", cases, stack)
    world = make_world(seed=stack.seed, steps=2)
    loss, labels = Loss.of("slic", beta=0.5), certain(world)
    ends = train_pairs(loss, world, stack, labels=labels)
    losses = [
        float(expected_pair_loss(loss, policy.double().cpu().log(), world.log_mu, world.length, labels))
        for policy in ends
    ]
    yield Row.at_most("slic", "sure labels: worst final loss", 1e-6, max(losses))
    apart = max(total_variation(a, b) for a in ends for b in ends)
    yield Row.at_least("slic", "sure labels: ends apart by", 0.01, apart)


def check_plackett_luce(stack: Stack) -> Iterator[Row]:
    """Every ordered triple of answers, with its probability; a fourth column of padding."""
    world, beta = make_world(seed=stack.seed, steps=2), 0.5
    count = world.reward.shape[1]
    ranking = torch.tensor([t for t in torch.cartesian_prod(*[torch.arange(count)] * 3).tolist() if len({*t}) == 3])
    scores = world.reward[:, ranking]
    share = torch.exp(scores[..., 0] - scores.logsumexp(-1) + scores[..., 1] - scores[..., 1:].logsumexp(-1))
    share = stack.here((share / share.sum(-1, keepdim=True)).flatten())
    columns = torch.cat([ranking, ranking[:, :1]], dim=1).to(stack.device)
    real = torch.full((len(world.reward) * len(ranking),), 3, device=stack.device)
    length = stack.here(world.length)[columns].repeat(len(world.reward), 1)
    length[:, 3] = 1
    loss = Loss.of("plackett_luce", beta=beta)

    def group(logps: Tensor) -> SequenceLogps:
        return SequenceLogps(logps[:, columns].flatten(0, 1), length)

    reference = stack.here(world.log_mu)

    def objective(logits: Tensor) -> Tensor:
        policy = group(world.sequence_logps(logits))
        return (share * loss.info.function(policy, group(reference), real, **loss.settings).loss).sum()

    ours = [world.sequence_logps(minimise(objective, start)).exp() for start in starts(world, stack)]
    exact = normalised(world.log_mu + world.reward / beta)
    quantity = "mu exp(r/beta)/Z, rankings of 3"
    yield Row.policy("plackett_luce", quantity, exact, ours, world.reward, stack.tolerance(TOLERANCE))


def _target(kind: Any, statement: str, name: str, *cases: Case) -> Target:
    return Target(kind, statement, partial(check_cases, name, list(cases)))


PAIRS: dict[str, Target] = {
    "dpo": Target("closed form", "mu exp(r/beta)/Z; none on certain labels: the margin grows for ever", check_dpo),
    "ln_dpo": Target("scalar root", "mu exp(|y| (r/beta + c)) with the c at which it sums to 1", check_ln_dpo),
    "robust_dpo": _target(
        "closed form",
        "mu exp(r/beta)/Z from labels of which a share label_smoothing is flipped",
        "robust_dpo",
        Case(
            "mu exp(r/beta)/Z, 1/5 flipped",
            {"beta": 0.5, "label_smoothing": 0.2},
            lambda w: normalised(w.log_mu + w.reward / 0.5),
            labels=lambda w: flipped(w, 0.2),
        ),
    ),
    "ipo": Target(
        "closed form",
        "all pairs alike: mu exp((mean_j p_ij - 1/2)/beta)/Z, Borda scores; online the Nash equilibrium",
        check_ipo,
    ),
    "ipo_per_token": _target(
        "scalar root",
        "mu exp(|y| ((mean_j p_ij - 1/2)/beta + c)) with the c at which it sums to 1",
        "ipo_per_token",
        Case(
            "mu exp(|y|((p - 1/2)/beta + c))",
            {"beta": 0.5},
            lambda w: per_token(borda(w.labels, 0.5), w.length, w.log_mu),
        ),
    ),
    "slic": Target("solver", "linear programme on soft labels; a region of zero loss on certain ones", check_slic),
    "slic_hf": _target(
        "solver",
        "convex programme in the log-probs",
        "slic_hf",
        Case(
            "soft labels (convex programme)",
            {"delta": 1.0, "sft_weight": 0.1},
            lambda w: slic_optimum(w, 1.0, 0.1, reference=False),
            kinked=True,
        ),
    ),
    "simpo": _target(
        "scalar root",
        "gamma 0: exp(|y| (r/beta + c)) with the c at which it sums to 1; else a convex problem first",
        "simpo",
        Case(
            "gamma 0: exp(|y|(r/beta + c))",
            {"beta": 2.0, "gamma": 0.0},
            lambda w: per_token(w.reward / 2.0, w.length, torch.zeros_like(w.reward)),
        ),
        Case(
            "gamma 1 (Newton, root)",
            {"beta": 2.0, "gamma": 1.0},
            lambda w: per_token(logistic_optimum(w, w.labels, 1.0) / 2.0, w.length, torch.zeros_like(w.reward)),
        ),
    ),
    "cpo": _target(
        "solver",
        "without its SFT term softmax(r/beta); with it a convex programme in the log-probs",
        "cpo",
        Case("sft_weight 0: softmax(r/beta)", {"beta": 0.5, "sft_weight": 0.0}, lambda w: normalised(w.reward / 0.5)),
        Case(
            "sft_weight 1 (convex programme)",
            {"beta": 0.5, "sft_weight": 1.0},
            lambda w: cpo_optimum(w, 0.5, 1.0),
        ),
    ),
    "orpo": _target(
        "solver",
        "without its SFT term sigma(r + c)^|y| with the c at which it sums to 1; with it a stationary point, Newton's",
        "orpo",
        Case("sft_weight 0: sigma(r + c)^|y|", {"sft_weight": 0.0}, lambda w: odds(w.reward, w.length)),
        Case(
            "sft_weight 1 (Newton)",
            {"odds_weight": 0.5, "sft_weight": 1.0},
            lambda w: orpo_optimum(w, 0.5, 1.0),
        ),
    ),
    "dpop": _target(
        "solver",
        "convex programme in the log-ratios",
        "dpop",
        Case(
            "penalty 0.1 (convex programme)",
            {"beta": 0.5, "penalty": 0.1},
            lambda w: dpop_optimum(w, 0.5, 0.1),
            kinked=True,
        ),
        Case(
            "penalty 50 (convex programme)",
            {"beta": 0.5, "penalty": 50.0},
            lambda w: dpop_optimum(w, 0.5, 50.0),
            kinked=True,
            steep=True,
        ),
    ),
    "r_dpo": _target(
        "closed form",
        "mu exp((r + alpha |y|)/beta)/Z",
        "r_dpo",
        Case(
            "mu exp((r + alpha|y|)/beta)/Z",
            {"beta": 0.5, "alpha": -0.3},
            lambda w: normalised(w.log_mu + (w.reward - 0.3 * w.length) / 0.5),
        ),
    ),
    "sft": _target(
        "closed form",
        "q/|y| / sum, q the share of an answer among the chosen",
        "sft",
        Case("q/|y| / sum", {}, sft_optimum),
    ),
    "plackett_luce": Target("closed form", "mu exp(r/beta)/Z on Plackett-Luce rankings", check_plackett_luce),
}
