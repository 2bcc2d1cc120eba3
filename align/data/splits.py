"""The data sets of a run: read, checked, tokenised, and what was set aside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from align.errors import AlignError

from .completions import read_completions
from .groups import GroupRules, read_groups, tokenize_groups
from .judgements import JudgementRow, JudgementTable, read_judgements
from .pairs import read_pairs
from .prompts import PromptRules, read_prompts, tokenize_prompts
from .report import check_fraction
from .rewards import RewardRules, read_ratings, read_reward_pairs, tokenize_ratings, tokenize_reward_pairs
from .rows import CompletionRow, CompletionTable, Fault, PairRow, PairTable, bad_rows
from .thumbs import TokenizedThumbs, check_both_thumbs, read_thumbs, tokenize_thumbs
from .tokenize import TokenizedCompletions, TokenizedPairs, tokenize_completions, tokenize_pairs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


DataKind = Literal["pairs", "completions", "thumbs", "ratings", "prompts", "groups", "judgements"]
"""What a method learns from: comparisons, answers to imitate, answers with a thumb up or down, rated answers,
prompts that the model answers itself, groups of answers with what they are worth, or comparisons by annotators."""


@dataclass(frozen=True)
class Split:
    """One data set of a run.

    Attributes:
        table: the rows as they were read.
        tokenized: those that can be used, as token ids.
        dropped: usable rows that ``data.filter`` has taken out of ``tokenized``; None where there is no filter.
    """

    table: PairTable | CompletionTable
    tokenized: TokenizedPairs | TokenizedCompletions
    dropped: int | None = None

    @property
    def faults(self) -> list[Fault]:
        """Why rows were set aside, in reading and in tokenising."""
        return [*self.table.faults, *self.tokenized.faults]

    @property
    def used(self) -> list[PairRow | CompletionRow]:
        """The rows behind ``tokenized``, in its order."""
        by_id = {row.row_id: row for row in self.table.rows}
        return [by_id[row.row_id] for row in self.tokenized.rows]

    def dataset(self) -> Dataset:
        """``tokenized`` as columns, with the annotator of each comparison where annotators judged."""
        found: Dataset = self.tokenized.dataset()
        if not isinstance(self.table, JudgementTable):
            return found
        return found.add_column("annotator", [row.annotator for row in self.used if isinstance(row, JudgementRow)])

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest says of it: source, fingerprint, counts."""
        counts = {**self.table.counts, **self.tokenized.counts, "set_aside": bad_rows(self.faults)}
        if self.dropped is not None:
            counts |= {"kept": len(self.tokenized.rows), "dropped": self.dropped}
        return {"source": self.table.source, "sha256": self.table.fingerprint(), **counts}

    def check(self, max_bad_fraction: float) -> None:
        """Stop where too many rows cannot be used, or where all thumbs are up or all are down.

        Raises:
            AlignError: more than ``max_bad_fraction`` of the rows, or all of them; rows that are all ties; or a thumb
                that no answer has.
        """
        rows = self.table.counts["rows"]
        check_fraction(self.faults, rows, max_bad_fraction)
        if not self.tokenized.rows and self.dropped is None:
            raise AlignError(f"{self.table.source}: nothing to learn from: its {rows:,} rows are ties or set aside")
        if isinstance(self.tokenized, TokenizedThumbs):
            check_both_thumbs((row.label for row in self.tokenized.rows), self.table.source)


def read_split(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    kind: DataKind,
    rules: RewardRules | PromptRules | GroupRules | None = None,
) -> Split:
    """Read and tokenise a source; by ``rules`` where a reward model is to read it, a policy to answer it, or where
    several answers to a prompt are learnt at once.

    The tokens of many rows are kept in Align's cache folder (``kept``).

    Raises:
        AlignError: the source cannot be read at all, or the tokenizer cannot serve it.
    """
    from align.models.packaged import cache_folder  # it imports torch, which reading rows does not need

    cache = cache_folder() / "tokens"
    if isinstance(rules, PromptRules):
        prompts = read_prompts(source, rules.references, columns=rules.columns, every=rules.every)
        return Split(prompts, tokenize_prompts(prompts.rows, tokenizer, max_length, answer=rules.answer, cache=cache))
    if isinstance(rules, GroupRules):
        groups = read_groups(source, rules)
        return Split(groups, tokenize_groups(groups.rows, tokenizer, max_length, cache=cache))
    if rules is not None and kind == "ratings":
        ratings = read_ratings(source, rules.attributes)
        return Split(ratings, tokenize_ratings(ratings.rows, tokenizer, max_length, rules.over_long, cache=cache))
    if rules is not None:
        pairs = read_reward_pairs(source, rules)
        return Split(pairs, tokenize_reward_pairs(pairs.rows, tokenizer, max_length, rules.over_long, cache=cache))
    if kind == "pairs":
        table = read_pairs(source)
        return Split(table, tokenize_pairs(table.rows, tokenizer, max_length, cache=cache))
    if kind == "judgements":
        judged = read_judgements(source)
        return Split(judged, tokenize_reward_pairs(judged.rows, tokenizer, max_length, cache=cache))
    if kind == "thumbs":
        thumbs = read_thumbs(source)
        return Split(thumbs, tokenize_thumbs(thumbs.rows, tokenizer, max_length, cache=cache))
    completions = read_completions(source)
    return Split(completions, tokenize_completions(completions.rows, tokenizer, max_length, cache=cache))
