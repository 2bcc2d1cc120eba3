"""Weighted sums of losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .catalogue import Loss
from .types import LossOutput, PairLogps


def combine(losses: Sequence[Loss], policy: PairLogps, reference: PairLogps | None) -> LossOutput:
    """``sum_i weight_i * loss_i``, unreduced, (B,).

    The rewards are ``sum_i weight_i * rewards_i``, so that each term counts in the margin as it counts in the loss.
    With more than one term, ``metrics`` holds each term's own loss as ``loss/NAME``, unweighted.

    Raises:
        ValueError: no loss is given, or one of them needs a reference and there is none.
    """
    if not losses:
        raise ValueError("a combination has at least one loss")
    outputs = [loss(policy, reference) for loss in losses]
    if len(outputs) == 1 and losses[0].weight == 1.0:
        return outputs[0]
    metrics: dict[str, torch.Tensor] = {}
    for loss, output in zip(losses, outputs, strict=True):
        metrics.update(output.metrics)
        metrics[f"loss/{loss.info.name}"] = output.loss.detach()
    weights = [loss.weight for loss in losses]
    return LossOutput(
        loss=torch.stack([w * o.loss for w, o in zip(weights, outputs, strict=True)]).sum(0),
        rewards=torch.stack([w * o.rewards for w, o in zip(weights, outputs, strict=True)]).sum(0),
        metrics=metrics,
    )
