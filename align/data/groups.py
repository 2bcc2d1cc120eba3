"""K answers to each prompt with what they are worth, for regression on whole groups (``gpo``, ``sppo`` and their kin).

Rows are ``prompt, completions``, a list of K answers, with ``scores`` (mean log-odds of each answer against the
others) or ``win_rates`` (mean probability with which it beats them), a list of K numbers, as ``align score
--annotator`` writes them. All rows have the same K.

Where a row also has ``prompt_ids`` and ``completion_ids``, as ``align generate --n`` writes them, these are trained
on: what the model read and drew, so that an answer that was cut has no end token, and an empty one nothing else.
Without them answers are tokenised by the rules of ``tokenize``, and end in an end token.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .columns import dataset_of
from .encode import Encoder
from .fields import FieldError, check_size, collecting, content, required, resolve
from .kept import encoded
from .load import read_rows, usable
from .report import left_aside, spread
from .rows import CompletionRow, CompletionTable, Content, Fault, bad_rows, row_id
from .tokenize import TokenizedCompletion, TokenizedCompletions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Column = Literal["scores", "win_rates"]
_WANTED = "prompt, completions, and scores or win_rates"
_FIELDS = {"prompt", "completions", "scores", "win_rates", "prompt_ids", "completion_ids"}
Ids = list[list[int]]


@dataclass(frozen=True)
class GroupRules:
    """What a method reads of a group.

    Args:
        column: that its loss learns; each row must have it.
        use: all answers, or the two with the highest and the lowest value of ``column``, the first of equal ones.
    """

    column: Column
    use: Literal["all", "best_and_worst"] = "all"


@dataclass(frozen=True)
class GroupRow(CompletionRow):
    """K answers to a prompt; ``completion`` is empty, and numbers and ids are part of ``row_id``.

    Attributes:
        completions: K, in the prompt's form.
        scores, win_rates: K numbers; None where the data has none.
        ids: token ids of the prompt and of the K answers; None where the text is to be tokenised.
        compared: how many answers were compared: K, or more where these are the best and the worst of them.
    """

    completions: list[Content]
    scores: list[float] | None
    win_rates: list[float] | None
    ids: tuple[list[int], Ids] | None
    compared: int


@dataclass
class GroupTable(CompletionTable):
    """The groups of one source.

    Attributes:
        counts: ``rows`` (read), ``groups``, ``answers``, ``set_aside`` (rows), ``ties`` (prompts that are left out
            because the best answer is worth no more than the worst) and ``duplicates`` (the same group again).
    """

    rows: list[GroupRow]  # type: ignore[assignment]


@dataclass(frozen=True)
class TokenizedGroup(TokenizedCompletion):
    """Token ids of a prompt (``input_ids``) and of K answers, each with its numbers."""

    answer_ids: Ids
    scores: list[float] | None
    win_rates: list[float] | None
    compared: int


@dataclass
class TokenizedGroups(TokenizedCompletions):
    """Groups as token ids. ``counts``: ``groups``, ``set_aside``, ``truncated_completions`` (answers cut at
    max_length), ``boundary_moved`` and ``eos_inside`` as in ``TokenizedPairs``, ``as_drawn`` (groups with ids).
    """

    rows: list[TokenizedGroup]  # type: ignore[assignment]

    def dataset(self) -> Dataset:
        """Columns prompt_ids, answer_ids, row_id, compared, and scores and win_rates where the rows have them."""
        columns: dict[str, list[Any]] = {"prompt_ids": [row.input_ids for row in self.rows]}
        columns |= {name: [getattr(row, name) for row in self.rows] for name in ("answer_ids", "row_id", "compared")}
        for name in ("scores", "win_rates"):
            values = [getattr(row, name) for row in self.rows]
            if any(value is not None for value in values):
                columns[name] = values
        return dataset_of(columns)


def read_groups(source: str, rules: GroupRules) -> GroupTable:
    """Read and validate every row of ``source`` once (see ``load.read_rows`` for what a source may be).

    Raises:
        AlignError: the source is missing, empty or unreadable as a whole. A bad row raises nothing: it is a Fault.
    """
    counts = dict.fromkeys(("rows", "groups", "answers", "set_aside", "ties", "duplicates"), 0)
    table = GroupTable([], [], counts, source)
    unused: Counter[str] = Counter()
    size = 0
    for file, number, row in usable(read_rows(source), table):
        problems: list[FieldError] = []
        found = _group(file, number, row, rules, problems)
        size = size or (len(found.completions) if found else 0)
        if found and len(found.completions) != size:
            reason = f"{len(found.completions)} answers, and the rows before have {size}: give every prompt as many"
            problems.append(FieldError("completions", reason))
        unused.update(row.keys() - _FIELDS)
        table.faults += [Fault(file, number, problem.field, problem.reason, row) for problem in problems]
        if problems or found is None:
            continue
        if rules.use == "best_and_worst":
            values = getattr(found, rules.column)
            if max(values) == min(values):
                counts["ties"] += 1
                continue
            found = _only(found, [values.index(max(values)), values.index(min(values))])
        table.rows.append(found)
    counts["groups"] = len(table.rows)
    counts["answers"] = sum(len(row.completions) for row in table.rows)
    counts["set_aside"] = bad_rows(table.faults)
    counts["duplicates"] = len(table.rows) - len({row.row_id for row in table.rows})
    table.unused = dict(unused)
    return table


def _group(
    file: str, number: int, row: dict[str, Any], rules: GroupRules, problems: list[FieldError]
) -> GroupRow | None:
    prompt: Content = ""
    answers: list[Content] = []
    with collecting(problems):
        prompt = content("prompt", required("prompt", row, _WANTED))
    with collecting(problems):
        given = required("completions", row, _WANTED)
        if not isinstance(given, list) or len(given) < 2:
            raise FieldError("completions", "not a list of two answers or more")
        answers = [content(f"completions {place}", one) for place, one in enumerate(given, start=1)]
    if problems:
        return None
    numbers: dict[str, list[float] | None] = {}
    for name in ("scores", "win_rates"):
        numbers[name] = None
        if name == rules.column or row.get(name) is not None:
            with collecting(problems):
                numbers[name] = _numbers(name, required(name, row, _WANTED), len(answers))
    ids = None
    with collecting(problems):
        ids = _ids(row, len(answers))
        if ids is None:
            named = {f"completions {place}": one for place, one in enumerate(answers, start=1)}
            prompt, resolved = resolve(prompt, named)
            answers = list(resolved.values())
    if problems:
        return None
    return _row(file, number, prompt, answers, numbers["scores"], numbers["win_rates"], ids, len(answers))


def _row(
    file: str,
    number: int,
    prompt: Content,
    answers: list[Content],
    scores: list[float] | None,
    win_rates: list[float] | None,
    ids: tuple[list[int], Ids] | None,
    compared: int,
) -> GroupRow:
    name = row_id(prompt, *answers, json.dumps([scores, win_rates, ids]))
    return GroupRow(name, file, number, prompt, "", answers, scores, win_rates, ids, compared)


def _only(row: GroupRow, places: Sequence[int]) -> GroupRow:
    """The row with some of its answers."""
    scores = row.scores and [row.scores[place] for place in places]
    win_rates = row.win_rates and [row.win_rates[place] for place in places]
    ids = row.ids and (row.ids[0], [row.ids[1][place] for place in places])
    answers = [row.completions[place] for place in places]
    return _row(row.source, row.row, row.prompt, answers, scores, win_rates, ids, row.compared)


def _numbers(name: str, given: Any, count: int) -> list[float]:
    if not isinstance(given, list) or len(given) != count:
        raise FieldError(name, f"not a list of {count} numbers, one an answer")
    for place, value in enumerate(given, start=1):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FieldError(name, f"number {place} is {value!r}, not a finite number")
        check_size(name, value)
        if name == "win_rates" and not 0 <= value <= 1:
            raise FieldError(name, f"number {place} is {value!r}: a win rate is in [0, 1]")
    return [float(value) for value in given]


def _ids(row: dict[str, Any], count: int) -> tuple[list[int], Ids] | None:
    if row.get("prompt_ids") is None and row.get("completion_ids") is None:
        return None
    wanted = "prompt_ids and completion_ids, or neither"
    prompt, answers = required("prompt_ids", row, wanted), required("completion_ids", row, wanted)
    _check_ids("prompt_ids", prompt)
    if not isinstance(answers, list) or len(answers) != count:
        raise FieldError("completion_ids", f"not a list of {count} lists of token ids, one an answer")
    for place, ids in enumerate(answers, start=1):
        _check_ids(f"completion_ids {place}", ids)
    return prompt, answers


def _check_ids(name: str, given: Any) -> None:
    whole = isinstance(given, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in given)
    if not whole or not given or min(given) < 0 or max(given) >= 2**31:
        raise FieldError(name, "not a list of token ids, one or more")


def tokenize_groups(
    rows: Sequence[GroupRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    cache: Path | None = None,
) -> TokenizedGroups:
    """Token ids of every group: those that it has, where they are this tokenizer's, or of its text.

    Args:
        max_length: limit for the prompt and one answer together, in tokens; None cuts nothing.

    Raises:
        AlignError: the tokenizer has no end token, or no chat template for rows of messages.
    """
    names = [f"completions {place}" for place in range(1, max((len(row.completions) for row in rows), default=0) + 1)]
    read = dict.fromkeys(("boundary_moved", "eos_inside", *(f"truncated_{name}" for name in names)), 0)
    encoder = Encoder(tokenizer, max_length, read)
    done = TokenizedGroups([], [], {"as_drawn": 0})
    of_text = [row for row in rows if row.ids is None]
    texts = [(row.prompt, dict(zip(names, row.completions, strict=False))) for row in of_text]
    tokens = encoded(encoder, texts, [row.row_id for row in of_text], cache)
    cut = 0
    for row in rows:
        try:
            if row.ids is not None:
                prompt, answers, own = _as_drawn(row, row.ids, tokenizer, max_length)
                cut += own
                done.counts["as_drawn"] += 1
            else:
                found = next(tokens)
                if isinstance(found, FieldError):
                    raise found
                prompt, answers = found[0], list(found[1].values())
        except FieldError as problem:
            shown = {"prompt": row.prompt, "completions": row.completions}
            done.faults.append(Fault(row.source, row.row, problem.field, problem.reason, shown))
            continue
        masked = [0] * len(prompt)
        done.rows.append(TokenizedGroup(prompt, masked, row.row_id, answers, row.scores, row.win_rates, row.compared))
    encoder.finish("groups", len(done.rows), len(done.faults))
    done.counts |= {name: read[name] for name in ("groups", "set_aside", "boundary_moved", "eos_inside")}
    done.counts["truncated_completions"] = cut + sum(read[f"truncated_{name}"] for name in names)
    return done


def _as_drawn(
    row: GroupRow, ids: tuple[list[int], Ids], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[list[int], Ids, int]:
    """The ids of the data, and how many answers are cut."""
    prompt, answers = ids
    for place, (tokens, text) in enumerate(zip(answers, row.completions, strict=True), start=1):
        if tokenizer.decode(tokens, skip_special_tokens=True) != _text(text):
            reason = (
                "not the answer in this model's tokens: the answers are of another model; leave out prompt_ids and "
                "completion_ids to train on the text"
            )
            raise FieldError(f"completion_ids {place}", reason)
    if max(prompt) >= len(tokenizer):
        raise FieldError("prompt_ids", f"{max(prompt)} is no token of this model, which has {len(tokenizer):,}")
    if max_length is None:
        return prompt, answers, 0
    room = max_length - len(prompt)
    if room < 1:
        raise FieldError(
            "prompt_ids",
            f"{len(prompt):,} tokens, over data.max_length {max_length:,} before any answer: raise it",
        )
    return prompt, [tokens[:room] for tokens in answers], sum(len(tokens) > room for tokens in answers)


def _text(answer: Content) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


def describe_groups(
    table: GroupTable, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None
) -> str:
    """The picture of one source: groups, their numbers, lengths in tokens, faults."""
    counts = table.counts
    size = counts["answers"] / max(1, counts["groups"])
    lines = [f"{table.source}: {counts['rows']:,} rows, {counts['groups']:,} groups of {size:g} answers"]
    lines.append(f"  {'duplicates':<15} {counts['duplicates']:,}")
    if counts["ties"]:
        lines.append(f"  {'ties':<15} {counts['ties']:,}: best and worst are worth the same; left out")
    for name in ("scores", "win_rates"):
        spreads = [max(values) - min(values) for row in table.rows if (values := getattr(row, name)) is not None]
        if spreads:
            lines.append(f"  {name:<15} best less worst: {spread(spreads)}")
    if tokenizer is not None and table.rows:
        done = tokenize_groups(table.rows, tokenizer, max_length)
        lines.append(f"  {'prompt tokens':<15} {spread([len(row.input_ids) for row in done.rows])}")
        lines.append(f"  {'answer tokens':<15} {spread([len(ids) for row in done.rows for ids in row.answer_ids])}")
        lines.append(f"  {'as drawn':<15} {done.counts['as_drawn']:,} groups with the ids of their model")
        if max_length is not None:
            lines.append(f"  {f'limit {max_length:,}':<15} cuts {done.counts['truncated_completions']:,} answers")
    return "\n".join([*lines, *left_aside(table)])
