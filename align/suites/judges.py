"""How far annotators agree with people, and what else than the answers moves them: position, length.

Annotators are named on the command line where a name is enough (rules, reward models), or under ``annotators`` as in
recipes. People's labels are those of the pairs (``preference`` is the share of people who prefer the chosen answer),
or judgements with an ``annotator`` column, of which those on the same two answers are one pair; the votes then say how
far people agree among themselves too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import Field
from rich.text import Text

from align.config.section import Section
from align.data.rows import Fault, PairRow, bad_rows
from align.errors import AlignError, ConfigError
from align.evals.judges import BY_CONSTRUCTION, Judged, agreement, judge_suite, people_agree
from align.evals.result import compared_result
from align.evals.statistics import comparisons
from align.rewards.encoding import plain

from .annotated import Verdicts, check_names, judged, load_annotators
from .asked import Asked, tell_faults
from .pairs import Pairs, read_suite_pairs
from .shown import estimate, plain_table, printer, show_comparisons

WHO = "annotator"


class Settings(Section):
    """Keys of the suite."""

    annotators: dict[str, Any] = Field(default_factory=dict)
    """Annotators by name, as recipes have them (``align.rewards.annotators``), beside those named as models."""


@dataclass(frozen=True)
class Voted:
    """Pairs, each two answers to a prompt once, and what people said of them.

    Attributes:
        pairs: with the share of people who prefer the chosen answer.
        votes: of each pair what each person said, 1, 0 or 1/2; None where the data do not name people.
        sources: of each pair the rows of the data that it was made of.
    """

    pairs: Pairs
    votes: list[list[float]] | None
    sources: list[list[PairRow]]

    def faults(self, of: Sequence[Fault]) -> list[Fault]:
        """Faults of pairs, one for each of their rows."""
        place = {(row.source, row.row): number for number, row in enumerate(self.pairs.rows)}
        return [
            replace(fault, source=row.source, row=row.row)
            for fault in of
            for row in self.sources[place[fault.source, fault.row]]
        ]


def run(asked: Asked, settings: Settings) -> dict[str, Any]:
    """Each annotator against people.

    Args:
        asked: rules and reward models as annotators; pairs or judgements.
        settings: further annotators.

    Returns:
        ``compared_result`` of ``align.evals.judges``; comparisons of agreement on the pairs that all judged;
        ``people``: how often two people agree, where the data name them.

    Raises:
        ConfigError, AlignError: an annotator cannot be read, loaded or asked, or no pair can be used.
    """
    check_names(asked.models, settings.annotators)
    given = {**{name: name for name in asked.models}, **settings.annotators}
    if not given:
        what = "is missing: a rule, a reward model, or annotators={NAME: {judge: {...}}}"
        raise ConfigError("align eval", [("MODEL", what)])
    annotators = load_annotators(given, asked)
    voted = voted_of(read_suite_pairs(asked))
    pairs = voted.pairs
    labels = [1.0 if label is None else label for label in pairs.labels]
    if all(label == 0.5 for label in labels):
        raise AlignError(f"{asked.source}: people prefer none of any two answers: there is nothing to agree with")
    lengths = [[len(plain(answer, "assistant")) for answer in (row.chosen, row.rejected)] for row in pairs.rows]
    found = {one.name: judged(one, pairs) for one in annotators}
    faults = [*pairs.table.faults, *(fault for verdicts in found.values() for fault in voted.faults(verdicts.faults))]
    tell_faults(faults, pairs.table.counts["rows"], asked.rejected)
    pairs.table.counts["set_aside"] = bad_rows(faults)
    models = {}
    for one in annotators:
        verdicts = found[one.name]
        own = verdicts.places
        if not any(labels[place] != 0.5 for place in own):
            raise AlignError(f"annotators.{one.name}: it judged no pair on which people prefer an answer")
        models[one.name] = judge_suite(
            _judged(verdicts),
            [labels[place] for place in own],
            [lengths[place] for place in own],
            [pairs.ids[place] for place in own],
            groups=[pairs.groups[place] for place in own],
            unjudged=[pairs.groups[place] for place in range(len(pairs.rows)) if place not in set(own)],
            settings={"annotator": one.given},
        )
    people = None if voted.votes is None else people_agree(voted.votes, pairs.groups)
    kept = sorted(set.intersection(*(set(verdicts.places) for verdicts in found.values())))
    return compared_result(
        "judges",
        models,
        _comparisons(found, kept, labels, pairs.groups),
        pairs.facts(len(pairs.rows)),
        None,
        {**settings.model_dump(), "annotators": {one.name: one.given for one in annotators}, "length": "characters"},
        n=len(pairs.rows),
        people=None if people is None else people.as_dict(),
    )


def show(result: Mapping[str, Any]) -> None:
    """Print a line an annotator."""
    console = printer()
    console.print(f"{result['n']:,} pairs of {result['data']['source']}, judged by people")
    table = plain_table(
        "", "judged", "agreement", "kappa", "ties", "not judged", "inconsistent", "first preferred", "length bias"
    )
    for name, found in result["models"].items():
        metrics = found["metrics"]
        if "inconsistent" in metrics:
            position = [estimate(metrics[key], ".1%") for key in ("inconsistent", "first_preferred")]
        else:
            position = [BY_CONSTRUCTION, ""]
        bias = estimate(metrics["length_bias"], "+.1%") if "length_bias" in metrics else ""
        shares = (estimate(metrics["agreement"], ".1%"), estimate(metrics["kappa"], ".2f"))
        few = (f"{metrics[key]['value']:.1%}" for key in ("ties", "unjudged"))
        table.add_row(Text(name), f"{found['n']:,}", *shares, *few, *position, bias)
    console.print(table)
    if any(found["n"] != result["n"] for found in result["models"].values()):
        console.print("not all judged the same pairs: each line is of its own, the differences of those of all")
    if result["people"] is not None:
        console.print(f"two people say the same of {estimate(result['people'], '.1%')} of pairs, ties counted as such")
    show_comparisons(console, result["comparisons"], "+.1%")


def voted_of(pairs: Pairs) -> Voted:
    """Pairs with people's shares: of judgements (an ``annotator`` column) those on the same two answers are one."""
    if WHO not in pairs.columns:
        return Voted(pairs, None, [[row] for row in pairs.rows])
    first: dict[tuple[str, ...], int] = {}
    votes: dict[int, list[float]] = {}
    sources: dict[int, list[PairRow]] = {}
    for place, row in enumerate(pairs.rows):
        chosen, rejected = json.dumps(row.chosen), json.dumps(row.rejected)
        key = (json.dumps(row.prompt), *sorted((chosen, rejected)))
        at = first.setdefault(key, place)
        vote = 1.0 if row.preference is None else row.preference
        sources.setdefault(at, []).append(row)
        votes.setdefault(at, []).append(vote if json.dumps(pairs.rows[at].chosen) == chosen else 1 - vote)
    places = list(votes)
    rows: list[PairRow] = [
        replace(pairs.rows[place], preference=sum(votes[place]) / len(votes[place])) for place in places
    ]
    return Voted(replace(pairs.only(places), rows=rows), [votes[place] for place in places], list(sources.values()))


def _judged(verdicts: Verdicts) -> Judged:
    there, back = verdicts.chosen_first, verdicts.rejected_first
    return Judged(
        verdicts.preference.numpy(),
        None if there is None else there.numpy(),
        None if back is None else back.numpy(),
    )


def _comparisons(
    found: Mapping[str, Verdicts], kept: Sequence[int], labels: Sequence[float], groups: Sequence[str]
) -> list[dict[str, Any]]:
    kept = [place for place in kept if labels[place] != 0.5]
    if not kept or len(found) < 2:
        return []
    label = np.array([labels[place] for place in kept])
    values = {}
    for name, verdicts in found.items():
        index = {place: number for number, place in enumerate(verdicts.places)}
        said = verdicts.preference.numpy()[[index[place] for place in kept]]
        values[name] = {"agreement": agreement(said, label)[0]}
    return comparisons(values, against=next(iter(found)), groups=[groups[place] for place in kept])
