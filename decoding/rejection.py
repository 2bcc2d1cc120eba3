"""Rejection sampling of one token, without a weight: the law of token masking at the price of a few questions."""

from __future__ import annotations

import math

from .lazy import Accepts, Draw, Row, Source, ask, live_of


def sample(logq: Row, accepts: Accepts, draws: Source, *, max_draws: int | None = None) -> Draw:
    """Draw without replacement until a token is allowed: that token follows ``q(. | allowed)``.

    The weight is 1 and proper in name only: nothing is known of Z, and sequences of such tokens are distorted as those
    of token masking are.

    Args:
        logq: the base law, (V,).
        accepts: asked at most once about a token.
        draws: the row's randomness.
        max_draws: questions after which the row counts as a dead end, 1 or more.

    Raises:
        ValueError: logq is no row of log-probabilities, max_draws is under 1, or a verdict is not a Boolean.
    """
    if max_draws is not None and max_draws < 1:
        raise ValueError(f"max_draws is {max_draws}: it must be 1 or more")
    live, evaluations = live_of(logq), 0
    while live.mass and evaluations != max_draws:
        token = live.draw(draws.uniform())
        evaluations += 1
        if ask(accepts, token):
            return Draw(token, 0.0, evaluations)
        live.remove(token)
    return Draw(None, -math.inf, evaluations)
