"""Weighted sums of losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .catalogue import Loss
from .types import LossOutput, PairLogps


def combine(
    losses: Sequence[Loss], policy: PairLogps, reference: PairLogps | None, preference: Tensor | None = None
) -> LossOutput:
    """``sum_i weight_i * loss_i``, unreduced, (B,).

    The rewards are ``sum_i weight_i * rewards_i`` over the terms that rank answers, so that each counts in the margin
    as it counts in the loss; a likelihood term (``sft``) would mix the base model's likelihoods into the margin. When
    no term ranks, the sum is over all. With more than one term, ``metrics`` holds each term's own loss as
    ``loss/NAME``, unweighted; a second term of that name is ``loss/NAME_2``. ``preference`` (B,) is the probability
    that the chosen answer is preferred; None: it is.

    Raises:
        ValueError: no loss is given, one of them needs a reference and there is none, or takes no preference
            probabilities and some are given.
    """
    if not losses:
        raise ValueError("a combination has at least one loss")
    terms = [(loss, loss(policy, reference, preference)) for loss in losses]
    if len(terms) == 1 and losses[0].weight == 1.0:
        return terms[0][1]
    metrics: dict[str, torch.Tensor] = {}
    seen: Counter[str] = Counter()
    for loss, output in terms:
        name = loss.info.name
        seen[name] += 1
        metrics.update(output.metrics)
        metrics[f"loss/{name}" if seen[name] == 1 else f"loss/{name}_{seen[name]}"] = output.loss.detach()
    ranking = [(loss, output) for loss, output in terms if loss.info.ranks] or terms
    return LossOutput(
        loss=torch.stack([loss.weight * output.loss for loss, output in terms]).sum(0),
        rewards=torch.stack([loss.weight * output.rewards for loss, output in ranking]).sum(0),
        metrics=metrics,
    )
