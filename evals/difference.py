"""Two results of one suite, metric by metric: what is worse beyond its interval?"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from .result import SCHEMA
from .statistics import LEVEL, Estimate, paired_difference

Row = Mapping[str, Any]
Status = Literal["worse", "better", "same", "told"]

DIRECTIONS: dict[int, str] = {
    0: r"(?!rmse_).*_before|ties|label_ties|length(?!_controlled).*|kl.*|rejected_delta.*|confidence|longer.*"
    r"|first_preferred|best_k_.*|spread_.*|told|set_aside|ece_if_calibrated|reward_down|samples.*|tokens"
    r"|log_normaliser|resamplings",
    -1: r"ece.*|brier|log_loss|rmse_.*|inconsistent|unjudged|frac_chosen_down|largest_fall|unfinished.*"
    r"|repetition.*|wrong_at_.*|false_positives|never_passed|missed|calls_per_token|masks|dead_ends",
    1: r"accuracy.*|macro|gain|margin.*|(length_controlled_)?win_rate.*|reward.*|valid|ess|agreement|kappa|right|whole"
    r"|worst_.*|completeness|ceiling|correct_at_.*|best_utility_.*|distinct_.*|chosen_delta.*|passed|.*_change|.*_after",
}
"""Whether more of a metric is better (1), worse (-1) or neither (0): the first that its name before any slash fits.

What comes after is a subset, an annotator or a model, of which names say nothing. ``higher_is_better`` of a result
goes first; a metric that none fits is one of which it is not known."""
_ANNOTATORS = re.compile(r"^(un)?seen/")
"""What metrics of ``align.evals.pal`` begin with: ``seen/gain/MODEL/OTHER`` is a ``gain``."""


@dataclass(frozen=True)
class Change:
    """One metric of one model.

    Args:
        model: its name, None where a result is of one model.
        metric: its name.
        before, after: in the first and in the second result.
        difference: ``after - before``; without ends where either has none.
        paired: the interval is of differences row by row.
        direction: 1 where more is better, -1 where less is, 0 where neither, None where it is not known.
    """

    model: str | None
    metric: str
    before: float
    after: float
    difference: Estimate
    paired: bool
    direction: int | None

    @property
    def status(self) -> Status:
        """``told``: it has no interval, or neither way is worse; ``same``: 0 is in the interval."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None or not self.direction:
            return "told"
        if low <= 0 <= high:
            return "same"
        return "better" if (low > 0) == (self.direction > 0) else "worse"


def changes(first: Row, second: Row, *, level: float = LEVEL) -> list[Change]:
    """Every metric that both results have.

    Paired where both have the same rows, the metric is the mean of something that the rows hold, and rows are
    independent (n is their number); a percentile bootstrap then. Else from both intervals (MOVER, Zou and Donner,
    doi:10.1002/sim.3095): each side's distances to its ends are added as squares, scaled from 95 % to ``level`` as
    those of a normal. An interval is of one metric: of twenty that did not change one is outside on average.

    Raises:
        ValueError: the results do not go together, and why.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is a share between 0 and 1, not {level}")
    _check(first, second)
    told = {**first.get("higher_is_better", {}), **second.get("higher_is_better", {})}
    found = []
    for name, before, after in _models(first, second):
        keys = [[_key(row) for row in side.get("rows", [])] for side in (before, after)]
        same = bool(keys[0]) and keys[0] == keys[1] and None not in keys[0]
        for metric, old in before["metrics"].items():
            new = after["metrics"].get(metric)
            if new is None or old["value"] is None or new["value"] is None:
                continue
            pair = _by_row(metric, (before, after), (old, new)) if same else None
            if pair is not None:
                difference = paired_difference(*pair, level=level)
            elif metric == "missed":  # a count of what cannot vary
                by = new["value"] - old["value"]
                difference = Estimate(by, by, by, min(old["n"], new["n"]))
            else:
                difference = _unpaired(old, new, level)
            way = _direction(metric, told)
            found.append(Change(name, metric, old["value"], new["value"], difference, pair is not None, way))
    if not found:
        raise ValueError("they have no metric in common")
    return found


def only_in_one(first: Row, second: Row) -> tuple[list[str], list[str]]:
    """Models, and metrics with a value, that only the first has, and those that only the second has, in words."""
    lines: tuple[list[str], list[str]] = [], []
    matched = list(_models(first, second))
    for result, place in ((first, 0), (second, 1)):
        other = ("second", "first")[place]
        known = [id(pair[1 + place]) for pair in matched]
        lines[place].extend(f"{name}: not in the {other}" for name, one in _of(result).items() if id(one) not in known)
        for name, *sides in matched:
            here, there = (_valued(side) for side in (sides[place], sides[1 - place]))
            whose = "" if name is None else f"{name}: "
            lines[place].extend(f"{whose}{metric}: not in the {other}" for metric in here if metric not in there)
    return lines


def unshared_rows(first: Row, second: Row) -> list[str]:
    """Of models whose rows are not the same in both, in the same order, how many are; nothing is paired there."""
    lines = []
    for name, *sides in _models(first, second):
        keys = [[_key(row) for row in side.get("rows", [])] for side in sides]
        if keys[0] != keys[1] and not any(None in own for own in keys):
            shared = (Counter(keys[0]) & Counter(keys[1])).total()
            order = ", in another order" if shared == len(keys[0]) == len(keys[1]) else ""
            whose = "" if name is None else f"{name}: "
            counts = " and ".join(f"{len(own):,}" for own in keys)
            lines.append(f"{whose}{shared:,} rows are in both{order}, of {counts}: they are compared unpaired")
    return lines


def _check(first: Row, second: Row) -> None:
    for result, place in ((first, "first"), (second, "second")):
        if result.get("schema") != SCHEMA:
            raise ValueError(
                f"the {place} is of schema {result.get('schema')}, and this reads {SCHEMA}: make it again"
            )
    if first["suite"] != second["suite"]:
        raise ValueError(f"they are of different suites, {first['suite']} and {second['suite']}")
    digests = [(result.get("data") or {}).get("sha256") for result in (first, second)]
    if None not in digests and digests[0] != digests[1]:
        sources = [result["data"].get("source") for result in (first, second)]
        raise ValueError(f"they are of different data: {sources[0]} and {sources[1]} (sha256 differs)")


def _of(result: Row) -> dict[str | None, Row]:
    models: dict[str | None, Row] = dict(result["models"]) if "models" in result else {None: result}
    return models


def _models(first: Row, second: Row) -> Iterator[tuple[str | None, Row, Row]]:
    """Models of the same name; the ones that are left where each result has one."""
    one, two = _of(first), _of(second)
    for name in one:
        if name in two:
            yield name, one[name], two[name]
    left = [[name for name in mine if name not in others] for mine, others in ((one, two), (two, one))]
    if len(left[0]) == len(left[1]) == 1:
        (old,), (new,) = left
        yield f"{old} → {new}", one[old], two[new]


def _valued(side: Row) -> list[str]:
    return [metric for metric, entry in side["metrics"].items() if entry["value"] is not None]


def _key(row: Row) -> str | None:
    key = row.get("row_id", row.get("prompt"))
    return None if key is None else json.dumps(key)


def _direction(metric: str, told: Mapping[str, bool | None]) -> int | None:
    if metric in told:
        higher = told[metric]
        return None if higher is None else 1 if higher else -1
    own = _ANNOTATORS.sub("", metric, count=1).partition("/")[0]
    return next((direction for direction, rule in DIRECTIONS.items() if re.fullmatch(rule, own)), None)


def _unpaired(old: Row, new: Row, level: float) -> Estimate:
    by, n = new["value"] - old["value"], min(old["n"], new["n"])
    ends = [side[end] for side in (old, new) for end in ("low", "high")]
    if None in ends:
        return Estimate(by, None, None, n)
    scale = NormalDist().inv_cdf((1 + level) / 2) / NormalDist().inv_cdf((1 + LEVEL) / 2)
    down = np.hypot(new["value"] - new["low"], old["high"] - old["value"])
    up = np.hypot(new["high"] - new["value"], old["value"] - old["low"])
    return Estimate(by, float(by - scale * down), float(by + scale * up), n)


def _by_row(metric: str, sides: Sequence[Row], estimates: Sequence[Row]) -> tuple[list[float], list[float]] | None:
    """The metric's values row by row in both, where the rows hold them and are independent."""
    found = []
    for side, estimate in zip(sides, estimates, strict=True):
        try:
            values = [_value(metric, row) for row in side["rows"]]
        except (KeyError, TypeError):
            return None
        known = [value for value in values if value is not None]
        if len(known) != estimate["n"] or not np.isclose(np.mean(known), estimate["value"], rtol=1e-6, atol=1e-9):
            return None
        found.append(values)
    pairs = [(old, new) for old, new in zip(*found, strict=True) if old is not None and new is not None]
    if not len(pairs) == estimates[0]["n"] == estimates[1]["n"]:
        return None
    return [old for old, _ in pairs], [new for _, new in pairs]


def _margin(row: Row) -> float | None:
    """Of a pair; None where its label prefers neither answer."""
    label = row.get("preference", 1.0)
    by: float = row["chosen_reward"] - row["rejected_reward"]
    return None if label == 0.5 else by if label > 0.5 else -by


def _accuracy(row: Row) -> float | None:
    if "samples" in row:
        return float(row["correct"] / row["samples"])
    margin = _margin(row)
    return None if margin is None else (margin > 0) + 0.5 * (margin == 0)


_VALUES: dict[str, Callable[[Row], float | None]] = {
    "accuracy": _accuracy,
    "margin": _margin,
    "chosen_delta_per_token": lambda row: row["chosen_delta"] / row["chosen_tokens"],
    "rejected_delta_per_token": lambda row: row["rejected_delta"] / row["rejected_tokens"],
    "frac_chosen_down": lambda row: float(row["chosen_delta"] < 0),
    "reward_before": lambda row: row["before"]["reward"],
    "reward_after": lambda row: row["after"]["reward"],
    "reward_change": lambda row: row["after"]["reward"] - row["before"]["reward"],
    "win_rate": lambda row: (
        float(row["after"]["reward"] > row["before"]["reward"])
        + 0.5 * (row["after"]["reward"] == row["before"]["reward"])
    ),
    "length_before": lambda row: row["before"]["tokens"],
    "length_after": lambda row: row["after"]["tokens"],
    "unfinished_before": lambda row: float(not row["before"]["finished"]),
    "unfinished_after": lambda row: float(not row["after"]["finished"]),
}
"""Metrics that rows hold in another form than under the metric's own name."""


def _value(metric: str, row: Row) -> float | None:
    if metric in row:
        value = row[metric]
        return None if value is None else float(value)
    if metric in _VALUES:
        return _VALUES[metric](row)
    if "." in metric:  # of a task that is not the row's
        return None
    raise KeyError(metric)
