"""Token ids of many rows in one array: what is kept in a file, and what goes from one process to another."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .fields import FieldError

Encoded = tuple[list[int], dict[str, list[int]]]
"""Ids of a prompt, and of each answer to it by name."""

_numbers: NDArray[np.object_] = np.empty(0, dtype=object)


@dataclass(frozen=True)
class Encodings:
    """Rows of a prompt and its answers as token ids.

    Attributes:
        tokens: of all rows, one after the other, int32.
        lengths: of the prompt and of each answer of the rows that can be used, in that order, int32.
        problems: of the others by place: the field, and what is wrong.
        counts: of what was cut and found, as the encoder counts it.
        moved_tail: the first end of a prompt that is tokenised otherwise when an answer follows; empty where none is.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    problems: dict[int, tuple[str, str]]
    counts: dict[str, int] = field(default_factory=dict)
    moved_tail: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Iterable[Encoded | FieldError]) -> Encodings:
        """The rows, packed."""
        tokens, lengths, problems = array("i"), array("i"), {}
        for place, row in enumerate(rows):
            if isinstance(row, FieldError):
                problems[place] = (row.field, row.reason)
                continue
            for ids in (row[0], *row[1].values()):
                tokens.extend(ids)
                lengths.append(len(ids))
        return cls(np.array(tokens, dtype=np.int32), np.array(lengths, dtype=np.int32), problems)

    @classmethod
    def joined(cls, parts: Sequence[tuple[int, Encodings]]) -> Encodings:
        """Several, in order, each with the place of its first row."""
        counts: Counter[str] = Counter()
        for _, part in parts:
            counts.update(part.counts)
        return cls(
            np.concatenate([part.tokens for _, part in parts]),
            np.concatenate([part.lengths for _, part in parts]),
            {start + place: what for start, part in parts for place, what in part.problems.items()},
            dict(counts),
            next((part.moved_tail for _, part in parts if part.moved_tail), []),
        )

    def rows(self, names: Iterable[Sequence[str]]) -> Iterator[Encoded | FieldError]:
        """Row by row, given the names of each row's answers.

        Equal ids are one object: a list takes 8 bytes a token, not 40.
        """
        lengths, ids, start = iter(self.lengths.tolist()), _shared_integers(self.tokens), 0

        def take() -> list[int]:
            nonlocal start
            first, start = start, start + next(lengths)
            return ids[first:start]

        for place, answers in enumerate(names):
            if place in self.problems:
                yield FieldError(*self.problems[place])
            else:
                yield take(), {name: take() for name in answers}


def _shared_integers(tokens: NDArray[np.int32]) -> list[int]:
    global _numbers
    size = int(tokens.max(initial=-1)) + 1
    if size > len(_numbers):
        _numbers = np.arange(size).astype(object)
    found: list[int] = _numbers[tokens].tolist()
    return found
