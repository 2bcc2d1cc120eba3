"""Token masking, the locally constrained baseline: the conditional law of one token, and its exact mass."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .lazy import Accepts, Draw, Live, Source, ask


def sample(
    logq: NDArray[np.float64],
    accepts: Accepts,
    draws: Source,
    *,
    allowed: NDArray[np.bool_] | None = None,
) -> Draw:
    """Draw from ``q(. | allowed)``; the weight is the mass Z of the allowed tokens, exactly.

    Sequences made of such tokens with their weights left out are distorted: a prefix that few allowed texts continue
    is as likely as if all did. With the weights they are a proper, if costly, sample.

    Args:
        logq: log-probabilities of the base law, (V,), float64.
        accepts: asked about every token that the base law can draw, unless ``allowed`` is given.
        draws: the row's randomness.
        allowed: the verdicts, (V,), where a constraint knows them all.

    Raises:
        ValueError: logq is no row of log-probabilities, ``allowed`` has another shape, or a verdict is no Boolean.
    """
    evaluations, masks = 0, int(allowed is not None)
    if allowed is None:
        asked = np.flatnonzero(logq > -math.inf)
        evaluations = len(asked)
        allowed = np.zeros(logq.shape, dtype=bool)
        allowed[asked] = [ask(accepts, int(token)) for token in asked]
    elif allowed.shape != logq.shape:
        raise ValueError(f"allowed has shape {allowed.shape} and must have {logq.shape}: a verdict for each token")
    live = Live(np.where(allowed, logq, -math.inf))
    if not live.mass:
        return Draw(None, -math.inf, evaluations, masks)
    return Draw(live.draw(draws.uniform()), math.log(live.mass), evaluations, masks)
