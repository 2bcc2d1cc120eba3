"""Reward suite: does a reward model rank held-out answers as people did, and does it rate them as they did?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .preference import preferred, ranking_metrics
from .result import suite_result
from .statistics import Estimate, bootstrap_interval, finite_vector, share_interval


def reward_suite(
    scores: Tensor,
    row_ids: Sequence[str],
    *,
    preference: Sequence[float | None] | None = None,
    rewards: Tensor | None = None,
    groups: Sequence[Hashable] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Accuracy, margin, ties and log loss of N held-out pairs.

    A pair whose score is exactly 0 counts as half in the accuracy. A pair whose label is a tie (preference 0.5) can be
    neither right nor wrong: it is left out there, and counts in the log loss; where the preference is below 0.5, the
    rejected answer is the preferred one.

    Args:
        scores: log-odds that the chosen answer is preferred, (N,): the model states the probability
            ``sigma(score)``.
        row_ids: one per pair, kept in the rows.
        preference: probability that the chosen answer is preferred, of each pair; None: it is.
        rewards: of the chosen and the rejected answers, (N, 2), where each has one; kept in the rows.
        groups: the prompt of each pair, where a prompt has several: they are resampled together.
        settings: what made the scores, kept in the result.

    Returns:
        Metrics ``accuracy``, ``ties`` (share of pairs with score 0), ``margin`` (mean score, the preferred answer's
        less the other's), ``log_loss`` (nats a pair; log 2 is chance) and ``label_ties`` (share of pairs), the first
        and third over pairs with a preferred answer; rows ``{row_id, score, preference}``.

    Raises:
        ValueError: counts that differ, no pair with a preferred answer, or a score that is not finite.
    """
    score = finite_vector(scores.detach().double().cpu().numpy(), "scores")
    if len(score) != len(row_ids):
        raise ValueError(f"{len(score)} scores, {len(row_ids)} row ids")
    label, decided = preferred(preference, len(row_ids))
    names: Sequence[Hashable] = range(len(score)) if groups is None else groups
    metrics = ranking_metrics(score, label, names) | {
        "log_loss": bootstrap_interval(
            label * np.logaddexp(0, -score) + (1 - label) * np.logaddexp(0, score), groups=names
        ),
        "label_ties": share_interval(~decided, groups=names),
    }
    rows = [
        {"row_id": row_id, "score": float(s), "preference": float(p)}
        for row_id, s, p in zip(row_ids, score, label, strict=True)
    ]
    if rewards is not None:
        for row, (chosen, rejected) in zip(rows, rewards.tolist(), strict=True):
            row |= {"chosen_reward": chosen, "rejected_reward": rejected}
    return suite_result("reward", metrics, rows, settings, groups=groups)


def ratings_suite(
    values: Tensor,
    ratings: Sequence[Sequence[float | None]],
    attributes: Sequence[str],
    ranking: Sequence[float],
    row_ids: Sequence[str],
    prompts: Sequence[Hashable],
    *,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """How well N answers are rated, and how well the ratings rank answers to the same prompt.

    Args:
        values: what the model says of each attribute, (N, A).
        ratings: what people said, None where nobody did.
        attributes: their names.
        ranking: the weight of each in what ranks answers, (A,).
        row_ids: one per answer, kept in the rows.
        prompts: of each answer; every two answers to one are a pair, unless their ranking value is equal or unknown.
            The answers to a prompt are resampled together.
        settings: what made the values, kept in the result.

    Returns:
        Metrics ``rmse_NAME`` (error), ``spread_NAME`` (the error of always saying the mean of these ratings) and,
        where there are pairs, ``accuracy`` and ``ties`` of the pairs; rows ``{row_id, value, rating}``.

    Raises:
        ValueError: counts that differ, an attribute that nobody rated, or a value that is not finite.
    """
    said = values.detach().double().cpu().numpy()
    people = np.array([[np.nan if rating is None else rating for rating in row] for row in ratings], dtype=float)
    if said.shape != people.shape or said.shape != (len(row_ids), len(attributes)) or len(prompts) != len(row_ids):
        raise ValueError(
            f"values {said.shape}, ratings {people.shape}, {len(row_ids)} row ids, {len(prompts)} prompts"
        )
    metrics: dict[str, Estimate] = {}
    for place, name in enumerate(attributes):
        rated = np.flatnonzero(~np.isnan(people[:, place]))
        if not len(rated):
            raise ValueError(f"{name}: nobody rated it in the held-out data")
        groups = [prompts[row] for row in rated]
        truth = people[rated, place]
        errors = finite_vector(said[rated, place], f"values of {name}") - truth
        metrics[f"rmse_{name}"] = _root(bootstrap_interval(errors**2, groups=groups))
        metrics[f"spread_{name}"] = _root(bootstrap_interval((truth - truth.mean()) ** 2, groups=groups))
    right, pair_prompts = _ranked(said, people, np.array(ranking), prompts)
    if len(right):
        metrics["accuracy"] = share_interval(right, groups=pair_prompts)
        metrics["ties"] = share_interval(right == 0.5, groups=pair_prompts)
    rows = [
        {"row_id": row_id, "value": value, "rating": list(rating)}
        for row_id, value, rating in zip(row_ids, said.tolist(), ratings, strict=True)
    ]
    return suite_result("reward", metrics, rows, {**(settings or {}), "pairs": len(right)})


def _root(square: Estimate) -> Estimate:
    """The root of a mean square with its interval: both ends move as the middle does."""
    low, high = (None if end is None else float(np.sqrt(end)) for end in (square.low, square.high))
    return Estimate(float(np.sqrt(square.value)), low, high, square.n)


def _ranked(
    said: NDArray[np.float64], people: NDArray[np.float64], ranking: NDArray[np.float64], prompts: Sequence[Hashable]
) -> tuple[NDArray[np.float64], list[Hashable]]:
    """For every pair of answers to a prompt that people ranked: 1 right, 0 wrong, 0.5 a tie; and its prompt."""
    used = ranking != 0
    model, truth = said[:, used] @ ranking[used], people[:, used] @ ranking[used]
    members: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        if not np.isnan(truth[row]):
            members.setdefault(prompt, []).append(row)
    found: list[tuple[float, Hashable]] = []
    for prompt, rows in members.items():
        for one, other in combinations(rows, 2):
            if truth[one] != truth[other]:
                gained = (model[one] - model[other]) * np.sign(truth[one] - truth[other])
                found.append((0.5 if gained == 0 else float(gained > 0), prompt))
    return np.array([right for right, _ in found]), [prompt for _, prompt in found]
