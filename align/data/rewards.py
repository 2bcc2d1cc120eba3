"""Data of reward models: pairs and rated answers, held to a length by the rule of the model that will read them.

Pairs are those of ``pairs``. Beside them may stand ``margin`` (of ``margin_bradley_terry``), ``strength`` (of
``scaled_bradley_terry``) and ``preference``, where 0.5 is a tie: half a vote for either answer. Where a judge has
scored both answers (``chosen_NAME``, ``rejected_NAME``), the gap can take the place of both: it is the margin, and
over the largest gap of the source it is the strength. Equal scores are ties, which give no pair and are counted.

Rated answers are rows ``prompt, completion`` (or ``prompt, response``, as HelpSteer2 has it) with one column an
attribute (``helpfulness: 3``); what is missing or null was not rated. Pairs with ``chosen_NAME`` and ``rejected_NAME``
for their attributes are two such rows each.

A reward is read at the end token, so an answer that is cut keeps it: its first tokens, then the end token.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.errors import AlignError

from .columns import dataset_of
from .fields import FieldError, answer_field, check_size, collecting, content, required, resolve
from .load import Row, read_rows, usable
from .pairs import compared, pair_table
from .report import describe
from .rows import CompletionRow, CompletionTable, Content, Fault, PairRow, PairTable, bad_rows, row_id
from .tokenize import (
    TokenizedCompletion,
    TokenizedCompletions,
    TokenizedPair,
    TokenizedPairs,
    tokenize_completions,
    tokenize_pairs,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

OverLong = Literal["cut", "set_aside"]
UNRATED = -100.0  # as align.losses.preference.MASKED
_NUMBERS_OF_TEXT = (".csv", ".csv.gz")  # cells are text


@dataclass(frozen=True)
class RewardRules:
    """How a recipe reads its data for a reward model.

    Args:
        attributes: columns of ratings; none: the rows are pairs.
        gap_of: the judge whose scores of both answers give margin and strength.
        needs_margin: a pair without one cannot be used.
        over_long: an answer over the limit is cut, or its row is set aside.
    """

    attributes: tuple[str, ...] = ()
    gap_of: str | None = None
    needs_margin: bool = False
    over_long: OverLong = "cut"


@dataclass(frozen=True)
class RatedRow(CompletionRow):
    """One answer with its ratings, in the order of the attributes; None where nobody rated. Part of ``row_id``."""

    ratings: tuple[float | None, ...]


@dataclass
class RatedTable(CompletionTable):
    """The rated answers of one source.

    Attributes:
        counts: ``rows`` (read), ``completions``, ``set_aside`` (rows), the kinds of rows (``rated``, ``unpaired``),
            ``duplicates`` (the same answer with the same ratings again) and ``rated_NAME`` (answers with a rating of
            that attribute).
    """

    rows: list[RatedRow]  # type: ignore[assignment]


@dataclass(frozen=True)
class TokenizedRated(TokenizedCompletion):
    """Token ids of a rated answer."""

    ratings: tuple[float | None, ...]


@dataclass
class TokenizedRatings(TokenizedCompletions):
    """Rated answers as token ids; counts as in ``TokenizedCompletions``."""

    rows: list[TokenizedRated]  # type: ignore[assignment]

    def dataset(self) -> Dataset:
        """Columns prompt_ids, completion_ids, ratings (-100 where there is none), row_id."""
        columns: dict[str, list[Any]] = {
            name: [getattr(row, name) for row in self.rows] for name in ("prompt_ids", "completion_ids", "row_id")
        }
        columns["ratings"] = [[UNRATED if value is None else value for value in row.ratings] for row in self.rows]
        return dataset_of(columns)


# --- pairs --------------------------------------------------------------------------------------------------------


def read_reward_pairs(source: str, rules: RewardRules) -> PairTable:
    """Read and validate every pair of ``source`` once.

    Raises:
        AlignError: the source is missing, empty or unreadable as a whole. A bad row raises nothing: it is a Fault.
    """
    return reward_pairs(read_rows(source), source, rules)


def reward_pairs(rows: Iterable[Row], source: str, rules: RewardRules) -> PairTable:
    """The pairs in ``(file, row number, fields)`` triples, with the margins and strengths of ``rules``."""
    ties: list[int] = []
    table = pair_table(rows if rules.gap_of is None else _with_gaps(rows, rules.gap_of, ties), source)
    if rules.gap_of is not None:
        table.counts["rows"] += len(ties)
        table.counts["ties"] += len(ties)
        most = max((row.margin or 0.0 for row in table.rows), default=0.0)
        table.rows = [replace(row, strength=(row.margin or 0.0) / most) for row in table.rows]
    if rules.needs_margin:
        without = [row for row in table.rows if row.margin is None]
        reason = "missing: by how much is chosen to be better? Name reward.gap_of, or add the column"
        table.faults += [
            Fault(row.source, row.row, "margin", reason, {"prompt": row.prompt, "chosen": row.chosen})
            for row in without
        ]
        table.rows = [row for row in table.rows if row.margin is not None]
        table.counts["pairs"], table.counts["set_aside"] = len(table.rows), bad_rows(table.faults)
    return table


def _with_gaps(rows: Iterable[Row], name: str, ties: list[int]) -> Iterator[Row]:
    """Rows with ``margin``, the difference of both answers' scores; numbers of ties go to ``ties``."""
    columns = (f"chosen_{name}", f"rejected_{name}")
    for file, number, row in rows:
        if isinstance(row, Fault):
            yield file, number, row
            continue
        try:
            chosen, rejected = (_number(column, required(column, row, ", ".join(columns)), file) for column in columns)
            if chosen < rejected:
                raise FieldError(
                    columns[0], f"{chosen:g}, below {columns[1]} {rejected:g}: chosen is the better answer"
                )
        except FieldError as problem:
            yield file, number, Fault(file, number, problem.field, problem.reason, row)
            continue
        if chosen == rejected:
            ties.append(number)
            continue
        kept = {key: value for key, value in row.items() if key not in (*columns, "strength", "margin")}
        yield file, number, {**kept, "margin": chosen - rejected}


def tokenize_reward_pairs(
    rows: Sequence[PairRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    over_long: OverLong = "cut",
    *,
    cache: Path | None = None,
) -> TokenizedPairs:
    """Token ids of every pair, every answer with its end token.

    Raises:
        AlignError: the tokenizer has no end token, or no chat template for rows of messages.
    """
    done = tokenize_pairs(rows, tokenizer, None, cache=cache)
    hold = _Limit(tokenizer, max_length, over_long, done.counts)
    kept: list[TokenizedPair] = []
    for row, pair in _matched(rows, done.rows):
        try:
            answers = hold(pair.prompt_ids, {"chosen": pair.chosen_ids, "rejected": pair.rejected_ids})
        except FieldError as problem:
            shown = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
            done.faults.append(Fault(row.source, row.row, problem.field, problem.reason, shown))
            continue
        kept.append(replace(pair, chosen_ids=answers["chosen"], rejected_ids=answers["rejected"]))
    done.counts |= {"pairs": len(kept), "set_aside": len(done.faults)}
    return TokenizedPairs(kept, done.faults, done.counts)


# --- ratings ------------------------------------------------------------------------------------------------------


def read_ratings(source: str, attributes: Sequence[str]) -> RatedTable:
    """Read and validate every rated answer of ``source`` once.

    Raises:
        AlignError: the source is missing, empty or unreadable as a whole. A bad row raises nothing: it is a Fault.
    """
    return rating_table(read_rows(source), source, attributes)


def rating_table(rows: Iterable[Row], source: str, attributes: Sequence[str]) -> RatedTable:
    """The rated answers in ``(file, row number, fields)`` triples.

    Raises:
        AlignError: no attribute is named.
    """
    if not attributes:
        raise AlignError(f"{source}: no attributes are named, so no column is a rating; set reward.attributes")
    counts = dict.fromkeys(("rows", "completions", "set_aside", "rated", "unpaired", "duplicates"), 0)
    table = RatedTable([], [], counts, source)
    unused: Counter[str] = Counter()
    for file, number, row in usable(rows, table):
        problems: list[FieldError] = []
        paired = "completion" not in row and {"chosen", "rejected"} <= row.keys()
        found = list((_unpaired if paired else _rated)(row, file, attributes, problems))
        table.faults += [Fault(file, number, problem.field, problem.reason, row) for problem in problems]
        if problems:
            continue
        counts["unpaired" if paired else "rated"] += 1
        names = [f"{side}_{name}" for side in ("chosen", "rejected") for name in attributes] if paired else attributes
        unused.update(row.keys() - {"prompt", answer_field(row), "chosen", "rejected", *names})
        for prompt, answer, ratings in found:
            identity = row_id(prompt, answer, json.dumps(ratings))
            table.rows.append(RatedRow(identity, file, number, prompt, answer, ratings))
    counts["completions"] = len(table.rows)
    counts["set_aside"] = bad_rows(table.faults)
    counts["duplicates"] = len(table.rows) - len({row.row_id for row in table.rows})
    for place, name in enumerate(attributes):
        counts[f"rated_{name}"] = sum(row.ratings[place] is not None for row in table.rows)
    table.unused = dict(unused)
    return table


Rated = tuple[Content, Content, tuple[float | None, ...]]


def _rated(row: dict[str, Any], file: str, attributes: Sequence[str], problems: list[FieldError]) -> Iterator[Rated]:
    wanted = f"prompt, completion, {', '.join(attributes)}"
    name = answer_field(row)
    prompt: Content = ""
    answer: Content = ""
    with collecting(problems):
        prompt = content("prompt", required("prompt", row, wanted))
    with collecting(problems):
        answer = content(name, required(name, row, wanted))
    ratings = _ratings(row, file, attributes, problems)
    if problems:
        return
    with collecting(problems):
        prompt, answers = resolve(prompt, {name: answer})
        yield prompt, answers[name], ratings


def _unpaired(
    row: dict[str, Any], file: str, attributes: Sequence[str], problems: list[FieldError]
) -> Iterator[Rated]:
    pairs = compared(row, problems)
    ratings = {
        side: _ratings(row, file, [f"{side}_{name}" for name in attributes], problems)
        for side in ("chosen", "rejected")
    }
    if not problems:
        for pair in pairs:
            yield pair.prompt, pair.chosen, ratings["chosen"]
            yield pair.prompt, pair.rejected, ratings["rejected"]


def _ratings(
    row: Mapping[str, Any], file: str, columns: Sequence[str], problems: list[FieldError]
) -> tuple[float | None, ...]:
    found: list[float | None] = []
    for column in columns:
        value = row.get(column)
        with collecting(problems):
            found.append(None if value is None or value == "" else _number(column, value, file))
    if not problems and all(value is None for value in found):
        has = ", ".join(map(str, row))
        problems.append(FieldError(columns[0], f"no rating of {', '.join(columns)}: the row has {has}"))
    return tuple(found)


def _number(column: str, value: Any, file: str) -> float:
    if isinstance(value, str) and file.lower().endswith(_NUMBERS_OF_TEXT):
        try:
            value = float(value)
        except ValueError:
            raise FieldError(column, f"{value!r} is not a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FieldError(column, f"{value!r} is not a finite number")
    if value == UNRATED:
        raise FieldError(column, f"{UNRATED:g} stands for no rating in the loss: leave the field out, or null")
    return check_size(column, float(value))


def tokenize_ratings(
    rows: Sequence[RatedRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    over_long: OverLong = "cut",
    *,
    cache: Path | None = None,
) -> TokenizedRatings:
    """Token ids of every rated answer, with its end token.

    Raises:
        AlignError: the tokenizer has no end token, or no chat template for rows of messages.
    """
    done = tokenize_completions(rows, tokenizer, None, cache=cache)
    hold = _Limit(tokenizer, max_length, over_long, done.counts)
    kept: list[TokenizedRated] = []
    for row, found in _matched(rows, done.rows):
        prompt = found.prompt_ids
        try:
            ids = hold(prompt, {"completion": found.completion_ids})["completion"]
        except FieldError as problem:
            shown = {"prompt": row.prompt, "completion": row.completion}
            done.faults.append(Fault(row.source, row.row, problem.field, problem.reason, shown))
            continue
        kept.append(TokenizedRated([*prompt, *ids], [0] * len(prompt) + [1] * len(ids), row.row_id, row.ratings))
    done.counts |= {"completions": len(kept), "set_aside": len(done.faults)}
    return TokenizedRatings(kept, done.faults, done.counts)


# --- length -------------------------------------------------------------------------------------------------------


class _Limit:
    """Answers to a prompt held to ``max_length`` with it; counts what it does."""

    def __init__(self, tokenizer: Any, max_length: int | None, over_long: OverLong, counts: dict[str, int]) -> None:
        self.eos = int(tokenizer.eos_token_id)
        self.max_length, self.over_long, self.counts = max_length, over_long, counts
        counts["over_long"] = 0

    def __call__(self, prompt: Sequence[int], answers: Mapping[str, list[int]]) -> dict[str, list[int]]:
        if self.max_length is None:
            return dict(answers)
        if len(prompt) + 2 > self.max_length:
            reason = (
                f"{len(prompt):,} tokens, which leave no room for an answer in data.max_length {self.max_length:,}: "
                "raise it or shorten the prompt"
            )
            raise FieldError("prompt", reason)
        room = self.max_length - len(prompt)
        over = [name for name, ids in answers.items() if len(ids) > room]
        if over:
            self.counts["over_long"] += 1
        if over and self.over_long == "set_aside":
            tokens = len(prompt) + len(answers[over[0]])
            raise FieldError(over[0], f"{tokens:,} tokens with its prompt, over data.max_length {self.max_length:,}")
        cut = {name: [*ids[: room - 1], self.eos] if name in over else ids for name, ids in answers.items()}
        if "rejected" in cut and cut["chosen"] == cut["rejected"]:
            raise FieldError("chosen", f"equal to rejected in the {room:,} tokens that data.max_length leaves")
        for name in over:
            self.counts[f"truncated_{name}"] += 1
        return cut


def _matched(rows: Sequence[Any], tokenized: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Each tokenised row with the row that it came from: the same order, some left out."""
    source = iter(rows)
    for found in tokenized:
        yield next(row for row in source if row.row_id == found.row_id), found


def describe_ratings(
    table: RatedTable, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None
) -> str:
    """The picture of ``report.describe`` with the ratings in it."""
    first, _, rest = describe(table, tokenizer, max_length).partition("\n")
    kinds = f"{table.counts['rated']:,} rated rows · {table.counts['unpaired']:,} rated pairs"
    lines = [f"  {'kinds of rows':<15} {kinds}"]
    names = [key.removeprefix("rated_") for key in table.counts if key.startswith("rated_")]
    for place, name in enumerate(names):
        values = sorted(value for row in table.rows if (value := row.ratings[place]) is not None)
        spread = f": {values[0]:.3g} to {values[-1]:.3g}, mean {sum(values) / len(values):.3g}" if values else ""
        lines.append(f"  {name[:15]:<15} {len(values):,} ratings{spread}")
    lines += [line for line in rest.split("\n") if not line.startswith("  kinds of rows")]
    return "\n".join([first, *lines])
