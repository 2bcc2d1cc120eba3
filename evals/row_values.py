"""What each metric of a result is the mean of, from the result's rows: so that two results can be compared row by row.

``column(suite, metric, result)`` gives the values and which of them go together (rows of one prompt, judgements of one
annotator); None where the rows do not hold them, as of an area, an extreme, or a ratio of sums. That these are the
metric's values is seen from its own mean and n: what does not have them is None as well.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = Mapping[str, Any]
Values = Sequence[float | bool]
Rule = Callable[[Row], float | bool | Values | None]
GROUP = "group"
"""Key of a row: the number of what it goes together with, where it is not independent of others."""
_ABOUT = ("annotator", "part", "n")
"""Keys of a row of ``align.evals.pal`` that are no model."""


@dataclass(frozen=True)
class Column:
    """Values of a metric.

    Attributes:
        values: in the order of the rows.
        units: of each value, what it goes together with.
    """

    values: list[float]
    units: list[Hashable]


def column(suite: str, metric: str, result: Row) -> Column | None:
    """The values whose mean a metric is; None where the rows do not hold them.

    Args:
        suite: its name.
        metric: name.
        result: of one model: metrics, rows, settings.
    """
    try:
        found = _column(suite, metric, result)
    except (KeyError, TypeError):
        return None
    entry = result["metrics"][metric]
    if found is None or len(set(found.units)) != entry["n"]:
        return None
    return found if np.isclose(np.mean(found.values), entry["value"], rtol=1e-6, atol=1e-9) else None


def row_key(row: Row) -> Hashable | None:
    """By which a row is known in another result; None where it has no name."""
    if "row_ids" in row:
        return tuple(row["row_ids"])
    named: Hashable = row.get("row_id", row.get("prompt"))
    return named if named is not None or "annotator" not in row else (row["annotator"], row.get("part"))


def _column(suite: str, metric: str, result: Row) -> Column | None:
    rows: Sequence[Row] = result.get("rows", [])
    if suite == "pluralism" and metric == "macro":
        people: dict[str, list[float]] = {}
        for row in rows:
            people.setdefault(row["annotator"], []).append(row["right"])
        return Column([float(np.mean(own)) for own in people.values()], list(people))
    rule = _rule(suite, metric, result)
    values: list[float] = []
    units: list[Hashable] = []
    for number, row in enumerate(rows):
        given = rule(row)
        if given is not None:
            several = given if isinstance(given, Sequence) else [given]
            values += map(float, several)
            units += [_unit(suite, row, number)] * len(several)
    if suite == "pluralism" and len(set(units)) == 1:  # a group of one annotator, whose judgements are drawn
        units = list(range(len(values)))
    return Column(values, units) if values else None


def _unit(suite: str, row: Row, number: int) -> Hashable:
    unit: Hashable = row["annotator"] if suite in ("pluralism", "pal") else row.get(GROUP, number)
    return unit


def _rule(suite: str, metric: str, result: Row) -> Rule:
    if suite == "pal":
        return _of_people(metric, result)
    if suite == "cycles":
        return _of_circle(metric)
    if suite == "thumbs" and metric == "accuracy":
        threshold = result["settings"]["threshold"]
        return lambda row: _right(row["reward"] - threshold, float(row["up"]))
    if suite == "goals":
        return _of_goal(metric)
    name, _, part = metric.partition("/")
    own = _RULES.get(suite, {}).get(name)
    if part and suite in ("preference", "pluralism"):
        where, rule = "subset" if suite == "preference" else "part", own or _RULES["preference"][name]
        return lambda row: rule(row) if row[where] == part else None
    # Of tasks (TASK.METRIC) each row has its own.
    return own or (lambda row: None if "." in metric and metric not in row else row[metric])


def _of_people(metric: str, result: Row) -> Rule:
    """``PART/accuracy/MODEL`` over judgements, ``PART/macro/MODEL`` over people, ``PART/gain/MODEL/OTHER``."""
    part, what, names = metric.split("/", 2)
    models = {key for row in result["rows"] for key in row if key not in _ABOUT}
    if what == "gain":
        one, other = next((a, b) for a in models for b in models if f"{a}/{b}" == names)
        return lambda row: [row[one] - row[other]] * row["n"] if row["part"] == part else None
    if names not in models:
        raise KeyError(names)
    return lambda row: None if row["part"] != part else row[names] if what == "macro" else [row[names]] * row["n"]


def _of_circle(metric: str) -> Rule:
    """Over the pairs of a circle, or of circles of one length: ``accuracy``, ``ties_4``, ``whole``."""
    name, _, length = metric.partition("_")
    values: Callable[[Sequence[float]], Values] = {
        "accuracy": lambda scores: [_right(score, 1.0) for score in scores],
        "ties": lambda scores: [score == 0 for score in scores],
        "whole": lambda scores: [all(score > 0 for score in scores)],
    }[name]
    return lambda row: values(row["scores"]) if length in ("", str(len(row["scores"]))) else None


def _of_goal(metric: str) -> Rule:
    """``NAME_before``, ``NAME_after``, ``NAME_change``; ``good_NAME_after``; ``length_after``; the KL."""
    if metric == "kl_to_reference":
        return lambda row: row["kl"]
    name, _, when = metric.rpartition("_")

    def value(side: Row) -> float | None:
        if name in side["rewards"]:
            found: float | None = side["rewards"][name]
            return found
        return float(side["tokens"]) if name == "length" else side["good"].get(name.removeprefix("good_"))

    def change(row: Row) -> float | None:
        ends = [value(row[side]) for side in ("before", "after")]
        return None if ends[0] is None or ends[1] is None else ends[1] - ends[0]

    return change if when == "change" else lambda row: value(row[when])


def _score(row: Row) -> float:
    score: float = row["score"] if "score" in row else row["chosen_reward"] - row["rejected_reward"]
    return score


def _label(row: Row) -> float:
    label: float | None = row.get("preference", 1.0)
    return 1.0 if label is None else label


def _right(score: float, label: float) -> float:
    """1 where the score prefers what the label does, 1/2 where either prefers none, else 0."""
    return float(0.5 + np.sign(score) * np.sign(label - 0.5) / 2)


def _accuracy(row: Row) -> float | None:
    return None if _label(row) == 0.5 else _right(_score(row), _label(row))


def _margin(row: Row) -> float | None:
    return None if _label(row) == 0.5 else float(_score(row) * np.sign(_label(row) - 0.5))


def _log_loss(row: Row) -> float:
    score, label = _score(row), _label(row)
    return float(label * np.logaddexp(0, -score) + (1 - label) * np.logaddexp(0, score))


def _brier(row: Row) -> float:
    p, label = 1 / (1 + np.exp(-_score(row))), _label(row)
    return float(label * (1 - p) ** 2 + (1 - label) * p**2)


def _confidence(row: Row) -> float:
    return float(1 / (1 + np.exp(-abs(_score(row)))))


def _stated_right(row: Row) -> float:
    """The probability, by the label, that the answer which the score prefers is the preferred one."""
    score, label = _score(row), _label(row)
    return label if score > 0 else 1 - label if score < 0 else 0.5


def _verdict(p: float) -> float:
    return (float(np.sign(p - 0.5)) + 1) / 2


def _won(row: Row) -> float | None:
    if "before" in row:
        return _right(row["after"]["reward"] - row["before"]["reward"], 1.0)
    preference: float | None = row["preference"]
    return preference


def _of_side(when: str, of: Callable[[Row], float | bool]) -> Rule:
    return lambda row: of(row[when])


_PAIRS: dict[str, Rule] = {
    "accuracy": _accuracy,
    "margin": _margin,
    "ties": lambda row: _score(row) == 0,
    "label_ties": lambda row: _label(row) == 0.5,
    "log_loss": _log_loss,
    "rewardbench": lambda row: row["score"] > 0,
}
_SIDES: dict[str, Rule] = {
    f"{name}_{when}": _of_side(when, of)
    for when in ("before", "after")
    for name, of in {
        "reward": lambda side: side["reward"],
        "length": lambda side: side["tokens"],
        "unfinished": lambda side: not side["finished"],
        "repetition": lambda side: side["repetition"],
    }.items()
}
_RULES: dict[str, dict[str, Rule]] = {
    "preference": _PAIRS,
    "reward": _PAIRS,
    "thumbs": {
        "reward_up": lambda row: row["reward"] if row["up"] else None,
        "reward_down": lambda row: None if row["up"] else row["reward"],
    },
    "calibration": {
        "brier": _brier,
        "log_loss": _log_loss,
        "confidence": _confidence,
        "right": _stated_right,
        "overconfidence": lambda row: _confidence(row) - _stated_right(row),
    },
    "judges": {
        "agreement": lambda row: None if row["label"] == 0.5 else _right(row["preference"] - 0.5, row["label"]),
        "ties": lambda row: row["preference"] == 0.5,
        "inconsistent": lambda row: _verdict(row["chosen_first"]) != _verdict(row["rejected_first"]),
        "first_preferred": lambda row: (_verdict(row["chosen_first"]) + 1 - _verdict(row["rejected_first"])) / 2,
    },
    "displacement": {
        "chosen_delta_per_token": lambda row: row["chosen_delta"] / row["chosen_tokens"],
        "rejected_delta_per_token": lambda row: row["rejected_delta"] / row["rejected_tokens"],
        "frac_chosen_down": lambda row: row["chosen_delta"] < 0,
    },
    "generation": {
        **_SIDES,
        "win_rate": _won,
        "ties": lambda row: None if _won(row) is None else _won(row) == 0.5,
        "set_aside": lambda row: row["preference"] is None,
        "reward_change": lambda row: (
            row["reward_change"] if "reward_change" in row else row["after"]["reward"] - row["before"]["reward"]
        ),
        "length": lambda row: row["tokens"],
        "unfinished": lambda row: not row["finished"],
        "kl_to_reference": lambda row: row["kl"],
    },
    "frontier": {"kl_to_reference": lambda row: row["kl"]},
    "pluralism": {"accuracy": lambda row: row["right"]},
    "resampling": {
        "accuracy": lambda row: row["correct"] / row["samples"],
        "never_passed": lambda row: row["passed_correct"] + row["passed_wrong"] == 0,
    },
}
"""Metrics that rows hold in another form than under the metric's own name."""
