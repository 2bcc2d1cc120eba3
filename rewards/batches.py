"""Rows of token ids as batches: held to a limit, sorted by length, padded, and their results put back in order."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from .encoding import ended_once

logger = logging.getLogger(__name__)

Ids = Sequence[int]
TOGETHER = 4
"""Answers to a prompt in a row, at most: attention costs the square of a row's length."""


def fit_answers(
    prompt_ids: Sequence[Ids],
    completion_ids: Sequence[Ids],
    *,
    eos_token_id: int,
    max_length: int | None,
    cut: bool = True,
) -> list[list[int]]:
    """Answers with one end token each, held to ``max_length`` with their prompts.

    An answer that is too long keeps its first tokens and its end token, and one warning says how many were cut.

    Args:
        cut: False refuses instead.

    Raises:
        ValueError: sizes that differ, an empty answer, one that is refused, or a prompt that leaves no room for one.
    """
    if len(prompt_ids) != len(completion_ids):
        raise ValueError(f"{len(prompt_ids)} prompts and {len(completion_ids)} completions: one completion a prompt")
    fitted, shortened = [], []
    for row, (prompt, answer) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        ids = ended_once(answer, eos_token_id)
        if len(ids) == 1:
            raise ValueError(f"row {row}: the answer is empty: there is nothing to score")
        if max_length is not None and len(prompt) + len(ids) > max_length:
            if len(prompt) + 2 > max_length:
                raise ValueError(
                    f"row {row}: the prompt has {len(prompt):,} tokens, which leaves no room for an answer in "
                    f"max_length {max_length:,}"
                )
            if not cut:
                raise ValueError(f"row {row}: {len(prompt) + len(ids):,} tokens, over max_length {max_length:,}")
            ids = [*ids[: max_length - len(prompt) - 1], eos_token_id]
            shortened.append(row)
        fitted.append(ids)
    if shortened:
        logger.warning(
            "%d of %d answers were cut to fit max_length %d with their prompts, the first in row %d: what was cut is "
            "not judged.",
            len(shortened),
            len(fitted),
            max_length,
            shortened[0],
        )
    return fitted


def by_length(rows: Sequence[Ids], batch_size: int) -> Iterator[list[int]]:
    """Numbers of rows of like length, longest first, so that too large a batch fails at once.

    Raises:
        ValueError: batch_size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be positive")
    # Of equal length by their ids, so that the same rows make the same batches in whatever order they come.
    order = sorted(range(len(rows)), key=lambda row: (-len(rows[row]), list(rows[row])))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def by_prompt(prompts: Sequence[Ids], answers: Sequence[Ids], batch_size: int) -> Iterator[list[list[int]]]:
    """Numbers of rows in batches of groups: of a group all have one prompt, and the groups of a batch are of one size.

    Args:
        batch_size: answers in a batch, at most.

    Raises:
        ValueError: batch_size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be positive")
    of: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        of.setdefault(tuple(prompt), []).append(row)
    most, groups = min(TOGETHER, batch_size), []
    for rows in of.values():
        # By their ids where lengths are equal, as in ``by_length``.
        rows.sort(key=lambda row: (-len(answers[row]), list(answers[row])))
        groups += [rows[start : start + most] for start in range(0, len(rows), most)]

    def size(group: list[int]) -> tuple[int, int, list[int]]:
        tokens = len(prompts[group[0]]) + sum(len(answers[row]) for row in group)
        return -len(group), -tokens, [*prompts[group[0]], *answers[group[0]]]

    for count, alike in groupby(sorted(groups, key=size), key=len):
        same, at_once = list(alike), batch_size // count
        for start in range(0, len(same), at_once):
            yield same[start : start + at_once]


def distinct(*columns: Sequence[Ids]) -> tuple[list[int], Tensor]:
    """Numbers of the rows that differ from all before them, and for each row which of those it is, (N,)."""
    places: dict[tuple[tuple[int, ...], ...], int] = {}
    first: list[int] = []
    which = []
    for number, row in enumerate(zip(*columns, strict=True)):
        place = places.setdefault(tuple(tuple(ids) for ids in row), len(first))
        if place == len(first):
            first.append(number)
        which.append(place)
    return first, torch.tensor(which, dtype=torch.long)


def padded(rows: Sequence[Ids], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, and the mask of real tokens, (B, T) each."""
    longest = max(len(row) for row in rows)
    ids = [[*row, *[pad_token_id] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def in_order(found: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """Results of batches with the numbers of their rows, in the order of the rows, in memory of the CPU."""
    rows = torch.tensor([row for order, _ in found for row in order])
    values = torch.cat([values for _, values in found]).cpu()
    return torch.empty_like(values).index_copy_(0, rows, values)
