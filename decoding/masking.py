"""Token masking, the locally constrained baseline: the conditional law of one token, and its exact mass."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .lazy import Accepts, Draw, Row, Source, ask, live_of


def sample(
    logq: Row,
    accepts: Accepts,
    draws: Source,
    *,
    allowed: NDArray[np.bool_] | None = None,
) -> Draw:
    """Draw from ``q(. | allowed)``; the weight is the mass Z of the allowed tokens, exactly.

    Sequences made of such tokens with their weights left out are distorted: a prefix that few allowed texts continue
    is as likely as if all did. With the weights they are a proper, if costly, sample.

    Args:
        logq: the base law, (V,).
        accepts: asked about every token that the base law can draw, unless ``allowed`` is given.
        draws: the row's randomness.
        allowed: the verdicts, (V,), where a constraint knows them all.

    Raises:
        ValueError: logq is no row of log-probabilities, ``allowed`` has another shape, or a verdict is no Boolean.
    """
    live = live_of(logq)
    evaluations, masks = 0, int(allowed is not None)
    if allowed is None:
        asked = live.left
        evaluations = len(asked)
        allowed = np.zeros(live.size, dtype=bool)
        allowed[asked] = [ask(accepts, int(token)) for token in asked]
    live = live.only(allowed)
    if not live.mass:
        return Draw(None, -math.inf, evaluations, masks)
    return Draw(live.draw(draws.uniform()), math.log(live.mass), evaluations, masks)
