"""A row as scorers see it: an id, a prompt, and answers by field.

Kinds of rows:

- ``[prompt,] chosen, rejected``, or ``prompt, response_1, response_2, preference_strength``, whose better response is
  chosen; both checked as pairs for training are.
- ``prompt, completions``: several answers; a column then holds a list.
- ``prompt, completion`` (or ``prompt, response``), or ``messages``, whose last assistant turn is the completion.
- ``prompt`` alone, which has reference columns and no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.data.fields import FieldError, answer_field, collecting, content, required, resolve
from align.data.pairs import comparison
from align.data.rows import Content, row_id

LISTED = "completions"
DRAWN = "completion_ids"
"""Column of ``align generate --n``: the token ids of the completions."""
ONE_TOKEN = "one_token"
"""Column beside ``ches`` and ``ches_ln``: neither answer has more than one token before its end token. Such answers
part in nothing that CHES sees but the state before the end token, and without that in nothing: it is then 0."""
_WANTED = (
    "[prompt,] chosen, rejected; or prompt, response_1, response_2 and preference_strength; or prompt and completion, "
    "response, completions or nothing more; or messages"
)


@dataclass(frozen=True)
class ScoreRow:
    """What is scored of one row.

    Attributes:
        row_id: hash of prompt and answers; of a pair, the id that training gives it.
        prompt: text or messages.
        answers: by field, ``chosen`` and ``rejected``, ``completion`` or ``completions``: one answer each, and one or
            more for ``completions``; empty for a prompt alone.
        fields: all that the row has, for rules that ask for columns, and so that none is written over.
    """

    row_id: str
    prompt: Content
    answers: Mapping[str, Sequence[Content]]
    fields: Mapping[str, Any]

    @property
    def each(self) -> list[Content]:
        """All answers, in the order of the fields."""
        return [answer for several in self.answers.values() for answer in several]

    @property
    def size(self) -> int:
        """Characters of prompt and answers, by which rows of like length meet in a batch."""
        return sum(len(part) if isinstance(part, str) else _size(part) for part in (self.prompt, *self.each))


def _size(messages: Sequence[Mapping[str, str]]) -> int:
    return sum(len(message["content"]) for message in messages)


def score_row(row: dict[str, Any], problems: list[FieldError]) -> ScoreRow | None:
    """What is scored of ``row``; None where ``problems`` grew."""
    prompt: Content = ""
    answers: dict[str, list[Content]] = {}
    if {"chosen", "rejected", "response_1"} & row.keys():
        pairs = comparison(row, problems)
        if not pairs and not problems:
            problems.append(FieldError("preference_strength", "0: neither response is the chosen one"))
        for pair in pairs:
            prompt, answers = pair.prompt, {"chosen": [pair.chosen], "rejected": [pair.rejected]}
    else:
        with collecting(problems):
            prompt, answers = _answers(row, problems)
    if problems:
        return None
    every = [answer for several in answers.values() for answer in several]
    return ScoreRow(row_id(prompt, *every), prompt, answers, row)


def id_of(row: Mapping[str, Any]) -> str | None:
    """The id of a row that cannot be scored, by its prompt and answers as they stand; None where one is no text."""
    pairs = [("chosen", "rejected"), ("response_1", "response_2")]
    names = next((pair for pair in pairs if pair[0] in row), (answer_field(row),))
    if "prompt" in row or names != pairs[0]:
        names = ("prompt", *names)
    try:
        return row_id(*(content(name, row.get(name)) for name in names))
    except FieldError:
        return None


def _answers(row: dict[str, Any], problems: list[FieldError]) -> tuple[Content, dict[str, list[Content]]]:
    if "messages" in row and "completion" not in row and LISTED not in row:
        talk = content("messages", required("messages", row, _WANTED))
        if isinstance(talk, str) or len(talk) < 2:
            raise FieldError("messages", "not a conversation: wanted a prompt and an assistant turn at least")
        prompt, resolved = resolve(None, {"messages": talk})
        return prompt, {"completion": [resolved["messages"]]}
    prompt = content("prompt", required("prompt", row, _WANTED))
    if not {answer_field(row), LISTED} & row.keys():
        if not prompt:
            raise FieldError("prompt", "empty")
        return prompt, {}
    named = _named(row, problems)
    if problems:
        return prompt, {}
    if LISTED in row and row.get(DRAWN) is not None and prompt:
        # What a model gave: an answer that it ended at once is an answer.
        answers: list[Content] = [
            one if isinstance(one, list) or isinstance(prompt, str) else [{"role": "assistant", "content": one}]
            for one in named.values()
        ]
        return prompt, {LISTED: answers}
    prompt, resolved = resolve(prompt, named)
    return prompt, {LISTED if LISTED in row else "completion": list(resolved.values())}


def _named(row: dict[str, Any], problems: list[FieldError]) -> dict[str, Content]:
    if LISTED not in row:
        name = answer_field(row)
        return {name: content(name, required(name, row, _WANTED))}
    values = required(LISTED, row, _WANTED)
    if not isinstance(values, list) or not values:
        raise FieldError(LISTED, "not a list of answers (CSV holds none: use JSONL or Parquet)")
    named = {}
    for number, value in enumerate(values, start=1):
        with collecting(problems):
            named[f"{LISTED} {number}"] = content(f"{LISTED} {number}", value)
    return named
