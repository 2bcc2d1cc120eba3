"""From worlds to tensors: weighted model counting in log space.

``WMC(S)``, the probability of a set of worlds, is a sum over worlds of products of ``P`` (atom true) and ``1 - P``
(false), the atoms being independent. It is not summed world by world: it is expanded atom by atom (as a decision
diagram), where an atom on which nothing depends drops out exactly, and literals that all worlds share are single
summands of the logarithm. So ``log W/L`` is computed as ``log W - log L``, whatever the number of worlds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from align.losses.complement import log_not

from .structure import Structure, factorise, full

LogProb = Callable[[int, bool], Tensor]


def log_count(worlds: int, n: int, logp: LogProb) -> Tensor | None:
    """``log WMC`` of a set of worlds of n atoms that is not empty, nats; None where it is 0 (all worlds)."""
    known: dict[tuple[int, int], Tensor | None] = {}

    def count(worlds: int, n: int) -> Tensor | None:
        if worlds == full(n):
            return None
        if (worlds, n) not in known:
            j = n - 1
            true, false = worlds >> (1 << j), worlds & full(j)
            if true == false:
                known[worlds, n] = count(true, j)
            else:
                sides = [_plus(logp(j, sign), count(part, j)) for sign, part in ((True, true), (False, false)) if part]
                known[worlds, n] = sides[0] if len(sides) == 1 else torch.logaddexp(sides[0], sides[1])
        return known[worlds, n]

    return count(worlds, n)


def log_odds(structure: Structure, logp: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """``rho = log WMC(top) / WMC(bottom)`` and the two parts of which it is the difference, nats, (B,) each.

    Args:
        structure: worlds over n atoms.
        logp: log-probability of each atom, (B,), in the order of the atoms.

    Returns:
        ``rho``, ``plus`` and ``minus`` with ``rho = plus - minus``. Where the loss is a sum of what it says of each
        answer (CPO, ORPO, DPO), ``plus`` is what it says of the first answer and ``minus`` the negative of the rest;
        elsewhere they are the logarithms of both counts, common factors cancelled.
    """
    n, factors = len(structure.atoms), factorise(structure)

    @cache
    def literal(j: int, true: bool) -> Tensor:
        return logp[j] if true else log_not(logp[j])

    zero = torch.zeros_like(logp[0])
    if factors.top == factors.bottom:
        answers: dict[int, Tensor] = {}
        for (j, true), exponent in sorted(factors.literals.items()):
            position = structure.atoms[j].position
            # The reference's atom meets the policy's of the same answer first: two near numbers, exactly subtracted.
            answers[position] = answers.get(position, zero) + exponent * literal(j, true)
        plus = answers.pop(0, zero)
        minus = -sum(answers.values(), zero)
    else:
        sides = []
        for exponent, worlds in ((1, factors.top), (-1, factors.bottom)):
            shared = sum((literal(*key) for key, value in sorted(factors.literals.items()) if value == exponent), zero)
            sides.append(_plus(shared, log_count(worlds, n, literal)))
        plus, minus = sides
    return plus - minus, plus, minus


def directions(structure: Structure) -> list[int | None]:
    """How rho moves as each atom's probability grows, on a grid of probabilities: 1, -1, 0, or None for both ways.

    The grid has 7 values an atom up to 4 atoms; with more, 4,096 points are drawn from it (seed 0).
    """
    n = len(structure.atoms)
    values = torch.tensor([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99], dtype=torch.float64)
    if n <= 4:
        points = torch.cartesian_prod(*[values] * n).reshape(-1, n)
    else:
        points = values[torch.randint(7, (4096, n), generator=torch.Generator().manual_seed(0))]
    with torch.enable_grad():
        logp = [column.log().requires_grad_() for column in points.T]
        rho = log_odds(structure, logp)[0]
        gradients = torch.autograd.grad(rho.sum(), logp, allow_unused=True, materialize_grads=True)
    found: list[int | None] = []
    for gradient in gradients:
        up, down = bool((gradient > 1e-9).any()), bool((gradient < -1e-9).any())
        found.append(None if up and down else int(up) - int(down))
    return found


def _plus(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b
