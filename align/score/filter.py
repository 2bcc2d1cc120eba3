"""Which rows of a data set stay, by their scores: ``align filter``, and ``data.filter`` of a recipe.

A rule looks at one column and at all rows; a row stays where every rule keeps it. Every row that goes has its reason.
What training would refuse, or what has no score, is set aside as a ``Fault``, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.config.schema import FilterRule
from align.data.fields import FieldError
from align.data.load import Row
from align.data.rows import Fault
from align.errors import AlignError
from align.rewards.encoding import plain

from .rows import ONE_TOKEN, ScoreRow, score_row
from .select import finite_number, group_name, places, rule_words, standing

Rules = Mapping[str, FilterRule]
"""Rules by column."""
EQUAL = "equal to rejected"
"""The reason of ``align.data`` for a pair whose answers are the same."""
SHORT, ONE_WORD = "one-token answers", "one-word answers"
NO_LABELS = ("row_id", "prompt", "chosen", "rejected", "completion", "text")
LABEL = 40
"""Longest label, characters."""


@dataclass(frozen=True)
class Candidate:
    """A row that a filter judges.

    Attributes:
        source, row: where it stands.
        row_id: hash of its content.
        scores: by column of the rules.
        labels: text in other columns, such as a language or a task; the columns that rules group by are among them.
        lengths: of each answer field, in the unit of the table; of several answers their sum.
        short: ``one-token answers`` (align score writes a column ``one_token``) or ``one-word answers``; else empty.
    """

    source: str
    row: int
    row_id: str
    scores: Mapping[str, float]
    labels: Mapping[str, str]
    lengths: Mapping[str, int]
    short: str


@dataclass(frozen=True)
class Verdict:
    """What becomes of a row.

    Attributes:
        kept: whether it stays.
        reason: where it stands by every rule that drops it, or by every rule where none does.
        flags: what else to know of it: ``repeats row N``, and what ``Candidate.short`` says.
    """

    kept: bool
    reason: str
    flags: tuple[str, ...]


@dataclass
class Table:
    """The rows of a data set, before they are judged.

    Attributes:
        rows: how many were read.
        candidates: those that can be judged, in the order of the data.
        faults: why the others cannot.
        unit: of lengths.
    """

    rows: int = 0
    candidates: list[Candidate] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    unit: str = "characters"

    @property
    def identical(self) -> int:
        """Pairs whose two answers are the same; they are set aside."""
        return sum(fault.reason == EQUAL for fault in self.faults)


def read_table(rows: Iterable[Row], rules: Rules, missing: Callable[[str, Sequence[str]], str]) -> Table:
    """The candidates among ``(file, row, content)`` triples.

    Args:
        rows: as ``align.data.load.read_rows`` yields them.
        missing: of a column that no row has, and of all columns, what to do.

    Raises:
        AlignError: no row has the column of a rule, or no row can be judged.
    """
    table, seen, columns = Table(), set[str](), dict[str, None]()
    groups = {rule.group for rule in rules.values() if rule.group is not None}
    wanted = {*rules, *groups}
    for file, number, row in rows:
        table.rows += 1
        if isinstance(row, Fault):
            table.faults.append(row)
            continue
        columns |= dict.fromkeys(row)
        seen |= wanted & row.keys()
        problems: list[FieldError] = []
        found = _candidate(file, number, row, rules, groups, problems)
        table.faults += [Fault(file, number, problem.field, problem.reason, row) for problem in problems]
        if found is not None:
            table.candidates.append(found)
    for name in wanted - seen:
        raise AlignError(missing(name, list(columns)))
    if not table.candidates:
        first = table.faults[0]
        raise AlignError(
            f"{first.source}: no row can be judged; the first, row {first.row}: {first.field}: {first.reason}"
        )
    return table


def _candidate(
    file: str, number: int, row: dict[str, Any], rules: Rules, groups: Iterable[str], problems: list[FieldError]
) -> Candidate | None:
    found = score_row(row, problems)
    scores: dict[str, float] = {}
    for column in rules:
        try:
            scores[column] = finite_number(column, row.get(column))
        except FieldError as error:
            problems.append(error)
    if found is None or problems:
        return None
    lengths = {name: sum(len(plain(a, "assistant")) for a in several) for name, several in found.answers.items()}
    return Candidate(file, number, found.row_id, scores, labels_in(row, groups), lengths, _short_answer(row, found))


def _short_answer(row: Mapping[str, Any], found: ScoreRow) -> str:
    if isinstance(known := row.get(ONE_TOKEN), bool):
        return SHORT if known else ""
    return (
        ONE_WORD if found.each and all(len(plain(answer, "assistant").split()) == 1 for answer in found.each) else ""
    )


def labels_in(row: Mapping[str, Any], groups: Iterable[str]) -> dict[str, str]:
    """Short text in the row's columns, and the name of its group; rows without one are a group of their own."""
    labels = {name: value for name, value in row.items() if isinstance(value, str) and name not in NO_LABELS}
    labels = {name: value for name, value in labels.items() if len(value) <= LABEL}
    return labels | {name: group_name(row.get(name)) for name in groups}


def judge(candidates: Sequence[Candidate], rules: Rules) -> list[Verdict]:
    """A verdict for every candidate, in their order.

    Raises:
        AlignError: the rules keep no row, or a quota is for a group that is not there.
    """
    judged = {column: _judge(candidates, column, rule) for column, rule in rules.items()}
    first: dict[str, int] = {}
    verdicts = []
    for place, candidate in enumerate(candidates):
        against = [reason for kept, reason in (of[place] for of in judged.values()) if not kept]
        reasons = against or [of[place][1] for of in judged.values()]
        flags = [f"repeats row {first[candidate.row_id]:,}"] if candidate.row_id in first else []
        flags += [candidate.short] if candidate.short else []
        first.setdefault(candidate.row_id, candidate.row)
        verdicts.append(Verdict(not against, "; ".join(reasons), tuple(flags)))
    if not any(verdict.kept for verdict in verdicts):
        raise AlignError(f"no row of {len(candidates):,} is kept by {describe(rules)}: {_spread(candidates, rules)}")
    return verdicts


def _judge(candidates: Sequence[Candidate], column: str, rule: FilterRule) -> list[tuple[bool, str]]:
    groups = None if rule.group is None else [candidate.labels[rule.group] for candidate in candidates]
    return standing(column, [candidate.scores[column] for candidate in candidates], rule, groups)


def describe(rules: Rules) -> str:
    """All rules in words."""
    return " and ".join(f"{column}: {rule_words(rule)}" for column, rule in rules.items())


def _spread(candidates: Sequence[Candidate], rules: Rules) -> str:
    ranges = []
    for column in rules:
        scores = [candidate.scores[column] for candidate in candidates]
        ranges.append(f"{column} lies between {min(scores):g} and {max(scores):g}")
    return ", ".join(ranges)


def cuts(candidates: Sequence[Candidate], column: str, rule: FilterRule) -> list[float]:
    """The values between which rows stay, for a histogram; none where each group has its own."""
    if rule.below is not None or rule.above is not None:
        return [bound for bound in (rule.above, rule.below) if bound is not None]
    if rule.group is not None:
        return []
    scores = sorted(candidate.scores[column] for candidate in candidates)
    start, stop = places(len(scores), rule)
    ends = [(scores[start - 1] + scores[start]) / 2] if start else []
    return ends + ([(scores[stop - 1] + scores[stop]) / 2] if stop < len(scores) else [])


def contents(rows: Iterable[Row], candidates: Sequence[Candidate]) -> Iterator[dict[str, Any]]:
    """The rows behind the candidates, read again."""
    wanted = {(candidate.source, candidate.row) for candidate in candidates}
    return (row for file, number, row in rows if (file, number) in wanted and isinstance(row, dict))
