"""From rows to token ids, by rules that hold for pairs and for single answers alike.

- Text is tokenised as it stands, prompt and prompt + answer each as one string, with whatever the tokenizer adds. A
  beginning-of-sequence token stands once, even where the text brings its own and the tokenizer adds another.
- Messages go through the chat template: the prompt with the generation prompt, prompt + answer as one conversation.
- The answer begins where prompt and prompt + answer stop to agree, token by token. Both answers of a pair get the same
  prompt ids. Where that is before the prompt's end (tokens that merge over the boundary, a template that writes the
  prompt otherwise when an answer follows), the row is counted and one warning says what it means.
- An answer ends in ``tokenizer.eos_token_id``, once: appended where it is missing, doubles removed, and what a
  template writes after it (a newline) cut off.
- A prompt of ``max_length`` tokens or more leaves no room and is a fault. Otherwise each answer keeps its first
  ``max_length - len(prompt)`` tokens, by the same rule for both; an answer that is cut has no end token, for none was
  reached.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from align.errors import AlignError

from .fields import EMPTY, FieldError, resolve
from .rows import CompletionRow, Content, Fault, PairRow, row_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_BATCH_ROWS = 512


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
    from datasets import Dataset

    return Dataset.from_dict({column: [getattr(row, column) for row in rows] for column in columns})


def tokenize_pairs(
    rows: Sequence[PairRow], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> TokenizedPairs:
    """Token ids of every pair, by the rules above.

    Args:
        max_length: limit for the prompt and one answer together, in tokens; None cuts nothing.

    Raises:
        AlignError: the tokenizer has no end token, or no chat template for rows of messages.
    """
    result = TokenizedPairs([], [], _counts("pairs", ("chosen", "rejected")))
    encoder = Encoder(tokenizer, max_length, result.counts)
    answers = [(row.prompt, {"chosen": row.chosen, "rejected": row.rejected}) for row in rows]
    for row, encoded in zip(rows, encoder.encode(answers), strict=True):
        if isinstance(encoded, FieldError):
            soft = {} if row.preference is None else {"preference": row.preference}
            shown = {"chosen": row.chosen, "rejected": row.rejected, "strength": row.strength, **soft}
            result.faults.append(_fault(row, encoded, **shown))
            continue
        prompt_ids, ids = encoded
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
    rows: Sequence[CompletionRow], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> TokenizedCompletions:
    """Token ids and masks of every answer, by the rules above.

    Plain text (an empty prompt) is learnt whole, except a beginning-of-sequence token that the tokenizer adds.

    Raises:
        AlignError: the tokenizer has no end token, or no chat template for rows of messages.
    """
    result = TokenizedCompletions([], [], _counts("completions", ("completion",)))
    encoder = Encoder(tokenizer, max_length, result.counts)
    answers = [(row.prompt, {"completion": row.completion}) for row in rows]
    for row, encoded in zip(rows, encoder.encode(answers), strict=True):
        if isinstance(encoded, FieldError):
            result.faults.append(_fault(row, encoded, completion=row.completion))
            continue
        prompt_ids, ids = encoded
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


Answers = Mapping[str, Content]
Encoded = tuple[list[int], dict[str, list[int]]]


class Encoder:
    """The rules, for one tokenizer and one limit; fills ``counts``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, counts: dict[str, int]) -> None:
        if tokenizer.eos_token_id is None:
            raise AlignError("the tokenizer has no end token (eos_token), so that no answer could end: set one")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.counts = counts
        self.eos: int = tokenizer.eos_token_id
        probe = tokenizer("a")["input_ids"]
        self.adds_bos = tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id
        self.adds_eos = probe[-1] == self.eos
        self.moved_tail: list[int] = []
        self._blank: dict[tuple[int, ...], bool] = {}

    def encode(self, rows: Sequence[tuple[Content, Answers]]) -> Iterator[Encoded | FieldError]:
        """Prompt ids and answer ids of each row, or why it cannot be used."""
        for start in range(0, len(rows), _BATCH_ROWS):
            batch = rows[start : start + _BATCH_ROWS]
            for row, ids in zip(batch, self._tokenize(batch), strict=True):
                try:
                    yield ids if isinstance(ids, FieldError) else self._split(row, ids)
                except FieldError as problem:
                    yield problem

    def finish(self, what: str, used: int, set_aside: int) -> None:
        """Write the totals, and warn if boundaries moved."""
        self.counts[what], self.counts["set_aside"] = used, set_aside
        if self.counts["boundary_moved"]:
            logger.warning(
                "In %d of %d rows the end of the prompt is tokenised otherwise when an answer follows (first: %r). "
                "There the answer begins where the tokens part, so that training sees another end of the prompt than "
                "generation does. End prompts without a blank and begin answers with one, or use a chat template that "
                "writes the prompt the same way in both cases.",
                self.counts["boundary_moved"],
                used + set_aside,
                self.tokenizer.decode(self.moved_tail),
            )

    def prompt_text(self, prompt: Content) -> str:
        """The prompt as the tokenizer is to see it."""
        return prompt if isinstance(prompt, str) else self._render(prompt, add_generation_prompt=True)

    def ids(self, texts: list[str], is_text: bool, is_prompt: bool = True) -> list[list[int]]:
        """Token ids; ``is_text`` is False for what a template wrote, which holds its special tokens already."""
        output = self.tokenizer(texts, add_special_tokens=is_text, return_attention_mask=False, verbose=False)
        encoded = output["input_ids"]
        if is_text and self.adds_bos:
            bos = self.tokenizer.bos_token_id
            encoded = [ids[1:] if ids[:2] == [bos, bos] else ids for ids in encoded]
        if is_text and is_prompt and self.adds_eos:
            encoded = [ids[:-1] for ids in encoded]
        return list(encoded)

    def _tokenize(self, batch: Sequence[tuple[Content, Answers]]) -> list[list[list[int]] | FieldError]:
        """Per row: ids of the prompt, then of prompt + answer for each answer."""
        result: list[list[list[int]] | FieldError] = [FieldError("prompt", "")] * len(batch)
        for is_text in (True, False):
            texts: dict[int, list[str]] = {}
            for index, (prompt, answers) in enumerate(batch):
                if isinstance(prompt, str) is not is_text:
                    continue
                try:
                    texts[index] = [self.prompt_text(prompt), *(self._joint(prompt, a) for a in answers.values())]
                except TemplateError as error:
                    result[index] = FieldError("prompt", f"refused by the chat template: {error}")
            if not texts:
                continue
            prompts = self.ids([text[0] for text in texts.values()], is_text)
            joints = iter(self.ids([joint for text in texts.values() for joint in text[1:]], is_text, is_prompt=False))
            for (index, text), prompt_ids in zip(texts.items(), prompts, strict=True):
                result[index] = [prompt_ids, *(next(joints) for _ in text[1:])]
        return result

    def _joint(self, prompt: Content, answer: Content) -> str:
        if isinstance(prompt, str) and isinstance(answer, str):
            return prompt + answer
        if isinstance(prompt, str) or isinstance(answer, str):
            raise TypeError("prompt and answer must both be text or both be messages: see fields.resolve")
        return self._render([*prompt, *answer])

    def _render(self, messages: Content, add_generation_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise AlignError(
                "the data has chat messages, but the tokenizer has no chat template: use a chat model, set "
                "tokenizer.chat_template, or write prompts and answers as plain text"
            )
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def _split(self, row: tuple[Content, Answers], ids: list[list[int]]) -> Encoded:
        """Cut prompt + answer into both, end the answers and hold them to the limit."""
        prompt, *joints = ids
        shared = min(_shared_length(prompt, joint) for joint in joints)
        if shared < len(prompt):
            self.counts["boundary_moved"] += 1
            self.moved_tail = self.moved_tail or prompt[shared:]
        if shared == 0 and row[0]:
            raise FieldError("prompt", "no token of it is left before the answer: write the prompt as its own words")
        if self.max_length is not None and shared >= self.max_length:
            raise FieldError(
                "prompt",
                f"{shared:,} tokens, over data.max_length {self.max_length:,} before any answer: "
                "raise it or shorten the prompt",
            )
        answers = {name: self._end(name, joint[shared:]) for name, joint in zip(row[1], joints, strict=True)}
        self._check_equal(answers, "equal to rejected in tokens")
        for name, answer in row[1].items():
            one_turn = isinstance(answer, str) or len(answer) == 1
            self.counts["eos_inside"] += one_turn and self.eos in answers[name][:-1]
        return prompt[:shared], self._cut(answers, shared)

    def _end(self, name: str, ids: list[int]) -> list[int]:
        """One end token at the end: none doubled, nothing but blanks cut off after it."""
        while self.eos in ids:
            last = len(ids) - 1 - ids[::-1].index(self.eos)
            if not self._is_blank(ids[last + 1 :]):
                break
            ids = ids[:last]
        if not ids:
            raise FieldError(name, EMPTY)
        return [*ids, self.eos]

    def _is_blank(self, ids: list[int]) -> bool:
        key = tuple(ids)
        if key not in self._blank:
            self._blank[key] = not self.tokenizer.decode(ids).strip()
        return self._blank[key]

    def _cut(self, answers: dict[str, list[int]], prompt_length: int) -> dict[str, list[int]]:
        if self.max_length is None:
            return answers
        room = self.max_length - prompt_length
        cut = {name: ids[:room] for name, ids in answers.items()}
        self._check_equal(cut, f"equal to rejected in the {room:,} tokens that data.max_length leaves: raise it")
        for name, ids in answers.items():
            self.counts[f"truncated_{name}"] += len(ids) > room
        return cut

    @staticmethod
    def _check_equal(answers: dict[str, list[int]], reason: str) -> None:
        if "rejected" in answers and answers["chosen"] == answers["rejected"]:
            raise FieldError("chosen", reason)


def _shared_length(one: list[int], other: list[int]) -> int:
    if other[: len(one)] == one:
        return len(one)
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
