"""The data sets of a run: read, checked, tokenised, and what was set aside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .completions import read_completions
from .pairs import read_pairs
from .report import check_fraction
from .rows import CompletionRow, CompletionTable, Fault, PairRow, PairTable, bad_rows
from .tokenize import TokenizedCompletions, TokenizedPairs, tokenize_completions, tokenize_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Split:
    """One data set of a run.

    Attributes:
        table: the rows as they were read.
        tokenized: those that can be used, as token ids.
    """

    table: PairTable | CompletionTable
    tokenized: TokenizedPairs | TokenizedCompletions

    @property
    def faults(self) -> list[Fault]:
        """Why rows were set aside, in reading and in tokenising."""
        return [*self.table.faults, *self.tokenized.faults]

    @property
    def used(self) -> list[PairRow | CompletionRow]:
        """The rows behind ``tokenized``, in its order."""
        by_id = {row.row_id: row for row in self.table.rows}
        return [by_id[row.row_id] for row in self.tokenized.rows]

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest says of it: source, fingerprint, counts."""
        counts = {**self.table.counts, **self.tokenized.counts, "set_aside": bad_rows(self.faults)}
        return {"source": self.table.source, "sha256": self.table.fingerprint(), **counts}

    def check(self, max_bad_fraction: float) -> None:
        """Stop where too many rows cannot be used.

        Raises:
            AlignError: more than ``max_bad_fraction`` of the rows, or all of them.
        """
        check_fraction(self.faults, self.table.counts["rows"], max_bad_fraction)


def read_split(source: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None, *, pairs: bool) -> Split:
    """Read and tokenise a source of pairs, or of answers to imitate.

    Raises:
        AlignError: the source cannot be read at all, or the tokenizer cannot serve it.
    """
    if pairs:
        table = read_pairs(source)
        return Split(table, tokenize_pairs(table.rows, tokenizer, max_length))
    completions = read_completions(source)
    return Split(completions, tokenize_completions(completions.rows, tokenizer, max_length))
