"""Token ids of prompts and answers as the tensors of one forward pass.

Two layouts, equal per token:

- **shared prompt**: a row ``[prompt | chosen | rejected]`` a pair, or ``[prompt | first | second | ...]`` a group.
  Positions restart after the prompt for every answer, and the attention mask keeps it from seeing the others, so that
  the prompt is computed once.
- **separate**: a row ``[prompt | answer]`` an answer; for models whose layers cannot take a mask of their own (sliding
  windows, recurrent layers).

Both name the answers' tokens by flat index: ``source`` is the position whose hidden state predicts, ``target`` the
token that is predicted, ``answer`` the answer that it belongs to. Of B pairs, the chosen answers are 0 to B - 1 and
the rejected ones B to 2 B - 1; of B groups, the k-th answers are k B to (k + 1) B - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        segments: PROMPT, FIRST or SECOND answer of the row (or a later one), or PADDING, (R, T).
        source: index into the flattened (R * T) positions: where the token is predicted, (N,).
        target: the predicted token id, (N,).
        answer: which answer the token belongs to, in [0, A), (N,).
        answers: A.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    source: Tensor
    target: Tensor
    answer: Tensor
    answers: int

    @property
    def shared_prompt(self) -> bool:
        """Whether a row holds several answers."""
        return len(self.input_ids) < self.answers

    def attention_mask(self) -> Tensor:
        """What the model is given: (R, 1, T, T), True where attention is allowed, or (R, T) for separate rows.

        A query sees keys that are not after it and of the prompt or of its own answer. Padding sees the prompt (a row
        of the mask that allows nothing is NaN in some kernels) and is seen by nothing that is scored.
        """
        if not self.shared_prompt:
            return (self.segments != PADDING).long()
        length = self.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        return (causal & ((key == PROMPT) | (key == query)))[:, None]

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if name != "answers"}
        return Rows(**moved, answers=self.answers)

    def lengths(self) -> Tensor:
        """Tokens of each answer, (A,)."""
        return torch.bincount(self.answer, minlength=self.answers)

    def totals(self, token_values: Tensor) -> Tensor:
        """Sum of (N,) token values by answer, (A,), in float32; float64 stays float64."""
        values = token_values.to(torch.promote_types(token_values.dtype, torch.float32))
        return values.new_zeros(self.answers).index_add(0, self.answer, values)


def pair_rows(
    prompts: Sequence[Ids], chosen: Sequence[Ids], rejected: Sequence[Ids], *, pad_token_id: int, shared_prompt: bool
) -> Rows:
    """Lay out B pairs, in B rows or in 2 B.

    Args:
        prompts, chosen, rejected: token ids, one sequence a pair; answers include their EOS.
        pad_token_id: fills the rows on the right; never scored and never attended to.
        shared_prompt: one row a pair, or one row an answer, all chosen ones first.

    Raises:
        ValueError: the lists differ in length, or a prompt or an answer is empty.
    """
    if not len(prompts) == len(chosen) == len(rejected):
        raise ValueError(f"{len(prompts)} prompts, {len(chosen)} chosen and {len(rejected)} rejected answers")
    if shared_prompt:
        rows = [(p, [w, r]) for p, w, r in zip(prompts, chosen, rejected, strict=True)]
    else:
        rows = [(p, [a]) for half in (chosen, rejected) for p, a in zip(prompts, half, strict=True)]
    return _lay_out(rows, pad_token_id)


def group_rows(
    prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]], *, pad_token_id: int, shared_prompt: bool
) -> Rows:
    """Lay out K answers to each of B prompts, in B rows or in K B.

    Args:
        prompts: token ids.
        answers: K sequences of token ids to each.
        pad_token_id: fills the rows on the right; never scored and never attended to.
        shared_prompt: one row a prompt, or one row an answer, all first ones first.

    Raises:
        ValueError: not the same number of answers to each prompt, or a prompt or an answer is empty.
    """
    if len(prompts) != len(answers) or len({len(group) for group in answers}) > 1:
        raise ValueError(
            f"{len(prompts)} prompts and groups of {sorted({len(group) for group in answers})} answers to "
            f"{len(answers)}: each has the same number"
        )
    if shared_prompt:
        return _lay_out(list(zip(prompts, answers, strict=True)), pad_token_id)
    numbers = range(len(answers[0]) if answers else 0)
    rows = [(p, [group[k]]) for k in numbers for p, group in zip(prompts, answers, strict=True)]
    return _lay_out(rows, pad_token_id)


def answer_rows(prompts: Sequence[Ids], answers: Sequence[Ids], *, pad_token_id: int) -> Rows:
    """Lay out one answer a prompt, each in a row of its own.

    Raises:
        ValueError: the lists differ in length, or a prompt or an answer is empty.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts and {len(answers)} answers")
    return _lay_out([(p, [a]) for p, a in zip(prompts, answers, strict=True)], pad_token_id)


def _lay_out(rows: Sequence[tuple[Ids, Sequence[Ids]]], pad_token_id: int) -> Rows:
    """``(prompt, answers)`` a row. The k-th answer of row i is answer ``k * R + i``."""
    for index, (prompt, answers) in enumerate(rows):
        if len(prompt) == 0:
            raise ValueError(f"row {index}: the prompt is empty; an answer's first token is predicted from something")
        if any(len(ids) == 0 for ids in answers):
            raise ValueError(f"row {index}: an answer is empty")
    width = max((len(prompt) + sum(len(ids) for ids in answers) for prompt, answers in rows), default=0)
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    position_ids = torch.zeros((len(rows), width), dtype=torch.long)
    segments = torch.full((len(rows), width), PADDING, dtype=torch.long)
    source: list[int] = []
    target: list[int] = []
    answer: list[int] = []
    for index, (prompt, answers) in enumerate(rows):
        start = 0
        for segment, ids in enumerate([prompt, *answers]):
            end = start + len(ids)
            first = 0 if segment == PROMPT else len(prompt)
            input_ids[index, start:end] = torch.as_tensor(ids, dtype=torch.long)
            position_ids[index, start:end] = torch.arange(first, first + len(ids))
            segments[index, start:end] = segment
            if segment != PROMPT:
                # The first token of an answer is predicted at the prompt's last position, whatever lies between.
                offset = index * width
                source += [offset + len(prompt) - 1, *range(offset + start, offset + end - 1)]
                target += ids
                answer += [(segment - 1) * len(rows) + index] * len(ids)
            start = end
    count = sum(len(answers) for _, answers in rows)
    flat = {"source": source, "target": target, "answer": answer}
    tokens = {name: torch.tensor(values, dtype=torch.long) for name, values in flat.items()}
    return Rows(input_ids, position_ids, segments, **tokens, answers=count)
