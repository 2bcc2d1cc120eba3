"""Held-out prompts that models answer, and rewards of the answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.controlled import load_reward
from align.data.prompts import PromptRow, PromptTable, read_prompts, tokenize_prompts
from align.data.rows import Content, bad_rows
from align.data.tokenize import encode_prompt
from align.decoding.constraints import file_of
from align.errors import AlignError, ConfigError
from align.evals.sampling import Sample
from align.models.load import LoadedModel
from align.rewards.encoding import as_answer, plain
from align.rewards.scorers import asked_columns

from .asked import Asked, tell_faults


@dataclass(frozen=True)
class Prompts:
    """The prompts of a suite.

    Attributes:
        rows: with the columns that rewards ask for.
        facts: of the data: source, fingerprint, counts.
        max_new_tokens: longest answer that they are to leave room for.
    """

    rows: list[PromptRow]
    facts: dict[str, Any]
    max_new_tokens: int

    @property
    def contents(self) -> list[Content]:
        """As models read them."""
        return [row.prompt for row in self.rows]

    @property
    def texts(self) -> list[str]:
        """As rewards and people read them."""
        return [plain(row.prompt, "user") for row in self.rows]

    @property
    def ids(self) -> list[str]:
        """Names of the rows."""
        return [row.row_id for row in self.rows]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """Those that all rows have."""
        names = set.intersection(*(set(row.columns) for row in self.rows))
        return {name: [row.columns[name] for row in self.rows] for name in sorted(names)}

    def encoded(self, name: str, loaded: LoadedModel) -> list[list[int]]:
        """Token ids for a model.

        Raises:
            AlignError: a prompt and its answer are longer than the model reads.
        """
        found = [encode_prompt(prompt, loaded.tokenizer) for prompt in self.contents]
        most = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, found)) + self.max_new_tokens
        if most is not None and longest > most:
            raise AlignError(
                f"{name} reads {most:,} tokens, a prompt with its answer has {longest:,}: give --max-length"
            )
        return found


def read_table(asked: Asked, rules: Iterable[str], needed: Mapping[str, str] | None = None) -> PromptTable:
    """The prompts of the data.

    Args:
        rules: rewards, whose columns are read too.
        needed: further columns, each with who asks for it.

    Raises:
        AlignError: the data cannot be read, or there is no such rule.
    """
    try:
        columns, every = asked_columns(rules)
    except ValueError as error:
        raise AlignError(f"reward: {error}") from error
    table = read_prompts(asked.source, columns={**columns, **(needed or {})}, every=every)
    if not table.rows:
        tell_faults(table.faults, table.counts["rows"], asked.rejected)
        raise AlignError(f"{table.source}: it has no prompt that can be used")
    return table


def first_prompts(asked: Asked, table: PromptTable, loaded: LoadedModel, count: int, max_new_tokens: int) -> Prompts:
    """The first that can be answered; those that cannot be used are told and set aside.

    Args:
        loaded: its tokenizer and its context say how long a prompt may be, where ``--max-length`` does not.
        count: of prompts, at most.
        max_new_tokens: of the answers.

    Raises:
        AlignError: none can be used.
    """
    limit = asked.max_length or getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    tokenized = tokenize_prompts(table.rows, loaded.tokenizer, limit, answer=max_new_tokens)
    faults = [*table.faults, *tokenized.faults]
    tell_faults(faults, table.counts["rows"], asked.rejected)
    usable = {row.row_id for row in tokenized.rows}
    rows = [row for row in table.rows if row.row_id in usable and isinstance(row, PromptRow)][:count]
    if not rows:
        raise AlignError(f"{table.source}: no prompt leaves room for an answer of {max_new_tokens:,} tokens")
    facts = {"source": table.source, "sha256": table.fingerprint(), **table.counts, "set_aside": bad_rows(faults)}
    return Prompts(rows, facts, max_new_tokens)


class Rewards:
    """A reward of single answers.

    Args:
        name: ``module:function``, or the folder or hub id of a reward model.
        key: the setting that names it.

    Raises:
        ConfigError: there is none of the name, or it compares answers.
    """

    def __init__(self, name: str, key: str = "reward") -> None:
        self.name = name
        try:
            self.scorer = load_reward(name)
        except AlignError as error:
            raise ConfigError("align eval", [(key, str(error).removeprefix("reward "))]) from error

    @property
    def digest(self) -> str | None:
        """SHA-256 of a rule's file; None of a reward model, which goes by its name."""
        path = file_of(f"python:{self.name}")
        return hashlib.sha256(path.read_bytes()).hexdigest() if path else None

    def __call__(self, prompts: Prompts, answers: Sequence[Sample], copies: int = 1) -> list[float]:
        """A number an answer.

        Args:
            answers: to each prompt, or ``copies`` in a row to each.

        Raises:
            AlignError: it fails, or gives none for an answer.
        """
        rows = [row for row in range(len(prompts.rows)) for _ in range(copies)]
        return self.of(prompts, rows, [answer.text for answer in answers])

    def of(self, prompts: Prompts, rows: Sequence[int], texts: Sequence[str]) -> list[float]:
        """A number for each of some texts, which answer the prompts of these numbers.

        Raises:
            AlignError: it fails, or gives none for an answer.
        """
        contents = [prompts.rows[row].prompt for row in rows]
        columns = {name: [values[row] for row in rows] for name, values in prompts.columns.items()}
        answers = [as_answer(prompt, text) for prompt, text in zip(contents, texts, strict=True)]
        try:
            found = self.scorer(contents, answers, columns)
        except ValueError as error:
            raise AlignError(f"reward {self.name}: {error}") from error
        scores = [score for score in found if score is not None]
        if len(scores) < len(texts):
            raise AlignError(f"reward {self.name}: no number for {texts[found.index(None)]!r}: every answer needs one")
        return scores
