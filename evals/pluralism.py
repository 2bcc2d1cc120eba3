"""Pluralism suite: does a reward serve all who judge, or most of them at the cost of some?

The worst of several shares is the smallest of noisy numbers: it looks worse than it is, and its own interval does not
know that it was chosen. Here the interval of the smallest is ``[min low, min high]`` over the intervals of all K at
level ``1 - 0.05 / K``, which hold together with 95 %: then the smallest true share is inside.

Judgements of one annotator go together, and so do those on one prompt: of a group the annotators are the independent
units, of an annotator the prompts. Intervals are those of Korn and Graubard (Survey Methodology 24, 1998): Clopper and
Pearson's with as many judgements as would vary that much were they independent.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta, t

from .result import suite_result
from .statistics import LEVEL, Estimate, finite_vector, share_interval

LEAST = 5
"""Judgements that an annotator has to have to be the worst."""


def pluralism_suite(
    right: ArrayLike,
    annotators: Sequence[str],
    row_ids: Sequence[str],
    *,
    groups: Mapping[str, str] | None = None,
    known: Sequence[str] | None = None,
    prompts: Sequence[Hashable] | None = None,
    least: int = LEAST,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A reward on N judgements of several people.

    Args:
        right: 1 where the reward ranks a pair as its annotator did, 1/2 where it cannot tell, else 0, (N,).
        annotators: who judged, N.
        row_ids: one per judgement, kept in the rows.
        groups: of each annotator, where they have any.
        known: annotators that the reward was fitted to, of a reward a person.
        prompts: of each judgement; None: all are different.
        least: judgements that an annotator, or a group, has to have to count as the worst.
        settings: what made the rewards, kept in the result.

    Returns:
        Metrics ``accuracy`` (share of judgements), ``macro`` (mean over annotators of their own shares),
        ``worst_annotator`` and ``worst_group`` (with the intervals above; n is the number of their judgements),
        ``accuracy/GROUP``, and ``accuracy/known``, ``accuracy/new``. Annotators are resampled whole, but in
        ``accuracy/GROUP`` of one annotator. ``worst`` names them; ``annotators`` has ``{annotator, n, accuracy, low,
        high}`` each, worst first, with 95 % intervals of each alone. Rows ``{row_id, annotator, right}``, and the
        annotator's group as ``part``.

    Raises:
        ValueError: counts that differ, a value outside [0, 1], or no judgements.
    """
    values = finite_vector(right, "right")
    if not len(values) == len(annotators) == len(row_ids):
        raise ValueError(f"{len(values)} values, {len(annotators)} annotators, {len(row_ids)} row ids")
    if ((values < 0) | (values > 1)).any():
        raise ValueError("right is a share: a value is outside [0, 1]")
    asked: Sequence[Hashable] = range(len(values)) if prompts is None else prompts
    if len(asked) != len(values):
        raise ValueError(f"{len(values)} values, {len(asked)} prompts")
    who = np.array(annotators)
    rows_of = {name: np.flatnonzero(who == name) for name in sorted(set(annotators))}
    own = {name: values[rows] for name, rows in rows_of.items()}
    of_prompt = {name: [asked[row] for row in rows] for name, rows in rows_of.items()}
    metrics = {
        "accuracy": share_interval(values, groups=annotators),
        "macro": share_interval([float(one.mean()) for one in own.values()]),
    }
    worst: dict[str, str] = {}
    name, estimate = smallest(own, of_prompt, least)
    metrics["worst_annotator"], worst["annotator"] = estimate, name
    if groups is not None:
        of = {group: np.array([groups[one] == group for one in annotators]) for group in sorted(set(groups.values()))}
        shares = {group: values[rows] for group, rows in of.items() if rows.any()}
        people_of = {group: [annotators[row] for row in np.flatnonzero(of[group])] for group in shares}
        for group, share in shares.items():
            people = people_of[group]
            metrics[f"accuracy/{group}"] = share_interval(share, groups=people if len(set(people)) > 1 else None)
        worst["group"], metrics["worst_group"] = smallest(shares, people_of, least)
    if known is not None:
        told = np.isin(who, list(known))
        for part, rows in (("known", told), ("new", ~told)):
            if rows.any():
                people = [annotators[row] for row in np.flatnonzero(rows)]
                metrics[f"accuracy/{part}"] = share_interval(values[rows], groups=people)
    people_found = []
    for one, said in own.items():
        low, high = clustered_interval(said, of_prompt[one], LEVEL)
        people_found.append(
            {"annotator": one, "n": len(said), "accuracy": float(said.mean()), "low": low, "high": high}
        )
    rows_found = [
        {"row_id": row_id, "annotator": one, "right": float(value)}
        for row_id, one, value in zip(row_ids, annotators, values, strict=True)
    ]
    if groups is not None:
        for row in rows_found:
            row["part"] = groups[str(row["annotator"])]
    result = suite_result("pluralism", metrics, rows_found, {**(settings or {}), "least": least})
    return result | {"worst": worst, "annotators": sorted(people_found, key=lambda one: float(str(one["accuracy"])))}


def smallest(
    shares: Mapping[str, ArrayLike], clusters: Mapping[str, Sequence[Hashable]], least: int
) -> tuple[str, Estimate]:
    """Whose mean is the smallest, of those with ``least`` values (of all where nobody has), and the interval of it.

    Args:
        shares: values in [0, 1] by name.
        clusters: by the same names, of each value what it goes together with: the annotator, or the prompt.
    """
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in shares.items()}
    enough = {name: values for name, values in arrays.items() if len(values) >= least} or arrays
    level = 1 - (1 - LEVEL) / len(enough)
    ends = [clustered_interval(values, clusters[name], level) for name, values in enough.items()]
    name = min(enough, key=lambda one: float(enough[one].mean()))
    return name, Estimate(
        float(enough[name].mean()), min(low for low, _ in ends), min(high for _, high in ends), len(enough[name])
    )


def clustered_interval(values: ArrayLike, clusters: Sequence[Hashable], level: float) -> tuple[float, float]:
    """Korn and Graubard's interval of the mean ``p`` of n shares, of which those of a cluster go together.

    With ``e_c`` the sum of ``x - p`` in cluster c of C, the mean's variance is ``v = C / (C - 1) sum_c e_c^2 / n^2``,
    of C - 1 degrees of freedom, and Clopper and Pearson's interval is taken with

        n* = min(n, p (1 - p) / v (t_{n-1} / t_{C-1})^2),   t the quantile of this level,

    values in place of n. Where ``v`` is 0 (all are right, or none) nothing tells how alike a cluster's values are, and
    they are taken for one: ``n* = C``. Where C is n, or 1, values are independent: with C = 1 the interval is of this
    one annotator, or prompt.

    Args:
        values: in [0, 1], (n,).
        clusters: a label each.
        level: nominal coverage.
    """
    given = np.asarray(values, dtype=np.float64)
    n, p = len(given), float(given.mean())
    index: dict[Hashable, int] = {}
    labels = [index.setdefault(cluster, len(index)) for cluster in clusters]
    count, effective = len(index), float(n)
    if 1 < count < n:
        errors = np.bincount(labels, given - p)
        variance = count / (count - 1) * float((errors**2).sum()) / n**2
        tails = [float(t.ppf((1 + level) / 2, freedom - 1)) for freedom in (n, count)]
        spread = p * (1 - p)
        effective = min(n, spread / variance * (tails[0] / tails[1]) ** 2) if variance > 1e-12 * spread else count
    return exact_interval(p * effective, effective, level)


def exact_interval(right: float, n: float, level: float) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share of which ``right`` of ``n`` were seen; parts count as they do."""
    tail = (1 - level) / 2
    low = 0.0 if right <= 0 else float(beta.ppf(tail, right, n - right + 1))
    high = 1.0 if right >= n else float(beta.ppf(1 - tail, right + 1, n - right))
    return low, high
