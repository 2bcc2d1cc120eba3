"""Prompts alone, which a model in training answers itself (``method: grpo``).

Kinds of rows:

- ``prompt``, with the reference rewards that the recipe names, a number each, and the columns that its rules ask for.
- pairs (``[prompt,] chosen, rejected``), whose prompt alone is read.

The same prompt with the same columns again is counted and left out: each is answered several times as it is.
"""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from align.errors import AlignError
from align.rewards.named import OF_TRL

from .encode import Encoder
from .fields import FieldError, collecting, content, required
from .kept import encoded
from .load import read_rows, usable
from .pairs import compared
from .report import left_aside, spread
from .rows import CompletionRow, CompletionTable, Content, Fault, bad_rows, row_id
from .tokenize import TokenizedCompletion, TokenizedCompletions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_WANTED = "prompt; or [prompt,] chosen, rejected"
_NO_COLUMNS: Mapping[str, str | None] = MappingProxyType({})
ROW_ID = "id of the row"
"""Our own column of ``TokenizedPrompts.dataset``, by a name that no argument of a rule can have."""
_PACKED = "columns of the data"
_TAKEN = ("prompts", "completions", "completion", *OF_TRL)  # a reward's arguments of these names are TRL's


@dataclass(frozen=True)
class PromptRules:
    """What a recipe asks of prompts.

    Args:
        references: columns that each row must have a finite number in.
        answer: tokens to leave for the answer.
        columns, every: as in ``read_prompts``.
    """

    references: tuple[str, ...]
    answer: int
    columns: Mapping[str, str | None] = field(default_factory=dict)
    every: bool = False


@dataclass(frozen=True)
class PromptRow(CompletionRow):
    """One prompt. ``completion`` is empty.

    Attributes:
        references: reference rewards by column.
        columns: what else rules ask for, by name, as it is. Both are part of ``row_id``.
    """

    references: dict[str, float] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass
class PromptTable(CompletionTable):
    """The prompts of one source.

    Attributes:
        counts: ``rows`` (read), ``prompts``, ``set_aside`` (rows), ``duplicates`` (left out).
    """


@dataclass(frozen=True)
class TokenizedPrompt(TokenizedCompletion):
    """A prompt with the ids from which answers are generated; nothing of it is learnt."""

    prompt: Content
    columns: dict[str, Any]


class TokenizedPrompts(TokenizedCompletions):
    """Prompts that leave room for an answer. ``counts``: ``prompts``, ``set_aside``."""

    def dataset(self) -> Dataset:
        """Columns prompt, ROW_ID, and one with the references and what rules ask for, which ``unpacked`` reads.

        There a value is None where a row does not have it. It is no column of Arrow's, which refuses numbers beside
        text and gives all mappings the same keys: rules get what the rows say.
        """
        from datasets import Dataset

        rows = [row for row in self.rows if isinstance(row, TokenizedPrompt)]
        names = dict.fromkeys(name for row in rows for name in row.columns)
        found = {"prompt": [row.prompt for row in rows], ROW_ID: [row.row_id for row in rows]}
        if names:
            found[_PACKED] = [pickle.dumps({name: row.columns.get(name) for name in names}) for row in rows]
        return Dataset.from_dict(found)


def unpacked(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of ``TokenizedPrompts.dataset``, and of what was made of it, with each value under its own name."""
    own = {name: value for name, value in row.items() if name not in (_PACKED, ROW_ID)}
    return {**pickle.loads(row[_PACKED]), **own} if _PACKED in row else own


def read_prompts(
    source: str,
    references: Sequence[str] = (),
    *,
    columns: Mapping[str, str | None] = _NO_COLUMNS,
    every: bool = False,
) -> PromptTable:
    """Read and validate every row of ``source`` once (see ``load.read_rows`` for what a source may be).

    Args:
        references: columns that each row must have a finite number in; a row without one is a Fault.
        columns: what rules ask for, each with a rule that cannot do without it, or None; a row that does not have what
            is needed is a Fault.
        every: a rule reads all columns, but those whose names TRL gives to what is its own.

    Raises:
        AlignError: the source is missing, empty or unreadable as a whole, or a column is asked for that has such a
            name. A bad row raises nothing: it is a Fault.
    """
    if taken := [name for name in (*references, *columns) if name in _TAKEN]:
        raise AlignError(
            f"{source}: grpo.rewards asks for column {taken[0]}, and TRL gives rewards something of its own by that "
            "name: rename the column, in the data and in the recipe or the rule"
        )
    table = PromptTable([], [], dict.fromkeys(("rows", "prompts", "set_aside", "duplicates"), 0), source)
    unused: Counter[str] = Counter()
    seen: set[str] = set()
    asked = {name: rule for name, rule in columns.items() if name not in ("prompt", *references)}
    for file, number, row in usable(read_rows(source), table):
        problems: list[FieldError] = []
        prompt = _prompt(row, problems)
        values = _references(row, references, problems)
        others = _asked(row, asked, problems)
        if every:
            others = {name: value for name, value in row.items() if name not in ("prompt", *references, *_TAKEN)}
        table.faults += [Fault(file, number, problem.field, problem.reason, row) for problem in problems]
        unused.update(row.keys() - {"prompt", *references, *others})
        if problems or prompt is None:
            continue
        own = {**others, **values}
        name = row_id(prompt, json.dumps(own, sort_keys=True, default=str)) if own else row_id(prompt)
        if name in seen:
            table.counts["duplicates"] += 1
            continue
        seen.add(name)
        table.rows.append(PromptRow(name, file, number, prompt, "", values, others))
    table.counts["prompts"] = len(table.rows)
    table.counts["set_aside"] = bad_rows(table.faults)
    table.unused = dict(unused)
    return table


def tokenize_prompts(
    rows: Sequence[CompletionRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    answer: int = 1,
    cache: Path | None = None,
) -> TokenizedPrompts:
    """Prompts as token ids; one that leaves less than ``answer`` tokens of ``max_length`` is a Fault.

    So is one that the chat template refuses; text where the first prompt is messages, and messages where it is text:
    TRL takes a batch for either.

    Raises:
        AlignError: prompts are messages and the tokenizer has no chat template.
    """
    found = TokenizedPrompts([], [], {"prompts": 0, "set_aside": 0})
    room = None if max_length is None else max_length - answer
    kinds = {True: "text", False: "messages"}
    alike = [row for row in rows if isinstance(row.prompt, str) is isinstance(rows[0].prompt, str)]
    tokens = _tokens(alike, tokenizer, cache)
    for row in rows:
        text = isinstance(row.prompt, str)
        if text is not isinstance(rows[0].prompt, str):
            reason = f"{kinds[text]}, and the first prompt is {kinds[not text]}: write all of them as one or the other"
            found.faults.append(Fault(row.source, row.row, "prompt", reason, {"prompt": row.prompt}))
            continue
        ids = next(tokens)
        if isinstance(ids, FieldError):
            found.faults.append(Fault(row.source, row.row, ids.field, ids.reason, {"prompt": row.prompt}))
            continue
        if room is not None and len(ids) > room:
            reason = (
                f"{len(ids):,} tokens, over {room:,}: data.max_length {max_length:,} less {answer:,} for the answer"
            )
            found.faults.append(Fault(row.source, row.row, "prompt", reason, {"prompt": row.prompt}))
            continue
        columns = {**row.columns, **row.references} if isinstance(row, PromptRow) else {}
        found.rows.append(TokenizedPrompt(ids, [0] * len(ids), row.row_id, row.prompt, columns))
    found.counts.update(prompts=len(found.rows), set_aside=bad_rows(found.faults))
    return found


def _tokens(
    rows: Sequence[CompletionRow], tokenizer: PreTrainedTokenizerBase, cache: Path | None = None
) -> Iterator[list[int] | FieldError]:
    """As ``tokenize.encode_prompt`` would, each."""
    found = encoded(Encoder(tokenizer, None, {}), [(row.prompt, {}) for row in rows], [r.row_id for r in rows], cache)
    for row in found:
        yield row if isinstance(row, FieldError) else row[0]


def describe_prompts(table: PromptTable, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The picture of one source: prompts, repeats, references, lengths in tokens, faults."""
    counts = table.counts
    lines = [f"{table.source}: {counts['rows']:,} rows, {counts['prompts']:,} prompts"]
    lines.append(f"  {'duplicates':<15} {counts['duplicates']:,}, left out")
    rows = [row for row in table.rows if isinstance(row, PromptRow)]
    for column in rows[0].references if rows else ():
        lines.append(f"  {column:<15} {spread([row.references[column] for row in rows])}")
    if tokenizer is not None and rows:
        lengths = [float(len(ids)) for ids in _tokens(rows, tokenizer) if not isinstance(ids, FieldError)]
        lines.append(f"  {'prompt tokens':<15} {spread(lengths)}")
    return "\n".join([*lines, *left_aside(table)])


def _prompt(row: dict[str, Any], problems: list[FieldError]) -> Content | None:
    if "chosen" in row and "rejected" in row:
        return next((pair.prompt for pair in compared(row, problems)), None)
    with collecting(problems):
        prompt = content("prompt", required("prompt", row, _WANTED))
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise FieldError("prompt", "empty prompt: an answer needs something before it")
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            raise FieldError("prompt", "ends in an assistant turn: there is nothing left to answer")
        return prompt
    return None


def _asked(row: dict[str, Any], columns: Mapping[str, str | None], problems: list[FieldError]) -> dict[str, Any]:
    for name, rule in columns.items():
        with collecting(problems):
            if rule is not None and name not in row:
                raise FieldError(name, f"missing, and {rule} asks for it")
    return {name: row[name] for name in columns if name in row}


def _references(row: dict[str, Any], columns: Sequence[str], problems: list[FieldError]) -> dict[str, float]:
    found = {}
    for column in columns:
        with collecting(problems):
            value = required(column, row, "the reference reward that the recipe names")
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise FieldError(column, "the reference reward is not a number") from None
            if isinstance(value, bool) or not math.isfinite(number):
                raise FieldError(column, "the reference reward is not a finite number")
            found[column] = number
    return found
