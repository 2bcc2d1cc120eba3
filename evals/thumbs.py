"""Thumbs suite: does the implicit reward tell held-out thumbs up from thumbs down?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .result import suite_result
from .statistics import LEVEL, RESAMPLES, Estimate, at_the_end, bootstrap_interval, finite_vector, share_interval

_BLOCK = 2**21  # counts held at once: bounds memory, whatever n is


def thumbs_suite(
    rewards: Tensor,
    labels: Tensor,
    row_ids: Sequence[str],
    *,
    threshold: float,
    groups: Sequence[Hashable] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """AUC, accuracy and mean rewards of N held-out answers with thumbs.

    The AUC is the share of (up, down) pairs of answers in which the one with the thumb up has the higher reward, and
    needs no threshold; the accuracy is the share of answers on the right side of one. Ties count as half in both: an
    untrained policy equals its reference, so that all its rewards are zero and both are one half at threshold 0.

    Args:
        rewards: implicit rewards in the loss's own units, (N,).
        labels: True for thumbs up, (N,).
        row_ids: one per answer, kept in the rows.
        threshold: rewards above it speak for a thumb up.
        groups: the prompt of each answer, where a prompt has several: they are resampled together.
        settings: what made the rewards, kept in the result with the threshold.

    Returns:
        Metrics ``auc``, ``accuracy``, ``reward_up``, ``reward_down`` (means); rows ``{row_id, up, reward}``.

    Raises:
        ValueError: counts that differ, thumbs of one kind alone, or a reward or threshold that is not finite.
    """
    values = finite_vector(rewards.detach().double().cpu().numpy(), "rewards")
    up = labels.detach().cpu().numpy().astype(bool)
    if not len(values) == len(up) == len(row_ids):
        raise ValueError(f"{len(values)} rewards, {len(up)} labels, {len(row_ids)} row ids")
    if not np.isfinite(threshold):
        raise ValueError(f"threshold is {threshold}: it must be finite")
    names: Sequence[Hashable] = range(len(values)) if groups is None else groups
    right = np.where(up, values > threshold, values < threshold) + 0.5 * (values == threshold)
    metrics = {
        "auc": auc_interval(values, up, groups=groups),
        "accuracy": share_interval(right, groups=groups),
        **{
            f"reward_{thumb}": bootstrap_interval(
                values[which], groups=[name for name, kept in zip(names, which, strict=True) if kept]
            )
            for thumb, which in (("up", up), ("down", ~up))
        },
    }
    rows = [
        {"row_id": row_id, "up": bool(label), "reward": float(value)}
        for row_id, label, value in zip(row_ids, up, values, strict=True)
    ]
    return suite_result("thumbs", metrics, rows, {**(settings or {}), "threshold": threshold}, groups=groups)


def auc_interval(
    scores: ArrayLike,
    positive: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Area under the ROC curve, ``P(score of a positive > score of a negative) + P(equal) / 2``, with its interval.

    The same rows and seed give the same interval in any order of the rows. A draw without one of the classes has no
    AUC and is left out.

    Args:
        scores: (N,).
        positive: Boolean, (N,).
        groups: one label per row; rows of a group are drawn together. Without them, rows are drawn.
        level, resamples, seed: as in :func:`bootstrap_interval`.

    Returns:
        The estimate; n counts groups, or rows without groups. Without an interval when no draw has both classes. Of an
        area of 0 or 1 the interval is that of a share, of as many pairs as can be had from different groups.

    Raises:
        ValueError: no rows, shapes that differ, a score that is not finite, or a class without rows.
    """
    values, up = finite_vector(scores, "scores"), np.asarray(positive, dtype=bool)
    if up.shape != values.shape or (groups is not None and len(groups) != len(values)):
        raise ValueError(f"{len(values)} scores, {up.size} classes, {len(groups or values)} group labels")
    if up.all() or not up.any():
        raise ValueError(f"all {len(values)} rows are {'positive' if up.all() else 'negative'}: an AUC needs both")
    order = np.lexsort((up, values))
    values, up = values[order], up[order]
    labels: Sequence[Hashable] = range(len(values)) if groups is None else [groups[index] for index in order]
    found: dict[Hashable, list[tuple[float, bool]]] = {}
    for label, score, one in zip(labels, values, up, strict=True):
        found.setdefault(label, []).append((float(score), bool(one)))
    # Groups in an order that their rows give: the same draws for the same rows.
    place = {label: index for index, label in enumerate(sorted(found, key=found.__getitem__))}
    unit = np.array([place[label] for label in labels])
    # Ends of each run of equal scores.
    last = np.flatnonzero(np.append(values[1:] != values[:-1], True))
    value = float(_areas(np.ones((1, len(values))), up, last)[0])
    rng = np.random.default_rng(seed)
    areas: list[NDArray[np.float64]] = []
    block = max(1, _BLOCK // len(values))
    for start in range(0, resamples, block):
        counts = rng.multinomial(len(found), np.full(len(found), 1 / len(found)), size=min(block, resamples - start))
        drawn = _areas(counts[:, unit].astype(np.float64), up, last)
        areas.append(drawn[np.isfinite(drawn)])
    every = np.concatenate(areas)
    if not len(every) or len(found) == 1:
        return Estimate(value, None, None, len(found))
    low, high = np.quantile(every, [(1 - level) / 2, (1 + level) / 2])
    if value in (0, 1):  # as many pairs as share no group are independent, and all of them are so
        sides = [{label for label, one in zip(labels, up, strict=True) if one == side} for side in (True, False)]
        apart = min(*map(len, sides), len(found) // 2)
        end = at_the_end(Estimate(value, value, value, max(1, apart)), level)
        return replace(end, n=len(found))
    return Estimate(value, float(low), float(high), len(found))


def _areas(counts: NDArray[np.float64], up: NDArray[np.bool_], last: NDArray[np.int64]) -> NDArray[np.float64]:
    """AUC of each row of ``counts`` (draws, N): how often each row of the data, sorted by score, was drawn.

    NaN where a draw lacks a class.
    """
    positive, negative = (np.cumsum(counts * which, axis=1)[:, last] for which in (up, ~up))
    at = np.diff(positive, axis=1, prepend=0)  # positives of each score
    below = np.concatenate([np.zeros((len(counts), 1)), negative[:, :-1]], axis=1)
    pairs = positive[:, -1] * negative[:, -1]
    wins = (at * (below + negative) / 2).sum(axis=1)
    areas: NDArray[np.float64] = np.divide(wins, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)
    return areas
