"""Estimates with intervals: the percentile bootstrap, in numpy."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
RESAMPLES = 10_000
_BLOCK = 2**20  # drawn indices held at once: bounds memory, whatever n is


@dataclass(frozen=True)
class Estimate:
    """A number and how far to trust it.

    Args:
        value: the estimate.
        low, high: ends of its interval; None where there is none (one observation, an extreme, a count of kinds).
        n: independent observations it stands on: rows, or prompts where rows of one prompt were kept together.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """``{value, low, high, n}``, ready for JSON."""
        return asdict(self)


def bootstrap_interval(
    values: ArrayLike,
    *,
    per: ArrayLike | None = None,
    groups: Sequence[Hashable] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of ``values``, or ``sum(values) / sum(per)``, with its percentile bootstrap interval.

    The same rows and seed give the same interval, bit for bit and in any order of the rows (they are sorted before
    they are resampled). Coverage is the nominal level as n grows; for the mean of n normal values it is
    ``P(|t| <= z sqrt((n-1)/n))`` with n - 1 degrees of freedom: 94.2 % instead of 95 % at n = 50, 90.4 % at n = 10.
    Where all rows are equal the interval is a point: the bootstrap cannot know of the rows that it did not see.

    Args:
        values: shape (N,).
        per: denominators such as answer lengths, shape (N,), all positive; None for the mean over rows.
        groups: one label per row; rows of a group (the pairs of one prompt) are drawn together, since they are not
            independent. The interval then stands on the number of groups, and n says so.
        level: nominal coverage, in (0, 1).
        resamples: bootstrap draws.
        seed: of the draws.

    Returns:
        The estimate; without an interval when n is 1.

    Raises:
        ValueError: no rows, shapes that differ, a value that is not finite, a denominator that is not positive.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is a share between 0 and 1, not {level}")
    units = _units(values, per, groups)
    n = len(units)
    total, weight = units.sum(axis=0)
    value = float(total / weight)
    if n == 1:
        return Estimate(value, None, None, 1)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // n)
    ratios = []
    for start in range(0, resamples, block):
        drawn = units[rng.integers(n, size=(min(block, resamples - start), n))].sum(axis=1)
        ratios.append(drawn[:, 0] / drawn[:, 1])
    low, high = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), n)


def win_rate(before: ArrayLike, after: ArrayLike, *, level: float = LEVEL, seed: int = 0) -> Estimate:
    """Share of prompts where ``after`` scores above ``before``; a tie is half a win.

    Args:
        before, after: one score per prompt, the same prompts in the same order, shape (N,).
        level, seed: as in :func:`bootstrap_interval`; prompts are resampled, so the pairing is kept.

    Raises:
        ValueError: shapes that differ, no rows, or a score that is not finite.
    """
    old, new = finite_vector(before, "before"), finite_vector(after, "after")
    if old.shape != new.shape:
        raise ValueError(f"{len(old)} scores before and {len(new)} after: a win rate is paired by prompt")
    return bootstrap_interval((new > old) + 0.5 * (new == old), level=level, seed=seed)


def finite_vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """``values`` as a float64 vector (N,).

    Raises:
        ValueError: another shape, no rows, or a value that is not finite, with its row.
    """
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or len(vector) == 0:
        raise ValueError(f"{name} is of shape (N,) with N >= 1, not {vector.shape}")
    if not np.isfinite(vector).all():
        row = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise ValueError(f"{name}[{row}] is {vector[row]}: a finite number was expected")
    return vector


def _units(values: ArrayLike, per: ArrayLike | None, groups: Sequence[Hashable] | None) -> NDArray[np.float64]:
    """(n, 2) sums of value and denominator per resampled unit, in an order that does not depend on the rows'."""
    numerators = finite_vector(values, "values")
    denominators = np.ones_like(numerators) if per is None else finite_vector(per, "per")
    if denominators.shape != numerators.shape:
        raise ValueError(f"{len(numerators)} values and {len(denominators)} denominators")
    if (denominators <= 0).any():
        raise ValueError(f"per[{int(np.argmax(denominators <= 0))}] is not positive")
    if groups is None:
        units = np.stack([numerators, denominators], axis=1)
    else:
        if len(groups) != len(numerators):
            raise ValueError(f"{len(numerators)} values and {len(groups)} group labels")
        index: dict[Hashable, int] = {}
        labels = np.array([index.setdefault(group, len(index)) for group in groups])
        order = np.lexsort((denominators, numerators))  # floating-point sums depend on the order within a group
        units = np.stack([np.bincount(labels[order], column[order]) for column in (numerators, denominators)], axis=1)
    ordered: NDArray[np.float64] = units[np.lexsort((units[:, 1], units[:, 0]))]
    return ordered
