"""How alike a model sees two answers: what tells, before any training, where the chosen one will lose likelihood.

An answer of n tokens, its end token counted, is predicted at n positions: at the prompt's last token, and at each of
its own tokens but the last. ``S`` is the sum of the final hidden states there (after the last norm: what the head
multiplies) and ``M = S / n``. The prompt's other positions, padding and the state at the end token are no part of it.

    CHES     = <S+, S-> - <S+, S+>  = <S+, S- - S+>
    CHES, ln = <M+, M-> - <M+, M+>  = <M+, M- - M+>

with + for the chosen and - for the rejected answer (arXiv:2410.08847, definitions 2 and 3). The higher, the more the
chosen answer falls with the rejected one. Scores scale as the square of the states, so they compare rows of one
model, and not models. For every measure here, higher means more alike.

Two numbers of 1e7 may differ by 1e5 or less. So states are added up in float64 (in float32 where a device has no
float64), the difference comes before the product, and the scores are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .types import check_type, first

TILE = 512
"""Positions that are widened at once: what summing needs beside the sums does not grow with rows or lengths."""


@dataclass(frozen=True)
class AnswerStates:
    """Hidden states of A answers, summed: what every measure but the edit distance needs.

    Args:
        total: sum of the states that predict an answer's tokens, in activation units, (A, D).
        last: the last of these, at the token before the end token, (A, D).
        length: how many they are, the answer's tokens with its end token, (A,).

    Raises:
        ValueError: shapes that do not match, or the answer that is empty or has a state that is not finite.
    """

    total: Tensor
    last: Tensor
    length: Tensor

    def __post_init__(self) -> None:
        for name, given in (("total", self.total), ("last", self.last), ("length", self.length)):
            check_type(name, given, Tensor)
        if self.total.ndim != 2 or self.last.shape != self.total.shape or self.length.shape != self.total.shape[:1]:
            raise ValueError(
                f"total and last have shape (A, D) and length (A,), not {tuple(self.total.shape)}, "
                f"{tuple(self.last.shape)} and {tuple(self.length.shape)}"
            )
        empty = self.length < 1
        if bool(empty.any()):
            raise ValueError(f"row {first(empty)[1:-1]}: the answer is empty: no hidden state predicts it")
        bad = ~torch.isfinite(self.total).all(dim=1)
        if bool(bad.any()):
            raise ValueError(f"row {first(bad)[1:-1]}: a hidden state is not finite")

    @classmethod
    def from_hidden(cls, hidden: Tensor, mask: Tensor) -> AnswerStates:
        """From the states of whole rows; padding may stand on either side, and hold anything.

        Args:
            hidden: final hidden states, (B, T, D).
            mask: true at the positions that predict the answer: the prompt's last token up to the token before the
                end token, (B, T).

        Raises:
            ValueError: shapes that do not match, a mask that is not Boolean, an empty answer, or a state that is not
                finite.
        """
        if hidden.ndim != 3 or mask.shape != hidden.shape[:2]:
            raise ValueError(f"hidden (B, T, D) and mask (B, T), not {tuple(hidden.shape)} and {tuple(mask.shape)}")
        if mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype}: it must be torch.bool")
        source = mask.flatten().nonzero()[:, 0]
        return cls.gather(hidden.flatten(0, 1), source, source // mask.shape[1], len(mask))

    @classmethod
    def gather(cls, states: Tensor, source: Tensor, answer: Tensor, answers: int) -> AnswerStates:
        """From the states of a forward pass and where in it each answer's tokens are predicted (``rows.Rows``).

        Args:
            states: final hidden states of all positions, flat, (P, D); others than those of ``source`` are not read.
            source: positions, those of one answer in their order, (N,).
            answer: which answer each is of, in [0, A), (N,).
            answers: A.

        Raises:
            ValueError: an empty answer, or a state that is not finite.
        """
        # A float64 sum does not show in which batch a row was; Apple's devices have none.
        wide = torch.float32 if states.device.type == "mps" else torch.float64
        total = torch.zeros(answers, states.shape[1], dtype=wide, device=states.device)
        for start in range(0, len(source), TILE):
            part = slice(start, start + TILE)
            total.index_add_(0, answer[part], states[source[part]].to(wide))
        length = torch.bincount(answer, minlength=answers)
        ends = torch.zeros(answers, dtype=torch.long, device=source.device).scatter_reduce(
            0, answer, torch.arange(len(source), device=source.device), "amax"
        )
        last = states[source[ends]].to(wide) if len(source) else total
        return cls(total, last, length)

    def __getitem__(self, part: slice) -> AnswerStates:
        """Some of the answers."""
        return AnswerStates(self.total[part], self.last[part], self.length[part])

    def to(self, device: torch.device | str) -> AnswerStates:
        """The same on another device."""
        return AnswerStates(self.total.to(device), self.last.to(device), self.length.to(device))


def ches(chosen: AnswerStates, rejected: AnswerStates) -> Tensor:
    """Centred hidden embedding similarity, ``<S+, S- - S+>`` (arXiv:2410.08847, definition 2).

    0 for equal answers, and for answers of one state each, which is the same one: there it says nothing.

    Returns:
        (B,), float64, in squared activation units; grows with both lengths.

    Raises:
        ValueError: as many chosen as rejected answers are wanted, of one width.
    """
    return _centred(chosen.total, rejected.total)


def ches_ln(chosen: AnswerStates, rejected: AnswerStates) -> Tensor:
    """Length-normalised CHES, ``<M+, M- - M+>`` (arXiv:2410.08847, definition 3): what data is filtered by.

    Returns:
        (B,), float64, in squared activation units.

    Raises:
        ValueError: as ``ches``.
    """
    return _centred(chosen.total / chosen.length[:, None], rejected.total / rejected.length[:, None])


def last_inner(chosen: AnswerStates, rejected: AnswerStates) -> Tensor:
    """Inner product of the last states, those before the end tokens: a baseline of arXiv:2410.08847.

    Returns:
        (B,), float64, in squared activation units.

    Raises:
        ValueError: as ``ches``.
    """
    _check_pairs(chosen.last, rejected.last)
    return (chosen.last.double() * rejected.last.double()).sum(dim=1)


def _centred(chosen: Tensor, rejected: Tensor) -> Tensor:
    _check_pairs(chosen, rejected)
    chosen, rejected = chosen.double(), rejected.double()
    return (chosen * (rejected - chosen)).sum(dim=1)


def _check_pairs(chosen: Tensor, rejected: Tensor) -> None:
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"chosen {tuple(chosen.shape)} and rejected {tuple(rejected.shape)}: as many of either, of one model"
        )


def edit_similarity(chosen: Sequence[int], rejected: Sequence[int]) -> float:
    """Minus the normalised edit distance, ``-Lev(y+, y-) / max(|y+|, |y-|)``, in [-1, 0] (a baseline of the paper).

    Args:
        chosen, rejected: token ids.

    Raises:
        ValueError: an answer is empty.
    """
    if not len(chosen) or not len(rejected):
        raise ValueError(f"the {'rejected' if len(chosen) else 'chosen'} answer is empty")
    return -edit_distance(chosen, rejected) / max(len(chosen), len(rejected))


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions that make one of the other.

    Column by column in bits (Hyyrö 2003): ``up`` and ``down`` say where the distance grows or falls by 1 from one
    token of ``one`` to the next. Answers of 1,000 tokens take milliseconds.
    """
    if not len(one):
        return len(other)
    places: dict[int, int] = {}
    for position, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << position
    every, last = (1 << len(one)) - 1, 1 << (len(one) - 1)
    up, down, distance = every, 0, len(one)
    for token in other:
        match = places.get(token, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        right = down | ~(diagonal | up)
        left = up & diagonal
        distance += bool(right & last) - bool(left & last)
        right, left = right << 1 | 1, left << 1
        up = (left | ~(diagonal | right)) & every
        down = right & diagonal & every
    return distance
