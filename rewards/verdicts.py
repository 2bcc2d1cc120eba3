"""What an annotator says of K answers to a prompt: probabilities, log-odds, and pairs that it set aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .encoding import Content, plain

Groups = Sequence[Sequence[Content]]
Columns = Mapping[str, Sequence[Any]]
NO_COLUMNS: Columns = MappingProxyType({})
MOST_LOG_ODDS = 10.0
"""Scores that are made of probabilities end here, as those of a preference model of tau 0.1 do; a sure judge's logit
is infinite."""


class AnnotatorError(ValueError):
    """Why there are no verdicts, and of which prompt: ``prompt`` is its number in the call, None for all of them.

    Numbers count from 0, and those in messages from 1.
    """

    def __init__(self, name: str, problem: str, prompt: int | None = None, text: Content = "") -> None:
        where = "" if prompt is None else f"prompt {prompt + 1} ({plain(text, 'user')[:60]!r}): "
        super().__init__(f"{name}: {where}{problem}")
        self.prompt, self.problem = prompt, problem


@dataclass(frozen=True)
class Problem:
    """Answers ``first`` and ``second``, first < second, of prompt number ``prompt`` were not compared."""

    prompt: int
    first: int
    second: int
    reason: str


@dataclass(frozen=True)
class Verdicts:
    """All K answers to each of B prompts against each other, in float64 on the CPU.

    Attributes:
        preference: ``[b, i, j]`` is the probability that answer i is preferred to j, (B, K, K): its transpose is
            ``1 - preference``, the diagonal 1/2. NaN, both ways, where the pair was set aside.
        scores: log-odds of it, antisymmetric, (B, K, K). Made of probabilities they are held to ``MOST_LOG_ODDS``,
            which ``preference`` is not. NaN as above.
        problems: the pairs that were set aside.
    """

    preference: Tensor
    scores: Tensor
    problems: list[Problem]

    @classmethod
    def of_log_odds(cls, values: Tensor, problems: Sequence[Problem] = ()) -> Verdicts:
        """Verdicts by log-odds (B, K, K), of which those over the diagonal count.

        Raises:
            ValueError: one of a pair without a problem is not finite.
        """
        values = _emptied(values, problems)
        upper = values.triu(1)
        scores = upper - upper.mT
        return cls(torch.sigmoid(scores), scores, list(problems))

    @classmethod
    def of_probabilities(cls, values: Tensor, problems: Sequence[Problem] = ()) -> Verdicts:
        """Verdicts by the probabilities that i is preferred to j, (B, K, K), of which those over the diagonal count.

        Raises:
            ValueError: one of a pair without a problem is outside [0, 1].
        """
        values = _emptied(values, problems)
        outside = ((values < 0) | (values > 1)).triu(1)
        if bool(outside.any()):
            _, i, j = outside.nonzero()[0].tolist()
            raise ValueError(
                f"{float(values[outside][0])} for answer {i + 1} against {j + 1}: a probability is in [0, 1]"
            )
        preference = torch.where(torch.ones_like(values, dtype=torch.bool).triu(1), values, 1 - values.mT)
        odds = torch.logit(values).clamp(-MOST_LOG_ODDS, MOST_LOG_ODDS).triu(1)
        return cls(preference, odds - odds.mT, list(problems))


def _emptied(values: Tensor, problems: Sequence[Problem]) -> Tensor:
    """In float64, with NaN where a pair has a problem and nowhere else over the diagonal, below and on which 1/2."""
    values = values.detach().double().cpu().clone()
    bad = ~values.isfinite()
    for one in problems:
        values[one.prompt, one.first, one.second] = torch.nan
        bad[one.prompt, one.first, one.second] = False
    bad = bad.triu(1)
    if bool(bad.any()):
        _, i, j = bad.nonzero()[0].tolist()
        raise ValueError(f"{float(values[bad][0])} for answer {i + 1} against {j + 1}: not a finite number")
    over = torch.ones_like(values, dtype=torch.bool).triu(1)
    return torch.where(over, values, 0.5)


def check_groups(name: str, prompts: Sequence[Content], answers: Groups, columns: Columns) -> None:
    """Raise an AnnotatorError unless all prompts have as many answers, two or more, and one value of each column."""
    if not len(prompts) or len(prompts) != len(answers):
        raise AnnotatorError(name, f"{len(prompts)} prompts and {len(answers)} groups of answers: one group a prompt")
    for row, group in enumerate(answers):
        if len(group) != len(answers[0]) or len(group) < 2:
            problem = f"{len(group)} answers; give every prompt the same number, two or more"
            raise AnnotatorError(name, problem, row, prompts[row])
    for column, values in columns.items():
        if len(values) != len(prompts):
            raise AnnotatorError(name, f"{len(values)} values of {column} for {len(prompts)} prompts: one each")
