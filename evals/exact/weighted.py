"""Weighted rejection samplers that are not shipped: the published forms, to compare with.

Both are unbiased; what AWRS ships has the smaller variance, or asks less.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from align.decoding.lazy import Accepts, Draw, Live, Source, ask


def two_loops(logq: NDArray[np.float64], accepts: Accepts, draws: Source) -> Draw:
    """AWRS as published (arXiv:2504.05410): ``w = (1 - rho) / (n + 1)``.

    The first loop draws without replacement until a token is allowed, rho being the mass that it rejects; the second
    begins anew among the tokens that are left, the allowed one included. n counts the rejects of both. A budget would
    make it biased, so there is none.
    """
    live, rejects, evaluations = Live(logq), 0, 0
    first: int | None = None
    left = 0.0
    while live.mass:
        token = live.draw(draws.uniform())
        evaluations += token != first
        if token == first or ask(accepts, token):
            if first is not None:
                return Draw(first, math.log(left) - math.log(rejects + 1), evaluations)
            first, left = token, live.mass
        else:
            live.remove(token)
            rejects += 1
    return Draw(None, -math.inf, evaluations)


def with_replacement(logq: NDArray[np.float64], accepts: Accepts, draws: Source, *, wanted: int = 2) -> Draw:
    """Draws with replacement until ``wanted`` accepts, 2 or more: ``w = (wanted - 1) / (draws - 1)``.

    Every draw asks. It does not end where nothing is allowed.
    """
    live, drawn, accepted = Live(logq), 0, list[int]()
    while len(accepted) < wanted:
        token = live.draw(draws.uniform())
        drawn += 1
        if ask(accepts, token):
            accepted.append(token)
    return Draw(accepted[0], math.log(wanted - 1) - math.log(drawn - 1), drawn)


def negative_binomial(mass: float, wanted: int, most: int = 2000) -> tuple[float, float, float]:
    """Mean and variance of the weight of ``with_replacement``, and the mean number of draws, summed over the draws."""
    count = np.arange(wanted, most)
    log_choose = [math.lgamma(n) - math.lgamma(wanted) - math.lgamma(n - wanted + 1) for n in count]
    probability = np.exp(np.array(log_choose) + wanted * math.log(mass) + (count - wanted) * math.log1p(-mass))
    weight = (wanted - 1) / (count - 1)
    mean = float(probability @ weight)
    return mean, float(probability @ (weight - mean) ** 2), float(probability @ count)
