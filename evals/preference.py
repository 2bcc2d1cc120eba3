"""Preference suite: does the implicit reward rank the chosen answer above the rejected one?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .result import suite_result
from .statistics import Estimate, bootstrap_interval, finite_vector, share_interval


def preference_suite(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    row_ids: Sequence[str],
    *,
    preference: Sequence[float | None] | None = None,
    groups: Sequence[Hashable] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Accuracy, margin and ties of N held-out pairs.

    An exact tie counts as half in the accuracy, and the share of ties stands beside it: an untrained policy equals its
    reference, so that all its rewards are zero and its accuracy is one half, all of it ties.

    Args:
        chosen_rewards, rejected_rewards: implicit rewards in the loss's own units, shape (N,).
        row_ids: one per pair, kept in the rows.
        preference: probability that the chosen answer is preferred, of each pair; None: it is. Under 0.5 the rejected
            answer is the one to rank first; a pair at 0.5 can be neither right nor wrong, and is left out there.
        groups: the prompt of each pair, where a prompt has several: they are resampled together.
        settings: what made the rewards, kept in the result.

    Returns:
        Metrics ``accuracy``, ``margin`` (the preferred answer's reward less the other's, mean), ``ties`` (share of
        pairs with equal rewards) and, where the labels are soft, ``label_ties`` (share of pairs at 0.5); rows
        ``{row_id, chosen_reward, rejected_reward}``, with soft labels ``preference`` too.

    Raises:
        ValueError: counts that differ, no pairs, no pair with a preferred answer, or a reward that is not finite.
    """
    chosen = finite_vector(chosen_rewards.detach().double().cpu().numpy(), "chosen_rewards")
    rejected = finite_vector(rejected_rewards.detach().double().cpu().numpy(), "rejected_rewards")
    if not len(chosen) == len(rejected) == len(row_ids):
        raise ValueError(f"{len(chosen)} chosen rewards, {len(rejected)} rejected rewards, {len(row_ids)} row ids")
    label, decided = preferred(preference, len(row_ids))
    names: Sequence[Hashable] = range(len(label)) if groups is None else groups
    metrics = ranking_metrics(chosen - rejected, label, names)
    rows: list[dict[str, Any]] = [
        {"row_id": row_id, "chosen_reward": float(won), "rejected_reward": float(lost)}
        for row_id, won, lost in zip(row_ids, chosen, rejected, strict=True)
    ]
    if preference is not None and any(p is not None for p in preference):
        metrics["label_ties"] = share_interval(~decided, groups=names)
        for row, p in zip(rows, label, strict=True):
            row["preference"] = float(p)
    return suite_result("preference", metrics, rows, settings, groups=groups)


def ranking_metrics(
    score: NDArray[np.float64], label: NDArray[np.float64], groups: Sequence[Hashable]
) -> dict[str, Estimate]:
    """``accuracy`` and ``margin`` over the pairs whose label prefers an answer, and ``ties`` of the score over all."""
    decided = label != 0.5
    kept = [name for name, one in zip(groups, decided, strict=True) if one]
    margin = np.where(label > 0.5, score, -score)[decided]
    return {
        "accuracy": share_interval((margin > 0) + 0.5 * (margin == 0), groups=kept),
        "margin": bootstrap_interval(margin, groups=kept),
        "ties": share_interval(score == 0, groups=groups),
    }


def preferred(preference: Sequence[float | None] | None, count: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Labels of pairs, 1 where none is given, and which of them prefer an answer.

    Raises:
        ValueError: another count, a label outside [0, 1], or ties alone.
    """
    given = [1.0] * count if preference is None else [1.0 if p is None else float(p) for p in preference]
    if len(given) != count:
        raise ValueError(f"{count} row ids, {len(given)} preferences")
    label = finite_vector(np.array(given), "preference")
    outside = (label < 0) | (label > 1)
    if outside.any():
        raise ValueError(f"preference[{int(np.argmax(outside))}] is outside [0, 1]")
    decided = label != 0.5
    if not decided.any():
        raise ValueError(f"all {count} pairs are ties of the label: there is nothing to be right about")
    return label, decided


def compared_preferences(
    scores: Tensor,
    row_ids: Sequence[str],
    *,
    rewards: Tensor | None = None,
    preference: Sequence[float | None] | None = None,
    groups: Sequence[Hashable] | None = None,
    subsets: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``preference_suite`` of any kind of reward, and per subset.

    Args:
        scores: by how much the chosen answer of each pair is better, (N,).
        row_ids: one per pair, kept in the rows.
        rewards: of the chosen and of the rejected answers, (N, 2), where each has one; kept in the rows.
        preference, groups: as in ``preference_suite``.
        subsets: of each pair.
        settings: what made the scores, kept in the result.

    Returns:
        Metrics ``accuracy``, ``margin``, ``ties``, and of each subset with a pair whose label prefers an answer
        ``accuracy/SUBSET`` and ``ties/SUBSET``; rows ``{row_id, score, right}``, with ``chosen_reward``,
        ``rejected_reward``, ``preference`` and ``subset`` where there are any; ``right`` is 1, 1/2 (a tie) or 0, and
        null where the label is a tie.

    Raises:
        ValueError: as ``preference_suite``.
    """
    score = finite_vector(scores.detach().double().cpu().numpy(), "scores")
    if len(score) != len(row_ids):
        raise ValueError(f"{len(score)} scores, {len(row_ids)} row ids")
    label, decided = preferred(preference, len(row_ids))
    names: Sequence[Hashable] = range(len(label)) if groups is None else groups
    metrics = ranking_metrics(score, label, names)
    for subset in sorted(set(subsets or ())):
        own = np.array([one == subset for one in subsets or ()])
        if (own & decided).any():
            found = ranking_metrics(score[own], label[own], [names[row] for row in np.flatnonzero(own)])
            metrics |= {f"{metric}/{subset}": found[metric] for metric in ("accuracy", "ties")}
    right = right_of(score, label)
    rows: list[dict[str, Any]] = [
        {"row_id": row_id, "score": float(s), "right": float(r) if known else None}
        for row_id, s, r, known in zip(row_ids, score, right, decided, strict=True)
    ]
    for number, row in enumerate(rows):
        if rewards is not None:
            row["chosen_reward"], row["rejected_reward"] = (float(value) for value in rewards[number])
        if preference is not None and preference[number] is not None:
            row["preference"] = float(label[number])
        if subsets is not None:
            row["subset"] = subsets[number]
    return suite_result("preference", metrics, rows, settings, groups=groups)


def right_of(score: NDArray[np.float64], label: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where the score prefers the answer that the label does, 1/2 where score or label prefer none, else 0."""
    found: NDArray[np.float64] = 0.5 + np.sign(score) * np.sign(label - 0.5) / 2
    return found
