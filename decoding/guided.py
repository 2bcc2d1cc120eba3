"""What is asked of an answer that a reward guides, and what it comes to; ``transfer_q`` is what makes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, get_args

from .law import Law
from .values import Kind

Tokens = tuple[int, ...]
Reward = Callable[[Sequence[int], Sequence[Tokens]], Sequence[float | None]]
"""Rewards of answers, from the numbers of their queries and their tokens; an end token is among them where there is
one, and without one the answer is unfinished. -inf is an answer that must not be; None ends the query.
"""
WHOLE = 2**31 - 1
"""A block that no answer is longer than."""


@dataclass(frozen=True)
class TransferQ:
    """How candidates are proposed, rolled out and chosen.

    Args:
        candidates: tokens, the likeliest of the law; or blocks. More than the vocabulary has are as many as it has.
        rollouts: of each candidate.
        length: tokens of a rollout; None: to the end of the answer, 0: none, the candidate is judged as it stands.
            What is cut is judged unfinished, and a reward of whole answers is then biased; the answer counts them.
        alpha: units of reward that weigh as much as a nat of ``log p``; small for more reward and less of the policy.
        value: ``mean`` or ``soft``, see ``values``.
        beta: of the soft value and of indirect transfer, in units of the reward; alpha where it is None.
        choice: ``greedy``, the best candidate and of equal ones the first (the lowest token id), or ``drawn`` in
            proportion to ``exp(score)``.
        law: of the policy's tokens.
        rollout_law: of the baseline's; None: greedy where there is one rollout, else the baseline's own law.
        block: tokens of a block; None to choose single tokens.
        reward_range: the least and the largest reward that there can be. Only candidates that could still be the best
            are then rolled out. The choice stays exactly the same; a reward outside is an error.
        at_once: candidates that are rolled out together, in the order of their probability; None for all of them.
            With fewer, a good one may spare the others their rollouts, for more calls a step. It needs the range, and
            keeps the choice as that does.

    Raises:
        ValueError: a setting is out of its range, or two do not go together.
    """

    candidates: int = 10
    rollouts: int = 1
    length: int | None = 20
    alpha: float = 1.0
    value: Kind = "mean"
    beta: float | None = None
    choice: Literal["greedy", "drawn"] = "greedy"
    law: Law = field(default_factory=Law)
    rollout_law: Law | None = None
    block: int | None = None
    reward_range: tuple[float, float] | None = None
    at_once: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("candidates", 1), ("rollouts", 1), ("length", 0), ("block", 1), ("at_once", 1)):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or number < least):
                raise ValueError(f"{name} is {number!r}: it must be a whole number, {least} or more")
        for name in ("alpha", "beta"):
            number = getattr(self, name)
            if number is not None and not (number > 0 and math.isfinite(number)):
                raise ValueError(f"{name} is {number}: it must be positive")
        for name, known in (("value", get_args(Kind)), ("choice", ("greedy", "drawn"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(known)}")
        if self.rollouts > 1 and self.length == 0:
            raise ValueError(f"rollouts is {self.rollouts}: with length 0 there are none, leave it out")
        if self.rollouts > 1 and self.rollout_law is not None and self.rollout_law.top_k == 1:
            raise ValueError(
                f"rollouts is {self.rollouts}: greedy ones are all the same; give rollout_law another law"
            )
        if self.reward_range is not None:
            low, high = self.reward_range
            if not -math.inf < low <= high < math.inf:
                raise ValueError(f"reward_range is {low}, {high}: two finite numbers, the least reward first")
            if self.choice == "drawn":
                raise ValueError(
                    "reward_range: it keeps the greedy choice alone; a draw needs every candidate's value"
                )
        if self.at_once is not None and self.reward_range is None:
            raise ValueError("at_once: without reward_range no candidate can be spared its rollouts; give the range")

    @property
    def temperature(self) -> float:
        """beta, or alpha in its place."""
        return self.alpha if self.beta is None else self.beta

    @property
    def drawing(self) -> Law:
        """What the baseline's tokens are drawn by."""
        if self.rollout_law is not None:
            return self.rollout_law
        return Law(top_k=1) if self.rollouts == 1 else Law()

    def score(self, log_prob: float, value: float) -> Fraction:
        """``alpha log p + Q``, without rounding: equal is equal, and bounds are bounds."""
        return Fraction(self.alpha) * Fraction(log_prob) + Fraction(value)


def best_of(n: int) -> TransferQ:
    """Best of n: whole answers of the policy, of which the one with the largest reward is taken."""
    return TransferQ(candidates=n, length=0, block=WHOLE)


@dataclass(frozen=True)
class Query:
    """What is to be answered.

    Args:
        prompt: ids, up to where the answer begins.
        seed: of all that is random.
        max_new_tokens: longest answer, its end token counted.

    Raises:
        ValueError: ``max_new_tokens`` is under 1.
    """

    prompt: Sequence[int]
    seed: int = 0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: it must be 1 or more")


@dataclass(frozen=True)
class Costs:
    """What an answer took.

    Args:
        steps: choices that were made.
        policy_tokens: how many tokens' laws the policy was asked for.
        rollouts: of the baseline.
        rollout_tokens: that it went on with.
        cached_tokens: of the rollouts' prompts, those that were not computed for them; a server may not tell (0).
        cut_rollouts: that were judged unfinished.
        reward_calls: answers that the rewards have judged; none is judged twice.
        gated_steps: that needed no rollout, because the range of the reward left one candidate.
    """

    steps: int = 0
    policy_tokens: int = 0
    rollouts: int = 0
    rollout_tokens: int = 0
    cached_tokens: int = 0
    cut_rollouts: int = 0
    reward_calls: int = 0
    gated_steps: int = 0


@dataclass(frozen=True)
class Step:
    """A choice.

    Args:
        candidates: tokens of each.
        log_probs: ``log p`` of each, nats; 0 for blocks, which are drawn from p.
        values: of each, in units of the reward; None where it was not needed.
        chosen: number of the one that was taken.
    """

    candidates: tuple[Tokens, ...]
    log_probs: tuple[float, ...]
    values: tuple[float | None, ...]
    chosen: int


@dataclass(frozen=True)
class Guided:
    """What a query came to.

    Args:
        tokens: of the answer, its end token included; those up to a failure where there was one.
        finished: whether it has its end token; else the length or the model's context has cut it.
        reward: of the answer; None where it failed.
        reason: why there is no answer, or it is incomplete; else empty.
        steps: every choice.
        costs: what it took.
        ess: the least effective number of rollouts that a value was made of; None without weights.
        plain_values: how many values were made without weights because that number was under 1.5.
    """

    tokens: Tokens
    finished: bool
    reward: float | None
    reason: str
    steps: tuple[Step, ...]
    costs: Costs
    ess: float | None = None
    plain_values: int = 0
