"""Preference suite: does the implicit reward rank the chosen answer above the rejected one?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .result import suite_result
from .statistics import bootstrap_interval, finite_vector


def preference_suite(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    row_ids: Sequence[str],
    *,
    groups: Sequence[Hashable] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Accuracy, margin and ties of N held-out pairs.

    An exact tie counts as half in the accuracy, and the share of ties stands beside it: an untrained policy equals its
    reference, so that all its rewards are zero and its accuracy is one half, all of it ties.

    Args:
        chosen_rewards, rejected_rewards: implicit rewards in the loss's own units, shape (N,).
        row_ids: one per pair, kept in the rows.
        groups: the prompt of each pair, where a prompt has several: they are resampled together.
        settings: what made the rewards, kept in the result.

    Returns:
        Metrics ``accuracy``, ``margin`` (chosen - rejected, mean), ``ties`` (share of pairs);
        rows ``{row_id, chosen_reward, rejected_reward}``.

    Raises:
        ValueError: counts that differ, no pairs, or a reward that is not finite.
    """
    chosen = finite_vector(chosen_rewards.detach().double().cpu().numpy(), "chosen_rewards")
    rejected = finite_vector(rejected_rewards.detach().double().cpu().numpy(), "rejected_rewards")
    if not len(chosen) == len(rejected) == len(row_ids):
        raise ValueError(f"{len(chosen)} chosen rewards, {len(rejected)} rejected rewards, {len(row_ids)} row ids")
    ties = chosen == rejected
    metrics = {
        "accuracy": bootstrap_interval((chosen > rejected) + 0.5 * ties, groups=groups),
        "margin": bootstrap_interval(chosen - rejected, groups=groups),
        "ties": bootstrap_interval(ties, groups=groups),
    }
    rows = [
        {"row_id": row_id, "chosen_reward": float(won), "rejected_reward": float(lost)}
        for row_id, won, lost in zip(row_ids, chosen, rejected, strict=True)
    ]
    return suite_result("preference", metrics, rows, settings)
