"""``log(1 - P)`` of a probability that is known by its logarithm."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_not(logp: Tensor) -> Tensor:
    """``log(1 - P)`` from ``log P``, nats: ``log(-expm1(x))`` above ``-log 2`` and ``log1p(-exp(x))`` below.

    ``log P`` is clamped to at most -1e-7 in float32 and -1e-15 in float64, because at P = 1 the logarithm is
    infinite. The clamp is straight-through: its own derivative counts as 1, so that a model which is sure of an answer
    still gets the (large) gradient ``-P/(1-P)`` at the clamp.
    """
    limit = -1e-15 if logp.dtype == torch.float64 else -1e-7
    logp = logp.detach().clamp(max=limit) + (logp - logp.detach())
    near = logp > -math.log(2)
    # Each branch sees only what it is good for: the other's infinite derivative would become NaN times 0.
    close = torch.log(-torch.expm1(torch.where(near, logp, -1.0)))
    return torch.where(near, close, torch.log1p(-torch.exp(torch.where(near, -1.0, logp))))
