"""What a row of feedback is, before any tokenizer has seen it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
Content = str | list[Message]
"""A prompt or an answer: text as it stands, or chat messages ``{"role": ..., "content": ...}``."""


@dataclass(frozen=True)
class PairRow:
    """One answer preferred to another, for one prompt.

    Attributes:
        row_id: hash of prompt, chosen and rejected: the same pair has the same id wherever it stands.
        source, row: the file, and the row in it, counted from 1 (in a JSONL file: the line).
        prompt, chosen, rejected: all three text, or all three messages.
        strength: weight of the pair in the mean loss, above 0.
        preference: probability that ``chosen`` is the preferred answer, in [0, 1]; None: it is, for sure.
        margin: by how much a reward model is to score ``chosen`` higher, in its units, 0 or more; None: not said.
    """

    row_id: str
    source: str
    row: int
    prompt: Content
    chosen: Content
    rejected: Content
    strength: float = 1.0
    preference: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class CompletionRow:
    """One answer to imitate. ``prompt`` is ``""`` for plain text, all of which is then learnt."""

    row_id: str
    source: str
    row: int
    prompt: Content
    completion: Content


@dataclass(frozen=True)
class Fault:
    """Why a row cannot be used: ``content`` is the row as it was read, fit for JSON."""

    source: str
    row: int
    field: str
    reason: str
    content: Any


@dataclass
class PairTable:
    """The pairs of one source, what was set aside, and counts.

    Attributes:
        counts: ``rows`` (read), ``pairs``, ``set_aside`` (rows), the kinds of rows (``explicit_prompt``,
            ``implicit_prompt``, ``rankings``, ``ratings``, ``signed_pairs``), ``ties`` (answers as good as each
            other: no pair), ``soft_labels`` (pairs with a ``preference``), ``duplicates`` (the same pair again),
            ``contradictions`` (the same pair the other way round) and ``prompt_repeated`` (both answers begin with
            the text of their prompt).
        unused: columns that were not read, and in how many rows they stand.
    """

    rows: list[PairRow]
    faults: list[Fault]
    counts: dict[str, int]
    source: str = ""
    unused: dict[str, int] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """SHA-256 over the pairs, their strengths, soft labels and margins, in order: equal ones train alike."""
        return _fingerprint(
            f"{row.row_id} {row.strength!r}"
            + ("" if row.preference is None else f" {row.preference!r}")
            + ("" if row.margin is None else f" margin {row.margin!r}")
            for row in self.rows
        )


@dataclass
class CompletionTable:
    """The answers of one source, what was set aside, and counts (``rows``, ``completions``, ``set_aside``, kinds)."""

    rows: list[CompletionRow]
    faults: list[Fault]
    counts: dict[str, int]
    source: str = ""
    unused: dict[str, int] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """SHA-256 over the answers, in order."""
        return _fingerprint(row.row_id for row in self.rows)


def row_id(*contents: Content) -> str:
    """16 hex digits that depend on the content alone: not on file, position or strength."""
    text = json.dumps(contents, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def bad_rows(faults: Iterable[Fault]) -> int:
    """How many rows the faults speak of; a row may have several."""
    return len({(fault.source, fault.row) for fault in faults})


def _fingerprint(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
