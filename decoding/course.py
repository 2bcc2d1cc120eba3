"""A query under way: its candidates, what is known of their values, and the choice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import index

import numpy as np

from .constraints.protocol import Vocabulary
from .guided import Costs, Guided, Query, Step, Tokens, TransferQ
from .judging import Judge
from .lazy import Draws, Live
from .values import estimate


@dataclass(eq=False)
class Candidate:
    """What may come next, and the answers that it was seen to lead to."""

    tokens: Tokens
    log_prob: float
    rank: int  # of equal ones the least is taken: a token's id, a block's number
    ended: bool
    answers: tuple[Tokens, ...] = ()
    whole: bool = True  # whether none of the answers was cut before its time
    value: float | None = None


class Run:
    """A query under way."""

    def __init__(self, number: int, query: Query) -> None:
        self.number, self.query = number, query
        self.tokens: Tokens = ()
        self.room = query.max_new_tokens
        self.finished = False
        self.reason = ""
        self.handle: int | None = None
        self.costs: Counter[str] = Counter()
        self.ess: float | None = None
        self.candidates: list[Candidate] = []
        self.alive: list[Candidate] = []
        self._kept: Tokens = ()  # a whole answer that greedy rollouts lead to from everywhere on its way
        self._steps: list[Step] = []
        self._plain = 0

    @property
    def over(self) -> bool:
        """Whether there is nothing more to choose."""
        return self.finished or self.room <= 0 or bool(self.reason)

    def check(self, vocabulary: Vocabulary, context: int | None) -> None:
        """The prompt is one of this model, and leaves room for an answer."""
        prompt = self.query.prompt
        try:
            strange = [token for token in prompt if not 0 <= index(token) < vocabulary.size]
        except TypeError:
            self.reason = "prompt: it holds something other than whole numbers; give the ids of its tokens"
            return
        if not len(prompt):
            self.reason = "prompt: it has no tokens"
        elif strange:
            self.reason = (
                f"prompt: {strange[0]} is the id of no token, they are from 0 to {vocabulary.size - 1:,}; encode it "
                "with the model's own tokenizer"
            )
        elif context is not None and len(prompt) >= context:
            self.reason = (
                f"prompt: its {len(prompt):,} tokens fill the {context:,} that the model reads, and leave no room for "
                "an answer; shorten it"
            )
        elif context is not None:
            self.room = min(self.room, context - len(prompt))

    def fail(self, reason: str) -> None:
        """There will be no more of the answer."""
        self.reason = f"after {len(self.tokens):,} tokens: {reason}" if self.tokens else reason

    def propose(self, candidates: list[Candidate], settings: TransferQ) -> None:
        """What there is to choose from, in the order of probability."""
        self.candidates, self.alive = candidates, candidates
        self.prune(settings)
        self.costs["gated_steps"] += len(self.alive) == 1 < len(candidates)

    def prune(self, settings: TransferQ) -> None:
        """Leave out what cannot be the best any more, whatever the rewards that are not known yet."""
        if settings.reward_range is None or self.reason:
            return
        low, high = settings.reward_range

        def score(one: Candidate, unknown: float) -> tuple[Fraction, int]:
            return settings.score(one.log_prob, unknown if one.value is None else one.value), -one.rank

        best = max(score(one, low) for one in self.alive)
        self.alive = [one for one in self.alive if score(one, high) >= best]

    def wanted(self, settings: TransferQ) -> list[Candidate]:
        """Whose values are to be had next; none if the choice is clear."""
        if self.reason or len(self.alive) == 1:
            return []
        return [one for one in self.alive if one.value is None][: settings.at_once]

    def answers_of(self, one: Candidate) -> tuple[Tokens, ...]:
        """What the candidate is known to lead to without a rollout: an answer that is over, or one that was kept."""
        whole = (*self.tokens, *one.tokens)
        if one.ended or len(one.tokens) >= self.room:
            return (whole,)
        return (self._kept,) if self._kept[: len(whole)] == whole else ()

    def evaluate(self, one: Candidate, judge: Judge, other: Judge | None, settings: TransferQ) -> None:
        """The candidate's value from the rewards of its answers."""
        rewards = [judge.known(self.number, answer) for answer in one.answers]
        others = [other.known(self.number, answer) for answer in one.answers] if other and len(rewards) > 1 else None
        try:
            found = estimate(rewards, others, kind=settings.value, beta=settings.temperature)
        except ValueError as error:
            self.fail(str(error))
            return
        one.value = found.value
        if found.ess is not None:
            self.ess = found.ess if self.ess is None else min(self.ess, found.ess)
            self._plain += found.plain

    def choose(self, settings: TransferQ) -> Candidate | None:
        """The candidate that is taken; None where none may be."""
        alive = [one for one in self.alive if one.value is None or one.value > -math.inf]
        if not alive:
            self.fail("the reward rules out every candidate")
            return None
        if len(alive) == 1:
            chosen = alive[0]
        elif settings.choice == "greedy":
            chosen = max(alive, key=lambda one: (settings.score(one.log_prob, one.value or 0.0), -one.rank))
        else:
            values = [one.value for one in alive if one.value is not None]
            uniform = Draws(self.query.seed, len(self.tokens), "choice").uniform()
            chosen = alive[drawn([one.log_prob for one in alive], values, settings.alpha, uniform)]
        self._steps.append(
            Step(
                tuple(one.tokens for one in self.candidates),
                tuple(one.log_prob for one in self.candidates),
                tuple(one.value for one in self.candidates),
                self.candidates.index(chosen),
            )
        )
        return chosen

    def take(self, chosen: Candidate, *, keep: bool) -> None:
        """Go on with the candidate; with ``keep`` its answer is known for steps to come, if it is a whole one."""
        if keep and chosen.answers and chosen.whole:
            self._kept = chosen.answers[0]
        self.tokens += chosen.tokens
        self.room -= len(chosen.tokens)
        self.finished = chosen.ended
        self.candidates = self.alive = []

    def answer(self, judge: Judge) -> Guided:
        """What the query came to; its reward must be known."""
        return Guided(
            self.tokens,
            self.finished,
            None if self.reason else judge.known(self.number, self.tokens),
            self.reason,
            tuple(self._steps),
            Costs(steps=len(self._steps), **self.costs),
            self.ess,
            self._plain,
        )


def drawn(log_probs: Sequence[float], values: Sequence[float], alpha: float, uniform: float) -> int:
    """Number of a candidate, with probability in proportion to ``p exp(Q / alpha)`` if the uniform has no preference.

    Args:
        log_probs: of the candidates, nats.
        values: of each, in the units of alpha; -inf for one that is never drawn, but not for all of them.
        uniform: over 0 and under 1.
    """
    most = max(values)
    scores = np.array([lp + (value - most) / alpha for lp, value in zip(log_probs, values, strict=True)])
    return Live(scores - scores.max()).draw(uniform)
