"""What a constraint is, the vocabulary that it speaks of, and its errors."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

State = Any  # opaque to everybody but its constraint; never None
Fault = Literal["", "function", "later"]
"""Whose it is that something failed: "" of who asked, "function" of who gave a function that was called, "later"
nobody's, and the same may be asked again in some seconds."""


class ConstraintError(ValueError):
    """A constraint cannot be built, or failed on a text: it names the constraint, the place and the reason.

    Only the request whose constraint failed dies of it.

    Attributes:
        fault: whose it is.
    """

    fault: Fault = ""


class StoppedError(ConstraintError):
    """It was stopped, since it took too long or its process ended: to ask it once more would cost as much again."""


class FunctionError(ConstraintError):
    """A function that the constraint calls, or a potential, raised, gave no verdict, or cannot be imported."""

    fault = "function"


class StoppedFunctionError(StoppedError):
    """A function that the constraint calls took too long, or its process ended."""

    fault = "function"


class RestartingError(StoppedError):
    """Such a function was stopped by another request, and its process is not up yet."""

    fault = "later"


@runtime_checkable
class Constraint(Protocol):
    """The texts that an answer may be, asked one token at a time; ``conformance.check`` tries any of them.

    Prefix-closed: ``advance`` gives a state if and only if some continuation of the text so far is wanted. A
    constraint that cannot look that far (a predicate, AND of two constraints) may keep texts that nothing completes:
    those particles get the weight zero where they end up, which costs particles and never correctness. What it must
    never do is refuse a text that can still be completed.

    A state is a value: ``advance`` never changes the state it is given, so a particle forks by keeping it. States may
    be compared and hashed or not, as the constraint likes; they belong to the constraint that made them.
    """

    def start(self) -> State:
        """The state of the empty text. ``ConstraintError`` where nothing at all satisfies the constraint."""
        ...

    def advance(self, state: State, token: int) -> State | None:
        """The state after one more token, or None where the token is not allowed; never asked of an end token."""
        ...

    def may_end(self, state: State) -> bool:
        """Whether the text so far is wanted as it stands, so that an end token may follow."""
        ...


@runtime_checkable
class Masking(Protocol):
    """What a constraint can do besides, where it knows its whole set of next tokens at the price of a few."""

    def allowed(self, state: State) -> np.ndarray | None:
        """Which tokens ``advance`` would take: bool, (size of the vocabulary,), end tokens False. None: ask each."""
        ...


@runtime_checkable
class Prefiltering(Protocol):
    """A constraint with a part that rules out most tokens at the price of a few, so that the rest is seldom asked."""

    def prefilter(self, state: State) -> np.ndarray | None:
        """Tokens that may yet be allowed: as ``Masking.allowed``, True for more. None: there is no such part here."""
        ...


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The bytes that every token of a tokenizer stands for.

    Texts are bytes here: a token may end inside a character, and different tokens may stand for the same bytes.
    What an answer says is the concatenation of its tokens, so sentencepiece's first ``▁`` is a space as any other.

    Attributes:
        tokens: bytes of each id, one for each column of the logits; None for an id that is never allowed within an
            answer: special tokens, columns that no token has, and tokens that stand for nothing.
        ends: ids that end an answer, at least one; ``tokens`` has None for them.
    """

    tokens: Sequence[bytes | None] = field(repr=False)
    ends: frozenset[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(token or None for token in self.tokens))
        object.__setattr__(self, "ends", frozenset(self.ends))
        if not self.ends:
            raise ConstraintError("vocabulary: no end token, so no answer could ever end; name one in `ends`")
        for end in sorted(self.ends):
            if not 0 <= end < self.size:
                raise ConstraintError(f"vocabulary: end token {end} is not among its {self.size:,} tokens")
            if self.tokens[end] is not None:
                raise ConstraintError(
                    f"vocabulary: end token {end} also has bytes, {self.tokens[end]!r}; give it None"
                )

    @property
    def size(self) -> int:
        """Number of columns of the logits."""
        return len(self.tokens)

    @cached_property
    def usable(self) -> np.ndarray:
        """Ids that stand for bytes, ascending: the tokens that a constraint may be asked about."""
        return np.array([index for index, token in enumerate(self.tokens) if token is not None], dtype=np.int64)

    def bytes(self, ids: Iterable[int]) -> bytes:
        """What the tokens say; special tokens and end tokens say nothing."""
        return b"".join(self.tokens[index] or b"" for index in ids)

    def text(self, ids: Iterable[int]) -> str:
        """``bytes`` as text, with U+FFFD for bytes that are no character."""
        return self.bytes(ids).decode("utf-8", errors="replace")

    @classmethod
    def of(cls, tokenizer: Any, *, size: int | None = None, ends: Collection[int] | None = None) -> Vocabulary:
        """The vocabulary of a transformers tokenizer (a fast one): byte-level, sentencepiece, or whole words.

        Args:
            tokenizer: one with a ``backend_tokenizer``. Tokens of a tokenizer without byte-level or sentencepiece
                decoder are taken as they are written.
            size: columns of the model's logits, where they are more than the tokenizer's tokens.
            ends: ids that end an answer; by default the tokenizer's ``eos_token_id``.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConstraintError(
                f"vocabulary: {type(tokenizer).__name__} has no backend_tokenizer to read bytes from; "
                "load the fast tokenizer, or build Vocabulary(tokens, ends) yourself"
            )
        ids = tokenizer.get_vocab()
        width = max(size or 0, 1 + max(ids.values()))
        if ends is None:
            if tokenizer.eos_token_id is None:
                raise ConstraintError("vocabulary: the tokenizer has no eos token; name the end tokens in `ends`")
            ends = [tokenizer.eos_token_id]
        read = _reader(backend)
        added = tokenizer.added_tokens_decoder
        never = {*tokenizer.all_special_ids, *ends, *(index for index, token in added.items() if token.special)}
        tokens: list[bytes | None] = [None] * width
        for token, index in ids.items():
            if index not in never:
                tokens[index] = token.encode() if index in added else read(token)
        return cls(tokens, frozenset(ends))


def _reader(backend: Any) -> Any:
    """How this tokenizer's written tokens become bytes, from the steps of its decoder."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "Fuse"}
    steps = decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds & {"ByteFallback", "Metaspace"} or any(step.get("content") == " " for step in steps):
        return _sentencepiece
    if kinds <= {"Fuse", "Strip"}:
        return str.encode
    raise ConstraintError(
        f"vocabulary: a decoder of type {', '.join(sorted(kinds))} is not known here, so the bytes of its tokens are "
        "not either; build Vocabulary(tokens, ends) yourself"
    )


# GPT-2's alphabet: bytes that print stand for themselves, the 68 others for the letters from U+0100 on.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in set(_PRINTED)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {chr(0x100 + rank): byte for rank, byte in enumerate(_HIDDEN)}


def _byte_level(token: str) -> bytes:
    if all(letter in _BYTE_OF for letter in token):
        return bytes(_BYTE_OF[letter] for letter in token)
    return token.encode()


def _sentencepiece(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
