"""What a rule makes of the numbers of one column: which rows stay, and where each of them stands.

One rule for ``align filter``, ``data.filter`` and ``filter_by``: scores in ascending order, equal ones in the order of
the data, and of N rows the first ``floor(share * N)``, one at least (arXiv:2410.08847, section 6.3).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from align.config.schema import FilterRule
from align.data.fields import FieldError
from align.errors import AlignError

logger = logging.getLogger(__name__)


def finite_number(column: str, value: Any) -> float:
    """The finite number in a cell; as text, too, which is what becomes of the cells of a CSV file.

    Raises:
        FieldError: there is none.
    """
    if value is None:
        raise FieldError(column, "missing or null: score the row, or drop it")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise FieldError(column, f"{_short(value)} is not a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldError(column, f"{_short(value)} is not a number")
    if not math.isfinite(value):
        raise FieldError(column, f"{value} is not finite")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def group_name(value: Any) -> str:
    """Of a cell of the column that groups are named by; rows without one are a group of their own."""
    return "(none)" if value is None else str(value)


def standing(
    column: str, scores: Sequence[float], rule: FilterRule, groups: Sequence[str] | None
) -> list[tuple[bool, str]]:
    """Of every row whether the rule keeps it, and where it stands.

    Args:
        column: its name.
        scores: one finite number a row.
        groups: the group of each row, where ``rule.group`` names a column.

    Raises:
        AlignError: a quota is for a group that is not there.
    """
    if rule.below is not None or rule.above is not None:
        low, high = (
            -math.inf if rule.above is None else rule.above,
            math.inf if rule.below is None else rule.below,
        )
        words = rule_words(rule)
        return [
            (kept, f"{column} {score:.6g} is {'' if kept else 'not '}{words}")
            for kept, score in ((low < score < high, score) for score in scores)
        ]
    sizes = Counter([""] * len(scores) if groups is None else groups)
    if unknown := (rule.quotas or {}).keys() - sizes.keys():
        raise AlignError(
            f"quotas: no row has {rule.group} {min(unknown)!r}; there are {', '.join(map(repr, list(sizes)[:12]))}"
        )
    _tell_rounding(rule, sizes)
    stays = {group: places(size, rule, group) for group, size in sizes.items()}
    found = []
    for place, rank in enumerate(ranks(scores, groups)):
        group = "" if groups is None else groups[place]
        start, stop = stays[group]
        where = f" of {rule.group} {group!r}" if rule.group is not None else ""
        kept_places = f"{start + 1:,} to {stop:,} stay" if stop > start + 1 else f"{stop:,} stays"
        reason = f"{column} {scores[place]:.6g} is number {rank + 1:,} of {sizes[group]:,}{where}; {kept_places}"
        found.append((start <= rank < stop, reason))
    return found


def ranks(scores: Sequence[float], groups: Sequence[str] | None = None) -> list[int]:
    """Of every row how many rows of its group come before it: 0 is the lowest score."""
    seen: Counter[str] = Counter()
    found = [0] * len(scores)
    for place in sorted(range(len(scores)), key=scores.__getitem__):  # sorted is stable
        group = "" if groups is None else groups[place]
        found[place] = seen[group]
        seen[group] += 1
    return found


def places(rows: int, rule: FilterRule, group: str = "") -> tuple[int, int]:
    """Start and stop of the places, from the lowest, that a rule of shares keeps of ``rows``: one at least."""
    low, high = rule.window if rule.window is not None else (0.0, _share(rule, group))
    start = min(math.floor(_exact(low) * rows), rows - 1)
    return start, max(math.floor(_exact(high) * rows), start + 1)


def _share(rule: FilterRule, group: str) -> float:
    assert rule.keep is not None  # the rule's own check
    return (rule.quotas or {}).get(group, rule.keep)


def _exact(share: float) -> Fraction:
    """The share as it is written: .29 of 100 is 29, and 28.999999999999996 in binary."""
    return Fraction(repr(float(share)))


def _tell_rounding(rule: FilterRule, sizes: Counter[str]) -> None:
    """A share is rounded down in each group, which adds up where groups are small."""
    if rule.group is None or rule.keep is None:
        return
    wanted = math.floor(sum(_exact(_share(rule, group)) * size for group, size in sizes.items()))
    stay = sum(places(size, rule, group)[1] for group, size in sizes.items())
    if stay != wanted:
        logger.warning(
            "%s keeps %d of %d rows where %d were asked for: the share is rounded down in each of %d groups, to one "
            "row at least",
            *(rule_words(rule), stay, sizes.total(), wanted, len(sizes)),
        )


def rule_words(rule: FilterRule) -> str:
    """``the lowest 50 %``, ``below 2 and above 1``."""
    within = f" of each {rule.group}" if rule.group is not None else ""
    if rule.keep is not None:
        quotas = ", ".join(f"{100 * share:g} % of {name}" for name, share in (rule.quotas or {}).items())
        return f"the lowest {100 * rule.keep:g} %{within}{f' ({quotas})' if quotas else ''}"
    if rule.window is not None:
        return f"quantiles {rule.window[0]:g} to {rule.window[1]:g}{within}"
    bounds = [f"{name} {value:g}" for name in ("below", "above") if (value := getattr(rule, name)) is not None]
    return " and ".join(bounds)
