"""Which rows to keep by their scores: the lowest share, or those under or over a threshold.

One rule for ``align filter``, ``data.filter`` and ``filter_by``: scores in ascending order, equal ones in the order of
the data, and of N rows the first ``floor(share * N)``, one at least (arXiv:2410.08847, section 6.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Selection:
    """What is kept of N rows.

    Attributes:
        kept: positions of the kept rows, in the order of the data.
        ranks: of every row, how many rows of its group come before it: 0 is the lowest score.
        cuts: of every group, the highest score that was kept; None where none was. Without groups, that of ``""``.
    """

    kept: list[int]
    ranks: list[int]
    cuts: dict[str, float | None]


def select(
    scores: Sequence[float],
    *,
    keep: float | None = None,
    below: float | None = None,
    above: float | None = None,
    groups: Sequence[str] | None = None,
) -> Selection:
    """Keep the lowest share, or what is under ``below`` and over ``above``.

    Args:
        scores: one finite number a row.
        keep: the share to keep, in (0, 1]: of N rows ``floor(keep * N)``, one at least; of 100 rows, .29 is 29.
        below, above: thresholds, themselves left out; both together keep what lies between.
        groups: one name a row; ``keep`` is then a share of each group, so that their mixture stays as it is.

    Raises:
        ValueError: no score, one that is not finite, a share outside (0, 1], a share and a threshold together, neither
            of them, thresholds that leave nothing between, groups with thresholds, or not one group a row.
    """
    scores = [float(score) for score in scores]
    _check(scores, keep, below, above, groups)
    members: dict[str, list[int]] = {}
    for position, group in enumerate([""] * len(scores) if groups is None else groups):
        members.setdefault(group, []).append(position)
    kept: list[int] = []
    ranks = [0] * len(scores)
    cuts: dict[str, float | None] = {}
    for group, positions in members.items():
        order = sorted(positions, key=lambda position: scores[position])  # sorted is stable
        for rank, position in enumerate(order):
            ranks[position] = rank
        if keep is not None:
            taken = order[: keep_count(len(order), keep)]
        else:
            low, high = -math.inf if above is None else above, math.inf if below is None else below
            taken = [position for position in order if low < scores[position] < high]
        kept += taken
        cuts[group] = scores[taken[-1]] if taken else None
    return Selection(sorted(kept), ranks, cuts)


def keep_count(rows: int, share: float) -> int:
    """``floor(share * rows)``, one at least, with the share as it is written: .29 of 100 is 29 and not 28."""
    return max(1, math.floor(Fraction(repr(float(share))) * rows))


def window(rows: int, size: int, quantile: float) -> tuple[int, int]:
    """Start and stop of ``size`` neighbouring places of ``rows`` sorted ones, around a quantile (section 5).

    Raises:
        ValueError: no rows, no size, or a quantile outside [0, 1].
    """
    if rows < 1 or size < 1 or not 0 <= quantile <= 1:
        raise ValueError(f"{size} of {rows} rows around quantile {quantile}: wanted 1 or more, in [0, 1]")
    stop = min(rows, max(0, round(quantile * (rows - 1)) - size // 2) + size)
    return max(0, stop - size), stop


def _check(
    scores: Sequence[float],
    keep: float | None,
    below: float | None,
    above: float | None,
    groups: Sequence[str] | None,
) -> None:
    if not scores:
        raise ValueError("scores is empty: there is nothing to keep")
    for position, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(f"scores[{position}] is {score}: it must be finite")
    limits = [limit for limit in (below, above) if limit is not None]
    if (keep is None) == (not limits):
        raise ValueError("give keep, or below and above: a share or thresholds, not both")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}: it must be in (0, 1]")
    if any(math.isnan(limit) for limit in limits):
        raise ValueError("a threshold is not a number")
    if below is not None and above is not None and below <= above:
        raise ValueError(f"below is {below} and above is {above}: nothing lies between")
    if groups is not None and len(groups) != len(scores):
        raise ValueError(f"{len(groups)} groups for {len(scores)} scores: one a row")
    if groups is not None and limits:
        raise ValueError("groups go with keep, the share of each; a threshold is the same for all")
