"""From rows to token ids: pairs and single answers, by the rules of ``encode``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from align.errors import AlignError

from .columns import dataset_of
from .encode import Encoder
from .fields import FieldError, resolve
from .kept import encoded
from .rows import CompletionRow, Content, Fault, PairRow, row_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of one pair: ``prompt_ids`` stand before either answer; the labels are those of ``PairRow``."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    strength: float
    row_id: str
    preference: float | None = None
    margin: float | None = None


@dataclass
class TokenizedPairs:
    """Pairs as token ids, the rows that could not be used, and counts.

    Attributes:
        counts: ``pairs``, ``set_aside``, ``truncated_chosen`` and ``truncated_rejected`` (answers cut at max_length),
            ``boundary_moved`` (answers that begin before the prompt's end) and ``eos_inside`` (answers with an end
            token before their end: what follows it is never generated).
    """

    rows: list[TokenizedPair]
    faults: list[Fault]
    counts: dict[str, int]

    def dataset(self) -> Dataset:
        """Columns prompt_ids, chosen_ids, rejected_ids, strength, row_id; preference, margin where any has one."""
        columns = ["prompt_ids", "chosen_ids", "rejected_ids", "strength", "row_id"]
        given = [name for name in ("preference", "margin") if any(getattr(r, name) is not None for r in self.rows)]
        return _dataset(self.rows, [*columns, *given])


@dataclass(frozen=True)
class TokenizedCompletion:
    """Token ids of prompt and answer; ``completion_mask`` is 1 on the tokens to learn. Both have the same length."""

    input_ids: list[int]
    completion_mask: list[int]
    row_id: str

    @property
    def labels(self) -> list[int]:
        """``input_ids`` on the tokens to learn, -100 elsewhere."""
        return [token if scored else -100 for token, scored in zip(self.input_ids, self.completion_mask, strict=True)]

    @property
    def prompt_ids(self) -> list[int]:
        """What stands before the answer."""
        return self.input_ids[: self.completion_mask.index(1)]

    @property
    def completion_ids(self) -> list[int]:
        """The answer."""
        return self.input_ids[self.completion_mask.index(1) :]


@dataclass
class TokenizedCompletions:
    """Answers as token ids; counts as in ``TokenizedPairs``, with ``completions`` and ``truncated_completion``."""

    rows: list[TokenizedCompletion]
    faults: list[Fault]
    counts: dict[str, int]

    def dataset(self) -> Dataset:
        """Columns input_ids, completion_mask, labels, row_id, as TRL's SFTTrainer takes them.

        ``labels`` repeats the mask because the trainer reads ``completion_mask`` only under
        ``completion_only_loss=True`` and would otherwise learn the prompts too.
        """
        return _dataset(self.rows, ("input_ids", "completion_mask", "labels", "row_id"))


def _dataset(rows: Sequence[Any], columns: Sequence[str]) -> Dataset:
    return dataset_of({column: [getattr(row, column) for row in rows] for column in columns})


def tokenize_pairs(
    rows: Sequence[PairRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    cache: Path | None = None,
) -> TokenizedPairs:
    """Token ids of every pair, by the rules of ``encode``.

    Args:
        max_length: limit for the prompt and one answer together, in tokens; None cuts nothing.
        cache: folder that keeps the tokens of many rows (``kept``); None keeps none.

    Raises:
        AlignError: the tokenizer has no end token, or no chat template for rows of messages.
    """
    result = TokenizedPairs([], [], _counts("pairs", ("chosen", "rejected")))
    encoder = Encoder(tokenizer, max_length, result.counts)
    answers = [(row.prompt, {"chosen": row.chosen, "rejected": row.rejected}) for row in rows]
    for row, found in zip(rows, encoded(encoder, answers, [row.row_id for row in rows], cache), strict=True):
        if isinstance(found, FieldError):
            soft = {} if row.preference is None else {"preference": row.preference}
            shown = {"chosen": row.chosen, "rejected": row.rejected, "strength": row.strength, **soft}
            result.faults.append(_fault(row, found, **shown))
            continue
        prompt_ids, ids = found
        labels = (row.strength, row.row_id, row.preference, row.margin)
        result.rows.append(TokenizedPair(prompt_ids, ids["chosen"], ids["rejected"], *labels))
    encoder.finish("pairs", len(result.rows), len(result.faults))
    return result


def tokenize_pair(
    prompt: Content, chosen: Content, rejected: Content, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> TokenizedPair:
    """One pair, by the same rules; plain text as an answer to messages is one assistant message.

    Raises:
        AlignError: the pair cannot be used, or the tokenizer cannot tokenise it.
    """
    try:
        prompt, answers = resolve(prompt, {"chosen": chosen, "rejected": rejected})
    except FieldError as problem:
        raise AlignError(str(problem)) from problem
    chosen, rejected = answers["chosen"], answers["rejected"]
    row = PairRow(row_id(prompt, chosen, rejected), "pair", 1, prompt, chosen, rejected)
    tokenized = tokenize_pairs([row], tokenizer, max_length)
    if tokenized.faults:
        raise AlignError(f"{tokenized.faults[0].field}: {tokenized.faults[0].reason}")
    return tokenized.rows[0]


def tokenize_completions(
    rows: Sequence[CompletionRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    cache: Path | None = None,
) -> TokenizedCompletions:
    """Token ids and masks of every answer, by the rules of ``encode``; ``cache`` as in ``tokenize_pairs``.

    Plain text (an empty prompt) is learnt whole, except a beginning-of-sequence token that the tokenizer adds.

    Raises:
        AlignError: the tokenizer has no end token, or no chat template for rows of messages.
    """
    result = TokenizedCompletions([], [], _counts("completions", ("completion",)))
    encoder = Encoder(tokenizer, max_length, result.counts)
    answers = [(row.prompt, {"completion": row.completion}) for row in rows]
    for row, found in zip(rows, encoded(encoder, answers, [row.row_id for row in rows], cache), strict=True):
        if isinstance(found, FieldError):
            result.faults.append(_fault(row, found, completion=row.completion))
            continue
        prompt_ids, ids = found
        mask = [0] * len(prompt_ids) + [1] * len(ids["completion"])
        result.rows.append(TokenizedCompletion(prompt_ids + ids["completion"], mask, row.row_id))
    encoder.finish("completions", len(result.rows), len(result.faults))
    return result


def encode_prompt(prompt: Content, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids from which an answer is generated: messages end in the generation prompt.

    Raises:
        AlignError: the prompt is empty, or it is messages and the tokenizer has no chat template for them.
    """
    if not prompt:
        raise AlignError("prompt: empty prompt: an answer needs something before it")
    encoder = Encoder(tokenizer, None, {})
    try:
        return encoder.ids([encoder.prompt_text(prompt)], isinstance(prompt, str))[0]
    except TemplateError as error:
        raise AlignError(f"prompt: refused by the chat template: {error}") from error


def _counts(what: str, names: Sequence[str]) -> dict[str, int]:
    truncated = [f"truncated_{name}" for name in names]
    return dict.fromkeys((what, "set_aside", *truncated, "boundary_moved", "eos_inside"), 0)


def _fault(row: PairRow | CompletionRow, problem: FieldError, **answers: Any) -> Fault:
    return Fault(row.source, row.row, problem.field, problem.reason, {"prompt": row.prompt, **answers})
