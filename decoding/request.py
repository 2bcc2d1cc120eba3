"""What is asked of a decoder, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, get_args

from .constraints.memo import Memo
from .constraints.protocol import Constraint, Fault, Vocabulary
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
            the vocabulary at every step and has exact weights; ``rejection`` has no weights, so its normaliser
            says nothing.
        particles: how many sequences; one of them is drawn by weight in the end.
        law: the law that tokens are drawn from; weights are with respect to it.
        seed: of all that is random.
        max_new_tokens: longest answer, its end token counted. It is part of the constraint: at the last position only
            an end token is allowed.
        potential: graded wishes: log-potentials of sequences, by which the target is multiplied.
        potential_every: steps from one potential on the way to the next, to guide; 0: only of complete answers.
        threshold: share of the particles under which their effective number must fall for a resampling.
        resampling: ``systematic`` (one uniform for all particles) or ``multinomial`` (one for each).
        max_draws: questions about one token after which ``awrs-smc``, ``awrs`` and ``rejection`` take it for a dead
            end, 1 or more; None for no limit. The weights of AWRS stay proper.

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
    resampling: Literal["systematic", "multinomial"] = "systematic"
    max_draws: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}: it must be one of {', '.join(METHODS)}")
        for name, least in (("particles", 1), ("max_new_tokens", 1), ("potential_every", 0), ("max_draws", 1)):
            value = getattr(self, name)
            if name == "max_draws" and value is None:
                continue
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} is {value!r}: it must be a whole number, {least} or more")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}: it must be from 0 to 1")
        if self.resampling not in ("systematic", "multinomial"):
            raise ValueError(f"resampling is {self.resampling!r}: it must be 'systematic' or 'multinomial'")
        if self.max_draws is not None and self.method == "mask":
            raise ValueError("max_draws: masking asks about all tokens; it goes with the other methods")


@dataclass(frozen=True)
class Answer:
    """What a request came to.

    Args:
        result: samples with their weights; None where the request failed.
        evaluations: how many verdicts on single tokens were wanted, for each token drawn by any particle; those that
            a memo knew and those on special tokens, which are always refused, are counted too.
        valid: whether the drawn answer satisfies the constraint, asked anew from its start. Of another sample
            ``satisfies`` says so.
        reason: why there is no valid answer; else empty.
        masks: how often the constraint was asked for its verdicts on all tokens at once: by ``mask``, and by AWRS
            after 16 refusals. None of these are among ``evaluations``.
        fault: whose it is that there is no result; "function" also of who gave a reward, or of the engine.
    """

    result: Result | None
    evaluations: tuple[int, ...]
    valid: bool
    reason: str
    masks: int = 0
    fault: Fault = ""


def satisfies(constraint: Constraint | None, tokens: Sequence[int], vocabulary: Vocabulary) -> bool:
    """Whether an answer is whole, with its end token, and what the constraint wants; asked from the start.

    Without a constraint any answer is, also one that was cut.
    """
    if constraint is None:
        return True
    constraint = constraint.constraint if isinstance(constraint, Memo) else constraint
    state = constraint.start()
    for token in tokens:
        if token in vocabulary.ends:
            return bool(constraint.may_end(state))
        state = constraint.advance(state, token) if vocabulary.tokens[token] is not None else None
        if state is None:
            return False
    return False
