"""The kinds of annotators that judge here, without a server; ``align.rewards.judge`` is the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .encoding import Content, plain
from .functions import RewardFunction
from .scorers import ModelReward, some_words
from .verdicts import NO_COLUMNS, AnnotatorError, Columns, Groups, Problem, Verdicts, check_groups

if TYPE_CHECKING:
    from .pal_model import PalRewardModel


class Judging(ABC):
    """What is the same in all: sizes are checked, and an error names the prompt that it is of."""

    name: str

    def __call__(self, prompts: Sequence[Content], answers: Groups, columns: Columns = NO_COLUMNS) -> Verdicts:
        check_groups(self.name, prompts, answers, columns)
        try:
            return self._verdicts(prompts, answers, columns)
        except ValueError as error:
            raise self._located(error, prompts, answers, columns) from error

    @abstractmethod
    def _verdicts(self, prompts: Sequence[Content], answers: Groups, columns: Columns) -> Verdicts:
        """Of what was checked. Raises ValueErrors."""

    def _located(
        self, error: ValueError, prompts: Sequence[Content], answers: Groups, columns: Columns
    ) -> AnnotatorError:
        """The error with the first prompt that raises one alone."""
        for row, prompt in enumerate(prompts):
            own = slice(row, row + 1)
            try:
                self._verdicts(prompts[own], answers[own], {name: values[own] for name, values in columns.items()})
            except ValueError as alone:
                return AnnotatorError(self.name, str(alone), row, prompt)
        return AnnotatorError(self.name, str(error))


@dataclass(frozen=True)
class RewardAnnotator(Judging):
    """Differences of a reward over a temperature, as log-odds; pairs of an answer without one are set aside."""

    name: str
    reward: RewardFunction
    temperature: float

    def _verdicts(self, prompts: Sequence[Content], answers: Groups, columns: Columns) -> Verdicts:
        size, found = len(answers[0]), []
        for rows in _apart(prompts):
            asked = [prompts[row] for row in rows for _ in range(size)]
            given: dict[str, Any] = {
                name: [values[row] for row in rows for _ in range(size)]
                for name, values in columns.items()
                if name not in ("prompts", "completions")  # of the data's rows; the reward is asked for others
            }
            found += self.reward(asked, [answer for row in rows for answer in answers[row]], **given)
        rewards = torch.tensor([torch.nan if one is None else one for one in found], dtype=torch.float64)
        rewards = rewards.view(len(prompts), size) / self.temperature
        lacking = torch.tensor([one is None for one in found]).view_as(rewards)
        problems = []
        for i, j in zip(*torch.triu_indices(size, size, 1).tolist(), strict=True):
            for row in (lacking[:, i] | lacking[:, j]).nonzero()[:, 0].tolist():
                which = "first" if lacking[row, i] else "second"
                problems.append(Problem(row, i, j, f"{self.name} gave None for the {which} of them"))
        return Verdicts.of_log_odds(rewards[:, :, None] - rewards[:, None], problems)


@dataclass(frozen=True)
class ModelAnnotator(Judging):
    """A reward or preference model: the log-odds of ``RewardModel.score_groups``, ``tau / temperature`` times."""

    name: str
    scorer: ModelReward
    temperature: float | None = None

    def _verdicts(self, prompts: Sequence[Content], answers: Groups, columns: Columns) -> Verdicts:
        scores = torch.stack(self.scorer.log_odds(prompts, answers)).double()
        if self.temperature is not None:
            scores = scores * (self.scorer.model.config.tau / self.temperature)
        return Verdicts.of_log_odds(scores)


def _apart(prompts: Sequence[Content]) -> Iterator[range]:
    """Runs in which no prompt stands beside itself: rewards take equal prompts in a row for one group of answers."""
    start = 0
    for row in range(1, len(prompts)):
        if prompts[row] == prompts[row - 1]:
            yield range(start, row)
            start = row
    yield range(start, len(prompts))


@dataclass(frozen=True)
class PalAnnotator(Judging):
    """A population: the mean over some people of ``sigmoid(r_i - r_j)``, each by their own reward.

    It is the probability that somebody drawn from it prefers i. Each person's preferences are transitive, and their
    mean need not be.

    Args:
        people: names of annotators of the model, with their shares of the population, 1 in sum.
    """

    name: str
    model: PalRewardModel
    people: Mapping[str, float]
    batch_size: int = 16

    def _verdicts(self, prompts: Sequence[Content], answers: Groups, columns: Columns) -> Verdicts:
        size = len(answers[0])
        asked = [prompt for prompt in prompts for _ in range(size)]
        given = [some_words(answer) for group in answers for answer in group]
        found = self.model.embed(asked, given, batch_size=self.batch_size)
        total = torch.zeros(len(prompts), size, size, dtype=torch.float64)
        with torch.no_grad():
            for person, share in self.people.items():
                weights = self.model.choose(f"annotator:{person}").chosen
                assert weights is not None
                states, questions = (one.to(weights.device) for one in found)
                rewards = self.model.pal.reward(states, weights, questions).double().cpu().view(len(prompts), size)
                total += share * torch.sigmoid(rewards[:, :, None] - rewards[:, None])
        return Verdicts.of_probabilities(total.clamp(max=1))  # shares may add up to 1 and a bit


@dataclass(frozen=True)
class CompareAnnotator(Judging):
    """A function of prompts, first and second answers to probabilities that the first is preferred.

    Args:
        both_orders: ask for either answer as the first, and take ``(p(y, y') + 1 - p(y', y)) / 2``, which leaves out
            what the function makes of the order; False asks for the answers in the order in which they came.
    """

    name: str
    function: Callable[..., Any]
    both_orders: bool = True

    def _verdicts(self, prompts: Sequence[Content], answers: Groups, columns: Columns) -> Verdicts:
        size = len(answers[0])
        pairs = [(row, i, j) for row in range(len(prompts)) for i in range(size) for j in range(i + 1, size)]
        found = self._asked(prompts, answers, pairs)
        if self.both_orders:
            swapped = self._asked(prompts, answers, [(row, j, i) for row, i, j in pairs])
            found = (found + 1 - swapped) / 2
        none = found.isnan().tolist()
        values = torch.full((len(prompts), size, size), 0.5, dtype=torch.float64)
        values[tuple(torch.tensor(pairs).T)] = found
        reason = f"{self.name} gave None"
        return Verdicts.of_probabilities(
            values, [Problem(*pair, reason) for pair, lacks in zip(pairs, none, strict=True) if lacks]
        )

    def _asked(self, prompts: Sequence[Content], answers: Groups, pairs: Sequence[tuple[int, int, int]]) -> Tensor:
        """Probabilities, NaN for None, (P,)."""
        texts = (
            [plain(prompts[row], "user") for row, _, _ in pairs],
            [plain(answers[row][first], "assistant") for row, first, _ in pairs],
            [plain(answers[row][second], "assistant") for row, _, second in pairs],
        )
        try:
            found = self.function(*texts)
        except Exception as error:  # anyone's code
            raise ValueError(f"the function fails: {type(error).__name__}: {error}") from error
        if isinstance(found, str) or not hasattr(found, "__len__"):
            raise ValueError(f"the function gave {found!r}: wanted a list with one probability a pair")
        if len(found) != len(pairs):
            raise ValueError(f"the function gave {len(found)} probabilities for {len(pairs)} pairs")
        values = [_probability(value, *pair[1:]) for value, pair in zip(found, pairs, strict=True)]
        return torch.tensor(values, dtype=torch.float64)


def _probability(value: Any, first: int, second: int) -> float:
    if value is None:
        return torch.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = torch.nan
    if not 0 <= number <= 1:
        raise ValueError(
            f"the function gave {value!r} for answer {first + 1} against {second + 1}: a probability is in [0, 1], "
            "and None sets a pair aside"
        )
    return number
