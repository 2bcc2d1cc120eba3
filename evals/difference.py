"""Two results of one suite, metric by metric: what is worse beyond its interval?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from .result import SCHEMA
from .row_values import Column, column, row_key
from .statistics import LEVEL, Estimate, paired_difference

Row = Mapping[str, Any]
Status = Literal["worse", "better", "same", "told"]

DIRECTIONS: dict[int, str] = {
    0: r"(?!rmse_).*_before|ties|label_ties|length(?!_controlled).*|kl.*|rejected_delta.*|confidence|longer.*"
    r"|first_preferred|best_k_.*|spread_.*|told|set_aside|ece_if_calibrated|reward_down|samples.*|tokens"
    r"|log_normaliser|resamplings",
    -1: r"ece.*|brier|log_loss|rmse_.*|inconsistent|unjudged|frac_chosen_down|largest_fall|unfinished.*"
    r"|repetition.*|wrong_at_.*|false_positives|never_passed|missed|calls_per_token|masks|dead_ends",
    1: r"accuracy.*|auc|macro|gain|judge|margin.*|(length_controlled_)?win_rate.*|reward.*|valid|ess|agreement|kappa"
    r"|right|whole|worst_.*|completeness|ceiling|correct_at_.*|best_utility_.*|distinct_.*|chosen_delta.*|passed|.*_change|.*_after",
}
"""Whether more of a metric is better (1), worse (-1) or neither (0): the first that its name before any slash fits.

What comes after is a subset, an annotator or a model, of which names say nothing. ``higher_is_better`` of a result
goes first; a metric that none fits is one of which it is not known."""
NEAR_0 = ("overconfidence", "length_bias")
"""Better where they are nearer to 0; where they go from one side of it to the other, neither way is."""
OF_POINTS = {"reward": "reward", "judge": "judge", "kl_to_reference": "kl"}
"""Metrics of a frontier's points, and under which key."""
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

    Paired where both have the same rows, and the metric is the mean of something that the rows hold
    (``row_values``); a percentile bootstrap then, in which rows of one prompt stay together. Else from both intervals
    (MOVER, Zou and Donner, doi:10.1002/sim.3095): each side's distances to its ends are added as squares, scaled from
    95 % to ``level`` as those of a normal. An interval is of one metric: of twenty that did not change one is outside
    on average. Of a frontier every point is compared with the same one of the other.

    Raises:
        ValueError: the results do not go together, and why.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is a share between 0 and 1, not {level}")
    _check(first, second)
    told = {**first.get("higher_is_better", {}), **second.get("higher_is_better", {})}
    suite, found = first["suite"], []
    for name, before, after in _matched(first, second).both:
        keys = [[row_key(row) for row in side.get("rows", [])] for side in (before, after)]
        same = bool(keys[0]) and keys[0] == keys[1] and None not in keys[0]
        for metric, old in before["metrics"].items():
            new = after["metrics"].get(metric)
            if new is None or old["value"] is None or new["value"] is None:
                continue
            values = old["value"], new["value"]
            columns = [column(suite, metric, side) for side in (before, after)] if same else []
            difference = _paired(columns, level)
            paired = difference is not None
            if difference is None and metric == "missed":  # a count of what cannot vary
                by = values[1] - values[0]
                difference = Estimate(by, by, by, min(old["n"], new["n"]))
            difference = difference or _unpaired(old, new, level)
            found.append(Change(name, metric, *values, difference, paired, _direction(metric, told, values)))
    if not found:
        raise ValueError("they have no metric in common")
    return found


def only_in_one(first: Row, second: Row) -> tuple[list[str], list[str]]:
    """Models, points of frontiers, and metrics with a value, that only the first has, and those that only the second
    has, in words.
    """
    lines: tuple[list[str], list[str]] = [], []
    matched = _matched(first, second)
    for place, other in enumerate(("second", "first")):
        lines[place].extend(f"{name}: not in the {other}" for name in matched.alone[place])
        for name, *sides in matched.both:
            here, there = (_valued(side) for side in (sides[place], sides[1 - place]))
            whose = "" if name is None else f"{name}: "
            lines[place].extend(f"{whose}{metric}: not in the {other}" for metric in here if metric not in there)
    return lines


def unshared_rows(first: Row, second: Row) -> list[str]:
    """Of models whose rows are not the same in both, in the same order, how many are; nothing is paired there."""
    lines = []
    for name, *sides in _matched(first, second).both:
        keys = [[row_key(row) for row in side.get("rows", [])] for side in sides]
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


@dataclass(frozen=True)
class _Matched:
    """What two results have in common.

    Attributes:
        both: its name, and what the first and the second say of it: metrics and rows.
        alone: names of what only the first has, and only the second.
    """

    both: list[tuple[str | None, Row, Row]]
    alone: tuple[list[str], list[str]]


def _matched(first: Row, second: Row) -> _Matched:
    """Models of the same name, and the ones that are left where each result has one; of a frontier their points."""
    one, two = _of(first), _of(second)
    pairs = [(name, name) for name in one if name in two]
    left = [[name for name in mine if name not in others] for mine, others in ((one, two), (two, one))]
    if len(left[0]) == len(left[1]) == 1:
        pairs.append((left[0][0], left[1][0]))
        left = [[], []]
    both: list[tuple[str | None, Row, Row]] = []
    alone: tuple[list[str], list[str]] = [str(name) for name in left[0]], [str(name) for name in left[1]]
    for old, new in pairs:
        before, after = one[old], two[new]
        if "points" not in before or "points" not in after:
            both.append((old if old == new else f"{old} → {new}", before, after))
            continue
        points = _points(str(old), before), _points(str(new), after)
        for key, (label, point) in points[0].items():
            if key in points[1]:
                other, its = points[1][key]
                both.append((label if label == other else f"{label} → {other}", point, its))
        for place in (0, 1):
            alone[place].extend(label for key, (label, _) in points[place].items() if key not in points[1 - place])
    return _Matched(both, alone)


def _points(model: str, result: Row) -> dict[str, tuple[str, Row]]:
    """Label, metrics and rows of each point, by its label without the model's name."""
    return {
        _unnamed(one, model): (
            one["label"],
            {"metrics": {name: one[key] for name, key in OF_POINTS.items() if key in one}, "rows": one["rows"]},
        )
        for one in result["points"]
    }


def _unnamed(one: Row, model: str) -> str:
    """A short name may also be in other words of the label: it is taken away where it stands for the model."""
    label: str = one["label"]
    if one["kind"] == "transfer-q":
        return label.replace(f" with {model},", ",", 1)
    return label if one["kind"] in ("best-of-n", "smc") else label.removeprefix(model)


def _of(result: Row) -> dict[str | None, Row]:
    models: dict[str | None, Row] = dict(result["models"]) if "models" in result else {None: result}
    return models


def _valued(side: Row) -> list[str]:
    return [metric for metric, entry in side["metrics"].items() if entry["value"] is not None]


def _direction(metric: str, told: Mapping[str, bool | None], values: tuple[float, float]) -> int | None:
    if metric in told:
        higher = told[metric]
        return None if higher is None else 1 if higher else -1
    own = _ANNOTATORS.sub("", metric, count=1).partition("/")[0]
    if own in NEAR_0:
        signs = {value > 0 for value in values if value}
        return 0 if len(signs) != 1 else -1 if signs == {True} else 1
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


def _paired(columns: Sequence[Column | None], level: float) -> Estimate | None:
    """Of the same rows; None where there is nothing to pair, or rows go together in other ways."""
    if not columns or columns[0] is None or columns[1] is None or columns[0].units != columns[1].units:
        return None
    return paired_difference(columns[0].values, columns[1].values, groups=columns[0].units, level=level)
