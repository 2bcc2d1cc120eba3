"""Pairs with the other columns of their rows, as suites compare models on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from align.config.explain import nearest
from align.data.judgements import JudgementTable, judgement_table
from align.data.load import Row, read_rows
from align.data.pairs import pair_table
from align.data.rows import Fault, PairRow, PairTable, bad_rows
from align.errors import AlignError, ConfigError
from align.evals.rewardbench import PAIRS as OF_REWARDBENCH

from .asked import Asked, tell_faults

Format = Literal["auto", "pairs", "rewardbench"]
REWARDBENCH_COLUMNS = {"prompt", "chosen", "rejected", "subset", "chosen_model", "rejected_model"}


@dataclass(frozen=True)
class Pairs:
    """Pairs of one source.

    Attributes:
        rows: that can be used.
        raw: the rows that they were made of, one each.
        table: what reading gave: source, counts, faults.
        rewardbench: whether the rows are RewardBench's, text that was made messages.
    """

    rows: list[PairRow]
    raw: list[dict[str, Any]]
    table: PairTable
    rewardbench: bool

    @property
    def groups(self) -> list[str]:
        """The prompt of each pair, as a label."""
        return [json.dumps(row.prompt) for row in self.rows]

    @property
    def labels(self) -> list[float | None]:
        """Probability that the chosen answer is preferred; None: it is."""
        return [row.preference for row in self.rows]

    @property
    def ids(self) -> list[str]:
        """Of the pairs."""
        return [row.row_id for row in self.rows]

    @property
    def columns(self) -> list[str]:
        """Names that any row has."""
        return sorted({str(name) for row in self.raw for name in row})

    def only(self, places: Sequence[int]) -> Pairs:
        """Some of the pairs."""
        return replace(self, rows=[self.rows[place] for place in places], raw=[self.raw[place] for place in places])

    def column(self, name: str, key: str = "by") -> list[str]:
        """One column as text; what is missing or null is ``(none)``.

        Args:
            key: the setting that names it.

        Raises:
            ConfigError: no row has it.
        """
        if name not in self.columns:
            near = nearest(name, self.columns)
            hint = f"did you mean {near}?" if near else f"it has {', '.join(self.columns)}"
            raise ConfigError("align eval", [(key, f"{self.table.source} has no column {name}; {hint}")])
        return ["(none)" if row.get(name) is None else str(row[name]) for row in self.raw]

    def facts(self, used: int) -> dict[str, Any]:
        """What a result says of the data: source, digest, counts, and the pairs that its rows are of."""
        about = {"source": self.table.source, "sha256": self.table.fingerprint(), **self.table.counts, "used": used}
        return {**about, "pairs": texts_of(self.rows)}


def read_suite_pairs(asked: Asked, form: Format = "pairs") -> Pairs:
    """The pairs of ``--data``.

    Args:
        form: ``rewardbench``: prompts and answers of text are a question and an answer in a chat; ``auto``: where the
            columns or all subsets are RewardBench's.

    Raises:
        AlignError: the source cannot be read, or no row can be used.
    """
    found = list(read_rows(asked.source))
    rewardbench = form == "rewardbench" or (form == "auto" and _is_rewardbench(found))
    rows = list(_as_chats(found)) if rewardbench else found
    return _pairs(asked, found, pair_table(rows, asked.source), rewardbench)


def read_suite_judgements(asked: Asked) -> tuple[Pairs, list[str]]:
    """The judgements of ``--data``, and who made each.

    Raises:
        AlignError: the source cannot be read, or no row can be used.
    """
    found = list(read_rows(asked.source))
    table: JudgementTable = judgement_table(found, asked.source)
    return _pairs(asked, found, table, False), [row.annotator for row in table.rows]


def common(asked: Asked, pairs: Pairs, scored: Sequence[Sequence[int]], faults: Sequence[Fault]) -> list[int]:
    """Numbers of the pairs that all models can score; what is set aside is told.

    Args:
        scored: of each model, the numbers of those that it can.
        faults: why it cannot.

    Raises:
        AlignError: there are none.
    """
    kept = sorted(set(range(len(pairs.rows))).intersection(*map(set, scored)))
    every = [*pairs.table.faults, *faults]
    tell_faults(every, pairs.table.counts["rows"], asked.rejected)
    if not kept:
        raise AlignError(f"{asked.source}: no pair can be used by all models, so there is nothing to compare")
    pairs.table.counts["set_aside"] = bad_rows(every)
    return kept


def texts_of(rows: Sequence[PairRow]) -> list[dict[str, Any]]:
    """Prompts and answers, once a row id, so that a result can be read without its data."""
    found = {row.row_id: (row.prompt, row.chosen, row.rejected) for row in rows}
    return [
        {"row_id": key, "prompt": prompt, "chosen": chosen, "rejected": rejected}
        for key, (prompt, chosen, rejected) in found.items()
    ]


def _pairs(asked: Asked, found: Sequence[Row], table: Any, rewardbench: bool) -> Pairs:
    raw = {(file, number): row for file, number, row in found if not isinstance(row, Fault)}
    if not table.rows:
        tell_faults(table.faults, table.counts["rows"], asked.rejected)
        raise AlignError(f"{asked.source}: no pair can be used, so there is nothing to compare")
    return Pairs(table.rows, [raw[row.source, row.row] for row in table.rows], table, rewardbench)


def _is_rewardbench(rows: Sequence[Row]) -> bool:
    contents = [row for _, _, row in rows if not isinstance(row, Fault)]
    if not contents or not all(isinstance(row.get("prompt"), str) and "subset" in row for row in contents):
        return False
    return all(row.keys() >= REWARDBENCH_COLUMNS or row["subset"] in OF_REWARDBENCH for row in contents)


def _as_chats(rows: Sequence[Row]) -> Iterator[Row]:
    for file, number, row in rows:
        if isinstance(row, Fault):
            yield file, number, row
            continue
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        chat = {
            name: [{"role": roles[name], "content": value}] if name in roles and isinstance(value, str) else value
            for name, value in row.items()
        }
        yield file, number, chat
