"""What losses from formulas ask for: the known ones equal their hand-written forms, others are trained to an optimum.

``W`` and ``L`` are the answers' probabilities per token, ``exp(S / |y|)``, unless ``norm`` is ``sum``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from align.losses.catalogue import Loss, find_loss
from align.losses.types import PairLogps, SequenceLogps

from .descent import train_pairs
from .pair_optima import constrained_optimum
from .pair_targets import Case, check_cases
from .rows import Row, Stack, Target
from .solvers import normalised
from .worlds import World, make_world

IMPLIES = "implies(M(l), M(w))"
DPO = {
    "logic": "implies(and(Ref(w), M(l)), and(Ref(l), M(w)))",
    "where": "or(and(Ref(w), M(l)), and(Ref(l), M(w)))",
    "also": "and(and(Ref(w), M(l)), and(Ref(l), M(w)))",
    "norm": "sum",
}
CPO = {"logic": IMPLIES, "where": "or(M(l), M(w))", "also": "and(M(l), M(w))", "norm": "sum"}
SAME: dict[str, tuple[dict[str, str], dict[str, Any], float]] = {
    "cpo": (CPO, {"beta": 0.5, "sft_weight": 0.0}, 0.5),
    "orpo": ({"logic": IMPLIES, "where": "xor(M(l), M(w))"}, {"odds_weight": 1.0, "sft_weight": 0.0}, 1.0),
    "dpo": (DPO, {"beta": 0.5}, 0.5),
}


def _log_not(log_probability: Tensor) -> Tensor:
    return torch.log(-torch.expm1(log_probability))


def unlikelihood(w: Tensor, l_: Tensor) -> Tensor:
    """Rho of CEUnl: ``log W(1 - L) / (1 - W(1 - L))``."""
    both = w + _log_not(l_)
    return both - _log_not(both)


def constrained_implication(w: Tensor, l_: Tensor) -> Tensor:
    """Rho of cCPO: ``log W / (L(1 - W))``."""
    return w - l_ - _log_not(w)


def optimum(rho: Callable[[Tensor, Tensor], Tensor]) -> Callable[[World], Tensor]:
    """The policy (P, N) at which the expectation of ``-log sigma(rho)`` is stationary."""

    def solve(world: World) -> Tensor:
        n = world.length
        return constrained_optimum(world, lambda s, i, j: F.softplus(-rho(s[i] / n[i], s[j] / n[j])))

    return solve


def check_logic(stack: Stack) -> Iterator[Row]:
    """Equalities, optima, and a formula that has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a formula's user is told that it is not monotone; here that is the point
        rows = [*_equal(stack), *_optima(stack), _none(stack)]
    yield from rows


def _equal(stack: Stack) -> Iterator[Row]:
    draw = torch.Generator().manual_seed(stack.seed + 3)

    def side() -> Tensor:
        return stack.here(-0.05 - 20 * torch.rand(64, generator=draw, dtype=torch.float64))

    lengths = [stack.here(torch.randint(1, 9, (64,), generator=draw)) for _ in range(2)]
    policy, reference = (PairLogps(*(SequenceLogps(side(), length) for length in lengths)) for _ in range(2))
    for name, (formula, settings, beta) in SAME.items():
        ours = Loss(find_loss("logic"), {"beta": beta, **formula})(policy, reference).loss
        hand = Loss.of(name, **settings)(policy, reference).loss
        gap = float((ours - hand).abs().max())
        yield Row.number("logic", f"{name} as a formula, less {name}", 0.0, gap, stack.tolerance(1e-12, 1e-4))


def _optima(stack: Stack) -> Iterator[Row]:
    def dpo_optimum(world: World) -> Tensor:
        return normalised(world.log_mu + world.reward / 0.5)

    ccpo = {"logic": IMPLIES, "where": "or(M(l), M(w))"}
    cases = [
        Case("dpo's formula: mu exp(r/beta)/Z", {**DPO, "beta": 0.5}, dpo_optimum),
        Case("CEUnl (constrained Newton)", {"logic": "and(M(w), not(M(l)))"}, optimum(unlikelihood)),
        Case("cCPO (constrained Newton)", ccpo, optimum(constrained_implication)),
    ]
    return check_cases("logic", cases, stack)


def _none(stack: Stack) -> Row:
    world = make_world(seed=stack.seed, steps=2)
    ends = train_pairs(Loss.of("logic", logic=IMPLIES), world, stack, rounds=1)
    least = max(float(policy.double().cpu().min(-1).values.max()) for policy in ends)
    return Row.at_most("logic", "unCPO: none; least probability", 1e-6, least)


LOGIC: dict[str, Target] = {
    "logic": Target(
        "solver",
        "as the formula says; unCPO has none: in the world where both answers are rejected it is content",
        check_logic,
    ),
}
