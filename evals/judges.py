"""Judges suite: does an annotator say what people say, and what else than the answers moves it?

Agreement counts a judge's tie as half, over the pairs on which people prefer an answer. **Cohen's kappa** is over the
three verdicts "this one", "the other one", "tie", where neither answer of a pair is the first: with the judge's share
of ties ``t`` and people's ``u``, chance agrees in ``e = t u + (1 - t)(1 - u) / 2``, and

    kappa = (o - e) / (1 - e),   o the share of pairs with the same verdict.

**Position bias** is that of judges that are asked in either order: how often the two verdicts are not the same, and
how often the answer that stood first was preferred (1/2 where it does not matter). **Length bias** is how much more
often than people a judge prefers the longer answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .result import suite_result
from .statistics import LEVEL, Estimate, bootstrap_draws, bootstrap_interval, finite_vector, share_interval

FloatArray = NDArray[np.float64]
BY_CONSTRUCTION = "none by construction"
MEASURED = "asked in both orders"


@dataclass(frozen=True)
class Judged:
    """What a judge says of N pairs, as probabilities that the chosen answer is preferred.

    Args:
        preference: the verdict, (N,).
        chosen_first, rejected_first: of a judge that is asked in either order, its verdict when that answer stood
            first, (N,) each; None for one that cannot see an order.
    """

    preference: ArrayLike
    chosen_first: ArrayLike | None = None
    rejected_first: ArrayLike | None = None


def judge_suite(
    judged: Judged,
    label: ArrayLike,
    lengths: ArrayLike,
    row_ids: Sequence[str],
    *,
    groups: Sequence[Hashable] | None = None,
    unjudged: Sequence[Hashable] = (),
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A judge against people, on N pairs.

    Args:
        judged: what it says.
        label: share of people who prefer the chosen answer, in [0, 1], (N,); 1/2 is a tie.
        lengths: of the chosen and the rejected answers, (N, 2).
        row_ids: one per pair, kept in the rows.
        groups: the prompt of each pair, where a prompt has several: they are resampled together.
        unjudged: the prompt of each pair of which it said nothing.
        settings: what made the verdicts, kept in the result.

    Returns:
        Metrics ``agreement``, ``kappa``, ``ties`` (the judge's), ``unjudged`` (share of all pairs); ``longer``,
        ``longer_people`` and their difference ``length_bias``, over pairs of two lengths; of a judge that sees an
        order ``inconsistent`` and ``first_preferred``. ``position`` says which it is. Rows
        ``{row_id, preference, label}``, with both orders where there are two.

    Raises:
        ValueError: counts that differ, a number outside [0, 1], or labels that are all ties.
    """
    said, people = _shares(judged.preference, "preference"), _shares(label, "label")
    sizes = np.asarray(lengths, dtype=np.float64)
    if not len(said) == len(people) == len(row_ids) == len(sizes):
        raise ValueError(f"{len(said)} verdicts, {len(people)} labels, {len(sizes)} lengths, {len(row_ids)} row ids")
    names: Sequence[Hashable] = range(len(said)) if groups is None else groups
    right, decided = agreement(said, people)
    if not decided.any():
        raise ValueError(f"all {len(people)} labels are ties: there is nothing to agree with")
    metrics = {
        "agreement": _share(right, decided, names),
        "kappa": kappa(said, people, names),
        "ties": share_interval(said == 0.5, groups=names),
        "unjudged": _unjudged(len(said), len(unjudged), None if groups is None else [*groups, *unjudged]),
    }
    differ = sizes[:, 0] != sizes[:, 1]
    if differ.any():
        sign = np.sign(sizes[:, 0] - sizes[:, 1])
        longer, of_people = (0.5 + sign * (values - 0.5) for values in (_verdict(said), people))
        metrics["longer"] = _share(longer, differ, names)
        metrics["longer_people"] = _share(of_people, differ, names)
        metrics["length_bias"] = bootstrap_interval((longer - of_people)[differ], groups=_of(names, differ))
    rows: list[dict[str, Any]] = [
        {"row_id": row_id, "preference": float(p), "label": float(y)}
        for row_id, p, y in zip(row_ids, said, people, strict=True)
    ]
    position = BY_CONSTRUCTION
    if judged.chosen_first is not None and judged.rejected_first is not None:
        position = MEASURED
        there, back = (_shares(one, "order") for one in (judged.chosen_first, judged.rejected_first))
        metrics["inconsistent"] = share_interval(_verdict(there) != _verdict(back), groups=names)
        metrics["first_preferred"] = share_interval((_verdict(there) + 1 - _verdict(back)) / 2, groups=names)
        for row, one, other in zip(rows, there, back, strict=True):
            row |= {"chosen_first": float(one), "rejected_first": float(other)}
    return suite_result("judges", metrics, rows, settings, groups=groups) | {"position": position}


def agreement(said: FloatArray, people: FloatArray) -> tuple[FloatArray, NDArray[np.bool_]]:
    """1 where the verdict is people's, 1/2 where it is a tie, else 0; and where people prefer an answer, (N,) each."""
    sign = np.sign(people - 0.5)
    return 0.5 + sign * (_verdict(said) - 0.5), sign != 0


def kappa(said: FloatArray, people: FloatArray, groups: Sequence[Hashable]) -> Estimate:
    """Cohen's kappa of two sets of verdicts, the answers of a pair in no order; 1 where both always say tie."""
    one, other = _verdict(said), _verdict(people)
    columns = np.stack([np.ones(len(one)), one == other, one == 0.5, other == 0.5], axis=1)

    def of(sums: FloatArray) -> FloatArray:
        same, first, second = (sums[..., place] / sums[..., 0] for place in (1, 2, 3))
        chance = first * second + (1 - first) * (1 - second) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(chance < 1, (same - chance) / (1 - chance), 1.0)

    value, n = float(of(columns.sum(0))), len(set(groups))
    if n == 1:
        return Estimate(value, None, None, 1)
    if (one == other).all():  # as of a share that is 1: other draws of these rows would all say the same
        sums = columns.sum(0) * [1, ((1 - LEVEL) / 2) ** (1 / n), 1, 1]
        return Estimate(value, float(of(sums)), 1.0, n)
    low, high = np.quantile(of(bootstrap_draws(columns, groups=groups)), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), n)


def people_agree(votes: Sequence[Sequence[float]], groups: Sequence[Hashable]) -> Estimate | None:
    """How often two people say the same of a pair, each pair of people and then each pair of answers counted alike.

    Args:
        votes: for each pair of answers what each person said: 1, 0, or 1/2 for a tie.
        groups: the prompt of each pair.

    Returns:
        The share; None where no pair was judged by two.
    """
    shares, names = [], []
    for own, name in zip(votes, groups, strict=True):
        n = len(own)
        if n > 1:
            same = sum(count * (count - 1) for count in (own.count(v) for v in set(own)))
            shares.append(same / (n * (n - 1)))
            names.append(name)
    return share_interval(shares, groups=names) if shares else None


def _unjudged(judged: int, lacking: int, groups: Sequence[Hashable] | None) -> Estimate:
    return share_interval(np.repeat([0.0, 1.0], [judged, lacking]), groups=groups)


def _verdict(p: FloatArray) -> FloatArray:
    """1, 0, or 1/2 for a tie."""
    return (np.sign(p - 0.5) + 1) / 2


def _share(values: FloatArray, kept: NDArray[np.bool_], groups: Sequence[Hashable]) -> Estimate:
    return share_interval(values[kept], groups=_of(groups, kept))


def _of(groups: Sequence[Hashable], kept: NDArray[np.bool_]) -> list[Hashable]:
    return [groups[row] for row in np.flatnonzero(kept)]


def _shares(values: ArrayLike, name: str) -> FloatArray:
    found = finite_vector(values, name)
    outside = (found < 0) | (found > 1)
    if outside.any():
        raise ValueError(f"{name}[{int(np.argmax(outside))}] is outside [0, 1]")
    return found
