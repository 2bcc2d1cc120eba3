"""Token ids of pairs as tensors for one forward pass.

Two layouts, equal per token:

- **shared prompt**: a row ``[prompt | chosen | rejected]`` a pair. Positions restart after the prompt for the rejected
  answer, and the attention mask keeps it from seeing the chosen one, so that the prompt is computed once.
- **separate**: a row ``[prompt | answer]`` an answer, all chosen rows first; for models whose layers cannot take a
  mask of their own (sliding windows, recurrent layers).

Both name the completion tokens by flat index: ``source`` is the position whose hidden state predicts, ``target`` the
token that is predicted, ``answer`` the completion that it belongs to (``i`` chosen of pair i, ``B + i`` rejected).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING, PROMPT, CHOSEN, REJECTED = -1, 0, 1, 2


@dataclass(frozen=True)
class PairRows:
    """B pairs in R rows of T positions with N completion tokens in all.

    Args:
        input_ids: token ids, right-padded, (R, T).
        position_ids: position of each token in its own sequence, (R, T).
        segments: PROMPT, CHOSEN, REJECTED or PADDING, (R, T).
        source: index into the flattened (R * T) positions: where the token is predicted, (N,).
        target: the predicted token id, (N,).
        answer: which completion the token belongs to, in [0, 2 B), (N,).
        pairs: B.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    source: Tensor
    target: Tensor
    answer: Tensor
    pairs: int

    @property
    def shared_prompt(self) -> bool:
        """Whether a row holds both answers of a pair."""
        return len(self.input_ids) == self.pairs

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

    def lengths(self) -> Tensor:
        """Completion tokens of each answer, (2 B,)."""
        return torch.bincount(self.answer, minlength=2 * self.pairs)

    def totals(self, token_values: Tensor) -> Tensor:
        """Sum of (N,) token values by answer, (2 B,), in float32 or better."""
        out = torch.zeros(2 * self.pairs, dtype=torch.float32, device=token_values.device)
        return out.index_add(0, self.answer, token_values.float())


def pair_rows(
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    shared_prompt: bool = True,
) -> PairRows:
    """Lay out B pairs of token ids.

    Args:
        prompts, chosen, rejected: token ids, one sequence a pair; answers include their EOS.
        pad_token_id: fills the rows on the right; never scored and never attended to.
        shared_prompt: one row a pair, or one row an answer.

    Raises:
        ValueError: the lists differ in length, or a prompt or an answer is empty.
    """
    if not len(prompts) == len(chosen) == len(rejected):
        raise ValueError(f"{len(prompts)} prompts, {len(chosen)} chosen and {len(rejected)} rejected answers")
    for name, parts in (("prompt", prompts), ("chosen", chosen), ("rejected", rejected)):
        for row, ids in enumerate(parts):
            if len(ids) == 0:
                raise ValueError(
                    f"row {row}: {name} is empty; the first answer token needs something to be predicted from"
                )
    pairs = len(prompts)
    rows: list[list[tuple[Sequence[int], int]]]
    if shared_prompt:
        rows = [[(p, PROMPT), (w, CHOSEN), (r, REJECTED)] for p, w, r in zip(prompts, chosen, rejected, strict=True)]
    else:
        rows = [[(p, PROMPT), (w, CHOSEN)] for p, w in zip(prompts, chosen, strict=True)]
        rows += [[(p, PROMPT), (r, REJECTED)] for p, r in zip(prompts, rejected, strict=True)]
    width = max((sum(len(ids) for ids, _ in row) for row in rows), default=0)

    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    position_ids = torch.zeros((len(rows), width), dtype=torch.long)
    segments = torch.full((len(rows), width), PADDING, dtype=torch.long)
    source: list[int] = []
    target: list[int] = []
    answer: list[int] = []
    for index, row in enumerate(rows):
        prompt_length = len(row[0][0])
        start = 0
        for ids, segment in row:
            end = start + len(ids)
            first = 0 if segment == PROMPT else prompt_length
            input_ids[index, start:end] = torch.as_tensor(ids, dtype=torch.long)
            position_ids[index, start:end] = torch.arange(first, first + len(ids))
            segments[index, start:end] = segment
            if segment != PROMPT:
                # The first token of an answer is predicted at the prompt's last position, whatever lies between.
                offset = index * width
                source += [offset + prompt_length - 1, *range(offset + start, offset + end - 1)]
                target += ids
                answer += [index % pairs + (pairs if segment == REJECTED else 0)] * len(ids)
            start = end
    return PairRows(
        input_ids, position_ids, segments, torch.tensor(source), torch.tensor(target), torch.tensor(answer), pairs
    )
