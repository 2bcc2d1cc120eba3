"""Annotators (``align.rewards.annotators``) asked about pairs, some of them in either order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from align.data.rewards import tokenize_reward_pairs
from align.data.rows import Fault
from align.errors import AlignError, ConfigError
from align.rewards.annotator_kinds import CompareAnnotator, ModelAnnotator, PalAnnotator
from align.rewards.annotators import Annotator, AnnotatorError, ParsedAnnotator, parse_annotator
from align.rewards.expression import ExpressionError
from align.rewards.judge import Judge
from align.rewards.scorers import RewardError, asked_columns
from align.rewards.verdicts import MOST_LOG_ODDS
from align.tracking.progress import progress

from .asked import Asked
from .margins import Margins, places_of
from .pairs import Pairs

PART = 64


@dataclass(frozen=True)
class Annotated:
    """An annotator that is loaded.

    Attributes:
        name: what it is called in results.
        annotator: it.
        given: what was said of it.
        asked, every: columns of the data that it asks for, and whether it reads all of them.
    """

    name: str
    annotator: Annotator
    given: Any
    asked: tuple[str, ...]
    every: bool

    @property
    def sees_order(self) -> bool:
        """Whether it is asked for an answer that stands first and one that stands second."""
        return isinstance(self.annotator, Judge | CompareAnnotator)

    @property
    def what(self) -> str:
        """It, in words."""
        return f"annotator {json.dumps(self.given)}"


@dataclass(frozen=True)
class Verdicts:
    """What an annotator says of pairs, as probabilities that the chosen answer is preferred.

    Attributes:
        places: numbers of the pairs that it judged, M.
        preference: (M,), float64.
        scores: log-odds, held to +-10 where they are made of probabilities, (M,).
        chosen_first, rejected_first: of one that sees an order, its verdict with that answer first, (M,).
        faults: why it did not judge the others.
    """

    places: list[int]
    preference: Tensor
    scores: Tensor
    chosen_first: Tensor | None
    rejected_first: Tensor | None
    faults: list[Fault]


def check_names(models: Sequence[str], annotators: Mapping[str, Any]) -> None:
    """Stop where a model and an annotator have one name.

    Raises:
        ConfigError: which.
    """
    both = [name for name in annotators if name in models]
    if both:
        raise ConfigError("align eval", [(f"annotators.{both[0]}", "is the name of a model too: choose another")])


def load_annotators(given: Mapping[str, Any], asked: Asked) -> list[Annotated]:
    """The annotators, loaded once all of them were read.

    A judge behind a server that has no ``cache`` gets one beside the result, so that an interrupted command does not
    ask again.

    Raises:
        ConfigError: what is wrong in one, and where.
    """
    kept = str(asked.output.with_suffix(".judged.sqlite"))
    parsed: dict[str, tuple[ParsedAnnotator, Any]] = {}
    problems = []
    for name, one in given.items():
        if isinstance(one, Mapping) and isinstance(one.get("judge"), Mapping) and not one["judge"].get("cache"):
            one = {**one, "judge": {**one["judge"], "cache": kept}}
        try:
            found = parse_annotator(one)
            asked_columns(found.rules)
        except ExpressionError as error:
            problems.append((f"annotators.{name}.{error.where}".rstrip("."), error.problem))
            continue
        parsed[name] = found, one
    if problems:
        raise ConfigError("align eval", problems)
    loaded = []
    for name, (found, one) in parsed.items():
        columns, every = asked_columns(found.rules)
        try:
            annotator = found.load()
        except ExpressionError as error:
            where = f"annotators.{name}.{error.where}".rstrip(".")
            raise ConfigError("align eval", [(where, error.problem)]) from error
        loaded.append(Annotated(name, annotator, one, (*columns, *found.data_columns), every))
    return loaded


def judged(one: Annotated, pairs: Pairs) -> Verdicts:
    """Its verdicts on pairs; one that sees an order is asked in both.

    Raises:
        AlignError: it fails.
    """
    rows, orders = pairs.rows, 2 if one.sees_order else 1
    found = torch.full((orders, len(rows)), torch.nan, dtype=torch.float64)
    scores = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    reasons = _unreadable(one, pairs)
    asker = replace(one.annotator, both_orders=False) if isinstance(one.annotator, Judge | CompareAnnotator) else None
    names = [name for name in pairs.columns if (one.every or name in one.asked) and name not in _PAIR]
    failed = False
    with progress(f"{one.name} judges", len(rows)) as advance:
        for start in range(0, len(rows), PART):
            part = range(start, min(start + PART, len(rows)))
            left = [row for row in part if row not in reasons]
            while left:
                prompts = [rows[row].prompt for row in left]
                answers = [[rows[row].chosen, rows[row].rejected] for row in left]
                columns = {name: [pairs.raw[row].get(name) for row in left] for name in names}
                try:
                    if asker is None:
                        verdicts = one.annotator(prompts, answers, columns)
                        scores[left] = verdicts.scores[:, 0, 1]
                    else:  # both orders in one call, so that a server is asked for them at once
                        verdicts = asker(prompts * 2, answers + [group[::-1] for group in answers])
                except AnnotatorError as error:
                    if isinstance(error.__cause__, RewardError) or isinstance(asker, CompareAnnotator):
                        # A rule or a function that fails is code to mend, whatever the row.
                        row = None if error.prompt is None else rows[left[error.prompt % len(left)]]
                        where = "" if row is None else f"{row.source}, row {row.row}: "
                        raise AlignError(f"annotators.{one.name}: {where}{error.problem}") from error
                    if error.prompt is not None:  # such as one that is too long: the others are asked again
                        reasons[left.pop(error.prompt % len(left))] = error.problem
                        continue
                    # A judge that said nothing of use of a whole part; of the first one, or twice, it never will.
                    if failed or start == 0 or asker is None:
                        raise AlignError(f"annotators.{one.name}: {error}") from error
                    failed = True
                    reasons |= dict.fromkeys(left, error.problem)
                    break
                failed = False
                found[:, left] = verdicts.preference[:, 0, 1].view(orders, -1)
                reasons |= {left[problem.prompt % len(left)]: problem.reason for problem in verdicts.problems}
                break
            advance(len(part))
    places = [row for row in range(len(rows)) if row not in reasons]
    faults = [
        Fault(rows[row].source, rows[row].row, one.name, f"not judged: {reason}", pairs.raw[row])
        for row, reason in sorted(reasons.items())
    ]
    found = found[:, places]
    if asker is None:
        return Verdicts(places, found[0], scores[places], None, None, faults)
    there, back = found[0], 1 - found[1]
    preference = (there + back) / 2
    odds = torch.logit(preference).clamp(-MOST_LOG_ODDS, MOST_LOG_ODDS)
    return Verdicts(places, preference, odds, there, back, faults)


def margins_of(one: Annotated, pairs: Pairs) -> Margins:
    """Its verdicts as log-odds.

    Raises:
        AlignError: it fails.
    """
    found = judged(one, pairs)
    return Margins(found.places, found.scores, None, one.what, found.faults)


def _unreadable(one: Annotated, pairs: Pairs) -> dict[int, str]:
    """Pairs that a reward model cannot read, as their tokens say, and why."""
    annotator, rows = one.annotator, pairs.rows
    if not isinstance(annotator, ModelAnnotator | PalAnnotator):
        return {}
    model = annotator.model if isinstance(annotator, PalAnnotator) else annotator.scorer.model
    config = model.config
    tokenized = tokenize_reward_pairs(
        rows, model.tokenizer, config.max_length, "cut" if config.over_long == "cut" else "set_aside"
    )
    why = {(fault.source, fault.row): fault.reason for fault in tokenized.faults}
    read = set(places_of(rows, tokenized.rows))
    return {place: why[row.source, row.row] for place, row in enumerate(rows) if place not in read}


_PAIR = ("prompt", "chosen", "rejected")
