"""Soft labels: a loss where it is a probability, not a fact, which of two answers is preferred."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .checks import check_probability, check_shape


def probability(preference: Tensor, like: Tensor) -> Tensor:
    """The soft labels, checked, in the dtype of ``like``, (B,)."""
    check_shape("preference", preference, like.shape, "one probability a pair")
    check_probability("preference", preference)
    return preference.detach().to(like.dtype)


def expected(loss: Tensor, exchanged: Tensor, preference: Tensor | None) -> Tensor:
    """``p loss + (1 - p) exchanged``, where ``exchanged`` is the loss with the answers the other way round."""
    if preference is None:
        return loss
    p = probability(preference, loss)
    return p * loss + (1 - p) * exchanged


def logistic(margin: Tensor, right: Tensor | None) -> Tensor:
    """``-q log sigmoid(margin) - (1 - q) log sigmoid(-margin)``; None: q is 1."""
    if right is None:
        return -F.logsigmoid(margin)
    return -right * F.logsigmoid(margin) - (1 - right) * F.logsigmoid(-margin)
