"""Adaptive weighted rejection sampling (arXiv:2504.05410): the next token under a constraint, properly weighted.

Tokens are drawn and asked about until one is allowed; that one follows the conditional law ``q(. | allowed)``. The
weight is an unbiased estimate of the mass Z of the allowed tokens, from a few more questions. Then
``E[w 1{token = t}] = q(t) 1{t allowed}``, and products of such weights along a sequence correct what local masking
distorts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import masking
from .lazy import Accepts, Draw, Live, Row, Source, ask, live_of

PATIENCE = 16
"""Refusals after which a mask is asked for: about the questions that one costs."""

Mask = Callable[[], NDArray[np.bool_] | None]
"""The verdicts on all tokens, (V,), from a constraint that knows them at once; None if it does not here."""


def sample(
    logq: Row,
    accepts: Accepts,
    draws: Source,
    *,
    max_draws: int | None = None,
    estimator: Literal["recursive", "geometric"] = "recursive",
    mask: Mask | None = None,
    patience: int = PATIENCE,
) -> Draw:
    """Draw a token under a constraint, with a proper weight.

    Args:
        logq: the base law, (V,).
        accepts: asked at most once about a token.
        draws: the row's randomness.
        max_draws: budget, 1 or more. The recursive estimator counts what it asks, the geometric one also the draws
            that it reconstructs. Where the budget ends without an allowed token, the weight is zero; the mean of the
            weight stays exact, its variance grows.
        estimator: ``recursive`` asks about one token more than it needs; ``geometric`` reconstructs a run with
            replacement and its two accepts. On peaked laws, the rule in language, the variance of the first times its
            questions is mostly a tenth to three quarters of the second's; the second is the better one where few of
            very many tokens about as likely are allowed.
        mask: asked for after ``patience`` refusals, instead of further questions. For the recursive estimator alone.
        patience: see ``mask``.

    Raises:
        ValueError: logq is no row of log-probabilities, max_draws is under 1, the estimator is unknown or is
            the geometric one with a mask, or a verdict is not a Boolean. What ``accepts`` raises goes through.
    """
    if max_draws is not None and max_draws < 1:
        raise ValueError(f"max_draws is {max_draws}: it must be 1 or more")
    if estimator not in ("recursive", "geometric"):
        raise ValueError(f"estimator is {estimator!r}: it must be 'recursive' or 'geometric'")
    if estimator == "geometric":
        if mask is not None:
            raise ValueError("mask: the geometric estimator cannot end with one, its weight would be biased")
        return _geometric(live_of(logq), accepts, draws, max_draws or math.inf)
    return _recursive(live_of(logq), accepts, draws, max_draws or math.inf, mask, patience)


def _recursive(live: Live, accepts: Accepts, draws: Source, budget: float, mask: Mask | None, patience: int) -> Draw:
    """Without replacement, from ``E f = P(x) f(x) + (1 - P(x)) E[f | not x]``.

    With M the mass that is left before the first allowed token x is drawn: ``w = M`` if the token drawn after x is
    allowed too, else ``w = q(x)``; and ``w = M`` where x is the last token, or the last that the budget permits.

    After any refusals the rest is a proper sample of the q that is left, normalised and multiplied by M: given them,
    ``E[w 1{token = t}] = M (q(t) / M) = q(t)``. A token from ``q(. | allowed)`` with ``w = Z`` has the same mean,
    ``Z q(t) / Z``, so a mask may take over after any refusal. (The geometric estimator's mean is under Z after a
    refusal and over it after an accept, so there it may not.)
    """
    for evaluations in count(1):
        if not live.mass:
            return Draw(None, -math.inf, evaluations - 1)
        mass, token = live.mass, live.draw(draws.uniform())
        allowed, p = ask(accepts, token), live.remove(token)
        last = evaluations == budget
        if allowed and (last or not live.mass):
            return Draw(token, math.log(mass), evaluations)
        if allowed:
            second = ask(accepts, live.draw(draws.uniform()))
            return Draw(token, math.log(mass if second else p), evaluations + 1)
        if last:
            return Draw(None, -math.inf, evaluations)
        verdicts = mask() if mask is not None and evaluations == patience else None
        if verdicts is not None:
            return replace(masking.sample(live, accepts, draws, allowed=verdicts), evaluations=evaluations)
    raise AssertionError("count() never ends")


def _geometric(live: Live, accepts: Accepts, draws: Source, budget: float) -> Draw:
    """With replacement until two accepts: ``w = 1 / (n + 1)`` with n rejects, times the whole mass.

    Draws of tokens that were refused already are not made but counted, by geometric variables. Where the budget of D
    draws ends after one accept, ``w = 1 / D``: in both cases the share of the runs to the same end that begin with an
    accept, which is unbiased.
    """
    whole, rejects, evaluations = live.mass, 0, 0
    first: int | None = None
    while live.mass:
        if rejects:
            rejects += draws.failures(live.mass / whole)
        if rejects + (first is not None) >= budget:
            break
        token = live.draw(draws.uniform())
        if token != first:
            evaluations += 1
            if not ask(accepts, token):
                live.remove(token)
                rejects += 1
                continue
        if first is not None:
            return Draw(first, math.log(whole) - math.log(rejects + 1), evaluations)
        first = token
    if first is None:
        return Draw(None, -math.inf, evaluations)
    return Draw(first, math.log(whole) - math.log(budget), evaluations)
