"""What is asked of a decoder, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from .constraints.memo import Memo
from .constraints.protocol import Constraint, Vocabulary
from .law import Law
from .smc import Result

Method = Literal["awrs-smc", "awrs", "mask", "rejection"]
METHODS: tuple[Method, ...] = get_args(Method)
Potential = Callable[[Sequence[tuple[int, ...]]], Sequence[float]]
"""Log-potentials, nats, of sequences of tokens (an end token is among them where there is one)."""


@dataclass(frozen=True)
class Request:
    """A prompt, what its answer must be, and how to draw it.

    Args:
        prompt: ids, up to where the answer begins.
        constraint: None for any text.
        method: ``awrs-smc`` resamples its particles; ``awrs`` only weights them; ``mask`` asks about all tokens of
            the vocabulary at every step and has exact weights; ``rejection`` has no weights.
        particles: how many sequences; one of them is drawn by weight in the end.
        law: the law that tokens are drawn from; weights are with respect to it.
        seed: of all that is random.
        max_new_tokens: longest answer, its end token counted. It is part of the constraint: at the last position only
            an end token is allowed.
        potential: graded wishes: log-potentials of sequences, by which the target is multiplied.
        potential_every: steps from one potential on the way to the next, to guide; 0: only of complete answers.
        threshold: share of the particles under which their effective number must fall for a resampling.

    Raises:
        ValueError: an argument is out of its range.
    """

    prompt: Sequence[int]
    constraint: Constraint | None
    method: Method = "awrs-smc"
    particles: int = 8
    law: Law = field(default_factory=Law)
    seed: int = 0
    max_new_tokens: int = 256
    potential: Potential | None = None
    potential_every: int = 0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}: it must be one of {', '.join(METHODS)}")
        for name, least in (("particles", 1), ("max_new_tokens", 1), ("potential_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {least} or more")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}: it must be from 0 to 1")


@dataclass(frozen=True)
class Answer:
    """What a request came to.

    Args:
        result: samples with their weights; None where the request failed.
        evaluations: how many tokens the constraint was asked about, for each token drawn by any particle.
        valid: whether the drawn answer satisfies the constraint, asked anew from its start.
        reason: why there is no valid answer; else empty.
    """

    result: Result | None
    evaluations: tuple[int, ...]
    valid: bool
    reason: str


def satisfies(constraint: Constraint, tokens: Sequence[int], vocabulary: Vocabulary) -> bool:
    """Whether an answer is whole, with its end token, and what the constraint wants; asked from the start."""
    constraint = constraint.constraint if isinstance(constraint, Memo) else constraint
    state = constraint.start()
    for token in tokens:
        if token in vocabulary.ends:
            return bool(constraint.may_end(state))
        state = constraint.advance(state, token) if vocabulary.tokens[token] is not None else None
        if state is None:
            return False
    return False
