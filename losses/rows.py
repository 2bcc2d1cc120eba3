"""Token ids of prompts and answers as the tensors of one forward pass.

Two layouts, equal per token:

- **shared prompt**: ``[prompt | chosen | rejected]`` for a pair, or ``[prompt | first | second | ...]`` for a group.
  Positions restart after the prompt for every answer, and the attention mask keeps it from seeing the others, so that
  the prompt is computed once.
- **separate**: a row ``[prompt | answer]`` an answer; for models whose layers cannot take a mask of their own (sliding
  windows, recurrent layers).

**Packing** puts several groups into a row, in as few rows as a budget of tokens allows. Positions restart with every
group, and the mask keeps groups apart, so that a group's values and gradients are those that it has alone. It asks of
a model what shared prompts ask: a mask and positions of our own.

All name the answers' tokens by flat index: ``source`` is the position whose hidden state predicts, ``target`` the
token that is predicted, ``answer`` the answer that it belongs to. Of B pairs, the chosen answers are 0 to B - 1 and
the rejected ones B to 2 B - 1; of B groups, the k-th answers are k B to (k + 1) B - 1. Where a group stands changes
none of these numbers, nor the order of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

PADDING, PROMPT, FIRST, SECOND = -1, 0, 1, 2

Ids = Sequence[int]


@dataclass(frozen=True)
class Rows:
    """A answers in R rows of T positions, with N answer tokens in all.

    Args:
        input_ids: token ids, right-padded, (R, T).
        position_ids: position of each token in its own sequence, (R, T).
        segments: PROMPT, FIRST or SECOND answer of its group (or a later one), or PADDING, (R, T).
        groups: number of the pair, or of the prompt and its answers, that the position belongs to, or PADDING, (R, T).
        source: index into the flattened (R * T) positions: where the token is predicted, (N,).
        target: the predicted token id, (N,).
        answer: which answer the token belongs to, in [0, A), (N,).
        answers: A.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    groups: Tensor
    source: Tensor
    target: Tensor
    answer: Tensor
    answers: int

    @property
    def masked(self) -> bool:
        """Whether a row holds several answers, which only the mask keeps apart."""
        return len(self.input_ids) < self.answers

    @property
    def padding(self) -> float:
        """Fraction of the positions that hold nothing."""
        return float((self.segments == PADDING).float().mean())

    def attention_mask(self) -> Tensor:
        """What the model is given: (R, 1, T, T), True where attention is allowed; (R, T) where rows hold one answer.

        A query sees keys that are not after it, of its own group, and there of the prompt or of its own answer.
        Padding sees padding, since a row of the mask that allows nothing is NaN in some kernels; nothing else sees it.
        """
        if not self.masked:
            return (self.segments != PADDING).long()
        length = self.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        together = self.groups[:, :, None] == self.groups[:, None, :]
        return (causal & together & ((key == PROMPT) | (key == query)))[:, None]

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same rule by index, ``(row, head, query, key) -> allowed``, as FlexAttention asks for it."""
        segments, groups = self.segments, self.groups

        def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            together = groups[row, query] == groups[row, key]
            in_sight = (segments[row, key] == PROMPT) | (segments[row, key] == segments[row, query])
            return (key <= query) & together & in_sight

        return allowed

    def prompt_ends(self) -> Tensor:
        """Flat position of the last token of each answer's prompt, (A,)."""
        least = self.source.new_full((self.answers,), self.segments.numel())
        return least.scatter_reduce(0, self.answer, self.source, "amin")

    def last_tokens(self) -> Tensor:
        """Flat position of each answer's own last token, (A,)."""
        groups = int(self.groups.max()) + 1
        places = (self.segments >= FIRST).flatten().nonzero()[:, 0]
        answer = ((self.segments - FIRST) * groups + self.groups).flatten()[places]
        return places.new_zeros(self.answers).scatter_reduce(0, answer, places, "amax")

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on another device."""
        return Rows(**{name: value.to(device) for name, value in self.tensors().items()}, answers=self.answers)

    def tensors(self) -> dict[str, Tensor]:
        """All but the number of answers, by name, as a batch carries them; ``of`` puts them together again."""
        return {name: value for name, value in vars(self).items() if name != "answers"}

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], answers: int) -> Rows:
        """The rows of a batch that holds their tensors, besides others."""
        names = [field.name for field in fields(cls) if field.name != "answers"]
        return cls(**{name: batch[name] for name in names}, answers=answers)

    def lengths(self) -> Tensor:
        """Tokens of each answer, (A,)."""
        return torch.bincount(self.answer, minlength=self.answers)

    def totals(self, token_values: Tensor) -> Tensor:
        """Sum of (N,) token values by answer, (A,), in float32; float64 stays float64."""
        values = token_values.to(torch.promote_types(token_values.dtype, torch.float32))
        return values.new_zeros(self.answers).index_add(0, self.answer, values)


def pair_rows(
    prompts: Sequence[Ids],
    chosen: Sequence[Ids],
    rejected: Sequence[Ids],
    *,
    pad_token_id: int,
    shared_prompt: bool,
    row_tokens: int | None = None,
) -> Rows:
    """Lay out B pairs.

    Args:
        prompts, chosen, rejected: token ids, one sequence a pair; answers include their EOS.
        pad_token_id: fills the rows on the right; never scored and never attended to.
        shared_prompt: the prompt once for both answers, or each answer with its own prompt, all chosen ones first.
        row_tokens: None is a row a pair (or an answer, where prompts are not shared). A number packs several into a
            row of at most so many tokens, or as many as the longest one has: so 0 makes no row wider than it was.

    Raises:
        ValueError: the lists differ in length, or a prompt or an answer is empty.
    """
    if not len(prompts) == len(chosen) == len(rejected):
        raise ValueError(f"{len(prompts)} prompts, {len(chosen)} chosen and {len(rejected)} rejected answers")
    if shared_prompt:
        groups = [(p, [w, r]) for p, w, r in zip(prompts, chosen, rejected, strict=True)]
    else:
        groups = [(p, [a]) for half in (chosen, rejected) for p, a in zip(prompts, half, strict=True)]
    return _lay_out(groups, pad_token_id, row_tokens)


def group_rows(
    prompts: Sequence[Ids],
    answers: Sequence[Sequence[Ids]],
    *,
    pad_token_id: int,
    shared_prompt: bool,
    row_tokens: int | None = None,
) -> Rows:
    """Lay out K answers to each of B prompts.

    Args:
        prompts: token ids.
        answers: K sequences of token ids to each.
        pad_token_id: fills the rows on the right; never scored and never attended to.
        shared_prompt: the prompt once for all its answers, or each answer with its own prompt, all first ones first.
        row_tokens: as in ``pair_rows``.

    Raises:
        ValueError: not the same number of answers to each prompt, or a prompt or an answer is empty.
    """
    if len(prompts) != len(answers) or len({len(group) for group in answers}) > 1:
        raise ValueError(
            f"{len(prompts)} prompts and groups of {sorted({len(group) for group in answers})} answers to "
            f"{len(answers)}: each has the same number"
        )
    if shared_prompt:
        return _lay_out(list(zip(prompts, answers, strict=True)), pad_token_id, row_tokens)
    numbers = range(len(answers[0]) if answers else 0)
    groups = [(p, [group[k]]) for k in numbers for p, group in zip(prompts, answers, strict=True)]
    return _lay_out(groups, pad_token_id, row_tokens)


def answer_rows(
    prompts: Sequence[Ids], answers: Sequence[Ids], *, pad_token_id: int, row_tokens: int | None = None
) -> Rows:
    """Lay out one answer a prompt, each in a row of its own or, with ``row_tokens`` as in ``pair_rows``, packed.

    Raises:
        ValueError: the lists differ in length, or a prompt or an answer is empty.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts and {len(answers)} answers")
    return _lay_out([(p, [a]) for p, a in zip(prompts, answers, strict=True)], pad_token_id, row_tokens)


def shape_of(lengths: Sequence[int], row_tokens: int | None) -> tuple[int, int]:
    """(R, T) of the rows that groups of these lengths are laid out in; ``row_tokens`` as in ``pair_rows``."""
    return _shape(_places(lengths, row_tokens), lengths)


def _shape(places: Sequence[tuple[int, int]], lengths: Sequence[int]) -> tuple[int, int]:
    return (
        max((row + 1 for row, _ in places), default=0),
        max((start + length for (_, start), length in zip(places, lengths, strict=True)), default=0),
    )


def _lay_out(groups: Sequence[tuple[Ids, Sequence[Ids]]], pad_token_id: int, row_tokens: int | None) -> Rows:
    """``(prompt, answers)`` a group. Of G groups, the k-th answer of group i is answer ``k * G + i``."""
    for index, (prompt, answers) in enumerate(groups):
        if len(prompt) == 0:
            raise ValueError(f"row {index}: the prompt is empty; an answer's first token is predicted from something")
        if any(len(ids) == 0 for ids in answers):
            raise ValueError(f"row {index}: an answer is empty")
    lengths = [len(prompt) + sum(len(ids) for ids in answers) for prompt, answers in groups]
    places = _places(lengths, row_tokens)
    shape = _shape(places, lengths)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, PADDING, dtype=torch.long)
    numbers = torch.full(shape, PADDING, dtype=torch.long)
    source: list[int] = []
    target: list[int] = []
    answer: list[int] = []
    for index, ((prompt, answers), (row, begin)) in enumerate(zip(groups, places, strict=True)):
        numbers[row, begin : begin + lengths[index]] = index
        start, offset = begin, row * shape[1]
        for segment, ids in enumerate([prompt, *answers]):
            end = start + len(ids)
            first = 0 if segment == PROMPT else len(prompt)
            input_ids[row, start:end] = torch.as_tensor(ids, dtype=torch.long)
            position_ids[row, start:end] = torch.arange(first, first + len(ids))
            segments[row, start:end] = segment
            if segment != PROMPT:
                # The first token of an answer is predicted at the prompt's last position, whatever lies between.
                source += [offset + begin + len(prompt) - 1, *range(offset + start, offset + end - 1)]
                target += ids
                answer += [(segment - 1) * len(groups) + index] * len(ids)
            start = end
    count = sum(len(answers) for _, answers in groups)
    flat = {"source": source, "target": target, "answer": answer}
    tokens = {name: torch.tensor(values, dtype=torch.long) for name, values in flat.items()}
    return Rows(input_ids, position_ids, segments, numbers, **tokens, answers=count)


def _places(lengths: Sequence[int], row_tokens: int | None) -> list[tuple[int, int]]:
    """Row and first position of each group: in as few rows as the budget allows, and those no wider than it takes."""
    if row_tokens is None or not lengths:
        return [(row, 0) for row in range(len(lengths))]
    least = max(lengths)
    most = max(row_tokens, least)
    places, rows = _first_fit(lengths, most)
    while least < most:
        middle = (least + most) // 2
        tried, count = _first_fit(lengths, middle)
        if count <= rows:
            places, rows, most = tried, count, middle
        else:
            least = middle + 1
    return places


def _first_fit(lengths: Sequence[int], width: int) -> tuple[list[tuple[int, int]], int]:
    """Row and first position of each group, and the number of rows: by falling length, into the first with room."""
    places = [(0, 0)] * len(lengths)
    used: list[int] = []
    for group in sorted(range(len(lengths)), key=lambda group: -lengths[group]):
        row = next((row for row, tokens in enumerate(used) if tokens + lengths[group] <= width), len(used))
        if row == len(used):
            used.append(0)
        places[group] = row, used[row]
        used[row] += lengths[group]
    return places, len(used)
