"""Rewards as the log-probability of being good, which may be added: log-sigmoid-centred rewards and their logic.

``u = log sigmoid(r - r_ref)`` is, under Bradley-Terry, the log-probability that the answer beats the reference
(arXiv:2402.00742). With it, the policy that maximises ``E[u] - KL(pi | pi_0)`` is ``pi_0`` given that the answer is
good, and the sum over several rewards is "good in all": one large reward cannot hide a bad one, as it can in a sum of
raw rewards.

    goal = AllOf([LogSigmoidCentered("helpful", "helpful_reference"), Not(LogSigmoidCentered("rude", 0.0))])
    goal({"helpful": r1, "helpful_reference": q1, "rude": r2})   # (N,), each at most 0

What belongs before the transform, and not after it: penalties (a missing end token) are added to r, clipping is of r,
and a reward that was trained at a temperature tau is divided by tau. Whitening u would take its meaning away.
References come from the same model, template and dtype as the rewards: see ``align.rewards.references``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from align.losses.checks import check_finite, check_not_negative, check_shape, wide

Columns = Mapping[str, Tensor]
T = TypeVar("T")


class Goal(ABC):
    """An event "the answer is good", by its log-probability and that of its opposite.

    A goal is called with columns (N,) by name, rewards and references alike, and gives the log-probabilities (N,) in
    float32 or better.
    """

    def __call__(self, columns: Columns) -> Tensor:
        """Log-probability that the answer is good, (N,), at most 0."""
        return self.log_true(columns)

    @abstractmethod
    def log_true(self, columns: Columns) -> Tensor:
        """``log p``."""

    @abstractmethod
    def log_false(self, columns: Columns) -> Tensor:
        """``log(1 - p)``, computed without the difference, so that it keeps its digits near p = 1."""


@dataclass(frozen=True)
class LogSigmoidCentered(Goal):
    """``u = log sigmoid((r - r_ref) / temperature)``: the answer beats the reference (arXiv:2402.00742).

    Its slope is 1 far below the reference, 1/2 at it and 0 far above it (over the temperature): what is good already
    is not pushed further.

    Args:
        reward: the column of rewards.
        reference: the column of reference rewards, or one number for every row. No gradient goes through it.
        temperature: what the rewards are divided by to be logits, in their unit: the tau of a model that was trained
            at one; for a rule, how far from the reference an answer is clearly good or clearly not.
    """

    reward: str
    reference: str | float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _is_a(str, self.reward, "the reward")
        for name, value in (("reference", self.reference), ("temperature", self.temperature)):
            if not isinstance(value, int | float) and (name == "temperature" or not isinstance(value, str)):
                raise ValueError(f"the {name} of {self.reward} is {value!r}: it must be a number")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"the temperature of {self.reward} is {self.temperature}: it must be positive and finite")
        if not isinstance(self.reference, str) and not math.isfinite(self.reference):
            raise ValueError(f"the reference of {self.reward} is {self.reference}: it must be finite")

    def log_true(self, columns: Columns) -> Tensor:
        return F.logsigmoid(self._centred(columns))

    def log_false(self, columns: Columns) -> Tensor:
        return F.logsigmoid(-self._centred(columns))

    def _centred(self, columns: Columns) -> Tensor:
        reward = _column(columns, self.reward)
        if not isinstance(self.reference, str):
            return (reward - self.reference) / self.temperature
        reference = _column(columns, self.reference).detach()
        check_shape(self.reference, reference, reward.shape, f"one a row of {self.reward}")
        return (reward - reference) / self.temperature


@dataclass(frozen=True)
class Not(Goal):
    """The goal is missed: ``log(1 - p)``; for one reward, ``log sigmoid(r_ref - r)``."""

    goal: Goal

    def __post_init__(self) -> None:
        _is_a(Goal, self.goal, "what Not negates")

    def log_true(self, columns: Columns) -> Tensor:
        return self.goal.log_false(columns)

    def log_false(self, columns: Columns) -> Tensor:
        return self.goal.log_true(columns)


@dataclass(frozen=True)
class AllOf(Goal):
    """All goals are met, each independently of the others given the answer: the sum of their ``u``."""

    goals: Sequence[Goal]

    def __post_init__(self) -> None:
        object.__setattr__(self, "goals", _some(self.goals, Goal))

    def log_true(self, columns: Columns) -> Tensor:
        return _every([goal.log_true(columns) for goal in self.goals])

    def log_false(self, columns: Columns) -> Tensor:
        return _some_of([(goal.log_false(columns), goal.log_true(columns)) for goal in self.goals])


@dataclass(frozen=True)
class AnyOf(Goal):
    """At least one goal is met: ``log(1 - prod_i (1 - p_i))``, in log space."""

    goals: Sequence[Goal]

    def __post_init__(self) -> None:
        object.__setattr__(self, "goals", _some(self.goals, Goal))

    def log_true(self, columns: Columns) -> Tensor:
        return _some_of([(goal.log_true(columns), goal.log_false(columns)) for goal in self.goals])

    def log_false(self, columns: Columns) -> Tensor:
        return _every([goal.log_false(columns) for goal in self.goals])


@dataclass(frozen=True)
class Weighted(Goal):
    """``sum_i w_i u_i``: goal i is required w_i times.

    It has no opposite to speak of: what is less than required is not one event. For the opposite of a goal, negate
    the goal and not its weight.

    Args:
        goals: one or more.
        weights: one a goal, 0 or more.
    """

    goals: Sequence[Goal]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "goals", _some(self.goals, Goal))
        object.__setattr__(self, "weights", _weights(self.weights, len(self.goals)))

    def log_true(self, columns: Columns) -> Tensor:
        return _every([w * goal.log_true(columns) for w, goal in zip(self.weights, self.goals, strict=True)])

    def log_false(self, columns: Columns) -> Tensor:
        raise ValueError("a weighted sum of goals has no opposite: negate the goals inside it, or combine with AllOf")


@dataclass(frozen=True)
class RawSum:
    """``sum_i w_i r_i`` of rewards as they are: what the transform is compared with. Not the probability of anything.

    Args:
        rewards: columns, one or more.
        weights: one a column, 0 or more; 1 each if not given.
    """

    rewards: Sequence[str]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rewards", _some(self.rewards, str))
        if self.weights is not None:
            object.__setattr__(self, "weights", _weights(self.weights, len(self.rewards)))

    def __call__(self, columns: Columns) -> Tensor:
        """The sum, (N,)."""
        weights = self.weights or (1.0,) * len(self.rewards)
        return _every([w * _column(columns, name) for w, name in zip(weights, self.rewards, strict=True)])


def _some(parts: Sequence[T], kind: type) -> tuple[T, ...]:
    if isinstance(parts, str) or not isinstance(parts, Sequence):
        raise ValueError(f"{parts!r}: give a list of what is to be combined")
    if not parts:
        raise ValueError("nothing to combine: give one goal or more")
    for number, part in enumerate(parts):
        _is_a(kind, part, f"part {number}")
    return tuple(parts)


def _is_a(kind: type, part: object, what: str) -> None:
    if not isinstance(part, kind):
        wanted = "the name of a column" if kind is str else "a goal, such as LogSigmoidCentered"
        raise ValueError(f"{what} is {part!r}: it must be {wanted}")


def _weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} parts: one each")
    for number, weight in enumerate(weights):
        if weight < 0:
            raise ValueError(f"weights[{number}] is {weight}: it must not be negative; Not is the opposite of a goal")
        check_not_negative(f"weights[{number}]", weight)
    return tuple(float(weight) for weight in weights)


def _column(columns: Columns, name: str) -> Tensor:
    if columns.get(name) is None:
        known = ", ".join(columns) or "none"
        raise ValueError(f"no column {name!r} (there is: {known}); a missing reward or reference is never taken as 0")
    column = columns[name]
    if not isinstance(column, Tensor):
        raise ValueError(f"{name} is a {type(column).__name__}: it must be a tensor (N,)")
    if column.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(column.shape)} and must have (N,)")
    check_finite(name, column)
    return wide(column)


def _every(logs: Sequence[Tensor]) -> Tensor:
    for number, values in enumerate(logs):
        check_shape(f"part {number}", values, logs[0].shape, "as many rows as part 0")
    return torch.stack(list(logs)).sum(0)


def _some_of(logs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Log-probability that at least one of independent events happens, from ``(log p_i, log(1 - p_i))``.

    ``sum_i p_i prod_{j<i} (1 - p_j)``: i is the first that happens. All terms are positive, so nothing cancels.
    """
    terms, none_before = [], torch.zeros_like(logs[0][0])
    for number, (happens, fails) in enumerate(logs):
        check_shape(f"part {number}", happens, none_before.shape, "as many rows as part 0")
        terms.append(happens + none_before)
        none_before = none_before + fails
    return torch.stack(terms).logsumexp(0)
