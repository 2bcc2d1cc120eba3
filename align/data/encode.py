"""The rules by which a prompt and its answers become token ids, for pairs and for single answers alike.

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

What a template wrote is tokenised from its last separator on for every answer, and up to it once a row: a special
token of the template cuts the text before it is tokenised, so that the parts' tokens are the whole's.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from align.errors import AlignError

from .encodings import Encoded, Encodings
from .fields import EMPTY, FieldError
from .rows import Content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_BATCH_ROWS = 512

Answers = Mapping[str, Content]
Question = tuple[Content, Answers]
"""A prompt and its answers by name, all text or all messages; no answers where the prompt is all that is asked for."""


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
        self._separator: str | None = None

    def encode(self, rows: Sequence[Question]) -> Encodings:
        """Prompt ids and answer ids of each row, or why it cannot be used; what is counted stands in the result."""
        apart = copy.copy(self)
        apart.counts, apart.moved_tail = dict.fromkeys(self.counts, 0), []
        found = Encodings.of(apart._encode(rows))
        return replace(found, counts=apart.counts, moved_tail=apart.moved_tail)

    def rows(self, rows: Sequence[Question]) -> Iterator[Encoded | FieldError]:
        """``encode``, counted, row by row."""
        return self.counted(self.encode(rows), rows)

    def counted(self, found: Encodings, rows: Sequence[Question]) -> Iterator[Encoded | FieldError]:
        """What ``encode`` has made of ``rows``, row by row; its counts are added to this encoder's."""
        for name, value in found.counts.items():
            self.counts[name] += value
        self.moved_tail = self.moved_tail or found.moved_tail
        return found.rows([list(answers) for _, answers in rows])

    def _encode(self, rows: Sequence[Question]) -> Iterator[Encoded | FieldError]:
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
        if not texts:
            return []
        different = list(dict.fromkeys(texts))  # a prompt stands once for each pair of its answers
        output = self.tokenizer(different, add_special_tokens=is_text, return_attention_mask=False, verbose=False)
        encoded = output["input_ids"]
        if is_text and self.adds_bos:
            bos = self.tokenizer.bos_token_id
            encoded = [ids[1:] if ids[:2] == [bos, bos] else ids for ids in encoded]
        if is_text and is_prompt and self.adds_eos:
            encoded = [ids[:-1] for ids in encoded]
        of_text = dict(zip(different, encoded, strict=True))
        return [of_text[text] for text in texts]

    def _tokenize(self, batch: Sequence[Question]) -> list[list[list[int]] | FieldError]:
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
            cuts = [0 if is_text else self._shared_part(text) for text in texts.values()]
            heads = self.ids([text[0][:cut] for text, cut in zip(texts.values(), cuts, strict=True) if cut], is_text)
            prompts = self.ids([text[0][cut:] for text, cut in zip(texts.values(), cuts, strict=True)], is_text)
            rest = [joint[cut:] for text, cut in zip(texts.values(), cuts, strict=True) for joint in text[1:]]
            joints, shared = iter(self.ids(rest, is_text, is_prompt=False)), iter(heads)
            for (index, text), prompt_ids, cut in zip(texts.items(), prompts, cuts, strict=True):
                head = next(shared) if cut else []
                result[index] = [head + prompt_ids, *(head + next(joints) for _ in text[1:])]
        return result

    def _shared_part(self, texts: list[str]) -> int:
        """How much of a prompt's and its answers' texts can be tokenised once: up to the prompt's last separator."""
        if self._separator is None:
            self._separator = separator(self.tokenizer, texts[0])
        cut = texts[0].rfind(self._separator) if self._separator else -1
        return cut if cut > 0 and all(text.startswith(texts[0][:cut]) for text in texts) else 0

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

    def _split(self, row: Question, ids: list[list[int]]) -> Encoded:
        """Cut prompt + answer into both, end the answers and hold them to the limit."""
        prompt, *joints = ids
        if not joints:
            return prompt, {}
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


def separator(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The special token of ``text`` that stands last and cuts it: what is before it never changes what follows.

    Such a token is found before text is normalised and split into words, takes no blanks from its left, and is the
    end of no other token's match. Empty where there is none, or where the tokenizer is not one of the ``tokenizers``
    library alone.
    """
    plain = tokenizer.is_fast and type(tokenizer).__module__.startswith("transformers.")
    added = list(tokenizer.added_tokens_decoder.values())
    if not plain or getattr(tokenizer, "split_special_tokens", False) or any(token.single_word for token in added):
        return ""
    cutting = [str(token.content) for token in added if token.special and not (token.normalized or token.lstrip)]
    places = {content: text.rfind(content) for content in cutting}
    last_first = sorted((content for content, place in places.items() if place > 0), key=lambda c: -places[c])
    return next((c for c in last_first if not any(_runs_into(str(token.content), c) for token in added)), "")


def _runs_into(one: str, other: str) -> bool:
    """Whether a match of ``one`` can begin before a match of ``other`` and reach into it."""
    return other in one[1:] or any(one[1:].endswith(other[:length]) for length in range(1, len(other)))


def _shared_length(one: list[int], other: list[int]) -> int:
    if other[: len(one)] == one:
        return len(one)
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
