"""A rule and a reward model, one for the other: both give one number to every answer.

    scorer = load_scorer("my_rules:length")               # or "runs/bt", or "runs/pal@annotator:eve"
    scorer(["Hi"], ["Hello."], {"wanted": [5]})           # [6.0]

A rule sees text, the same wherever it is asked: the last turn of the user, and the last one of the assistant in the
answer. It is a function ``(prompts, completions)``, and further arguments are columns of the data that it asks for by
name. As with TRL, it may give None where it does not apply, and it may take its arguments by name alone
(``def solved(completions, solution, **columns)``).

A preference model (gpm) compares answers, so that its reward is of an answer among the others of its prompt: the mean
log-odds of beating them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .encoding import Content, plain
from .named import OF_TRL, Reward, is_rule, load_reward

if TYPE_CHECKING:
    from .models import RewardModel

SILENCE = "..."
NO_COLUMNS: Mapping[str, Any] = MappingProxyType({})
_TEXT = ("prompts", "completions")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class RewardError(ValueError):
    """Why there is no reward: of answer number ``row``, or of all of them where it is None."""

    def __init__(self, row: int | None, problem: str) -> None:
        super().__init__(problem if row is None else f"row {row}: {problem}")
        self.row, self.problem = row, problem


@dataclass(frozen=True)
class RuleReward:
    """A function of texts as a scorer."""

    rule: Reward
    compares = False

    def __call__(
        self, prompts: Sequence[Content], completions: Sequence[Content], columns: Mapping[str, Any] = NO_COLUMNS
    ) -> list[float | None]:
        """One number an answer, None where the rule gives none.

        Args:
            columns: of the data, by name, one value an answer; what the rule does not ask for is left out.

        Raises:
            RewardError: a column that it needs is not there, it fails, or it gives something else.
        """
        if not len(prompts):
            return []
        for name, needed in self.columns.items():
            if needed and name not in columns:
                raise RewardError(None, f"the rule asks for column {name}, and there is none")
        texts = [plain(prompt, "user") for prompt in prompts], [plain(answer, "assistant") for answer in completions]
        given = {name: value for name, value in columns.items() if self.asks(name)}
        try:
            found = self._called(*texts, given)
        except (Exception, SystemExit) as error:  # a rule is anyone's code
            raise self._failure(*texts, given, error) from error
        if isinstance(found, str) or not hasattr(found, "__len__"):
            wanted = "wanted a list with one number an answer; prompts and answers come as lists"
            raise RewardError(None, f"the rule gave {found!r}: {wanted}")
        if len(found) != len(prompts):
            raise RewardError(None, f"the rule gave {len(found)} numbers for {len(prompts)} answers")
        return [_number(row, value) for row, value in enumerate(found)]

    @cached_property
    def columns(self) -> dict[str, bool]:
        """Names of the columns that it asks for, and whether it cannot do without."""
        names = [name for name, one in self._parameters.items() if one.kind in _NAMED]
        own = [name for name in names if name not in _TEXT] if self._by_name else names[2:]
        return {name: self._parameters[name].default is inspect.Parameter.empty for name in own}

    def asks(self, name: str) -> bool:
        """Whether it reads a column of this name."""
        return name not in _TEXT and (self.takes_all or name in self.columns)

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        try:
            return inspect.signature(self.rule).parameters
        except (TypeError, ValueError):  # of a function in C, which tells nothing
            return {}

    @property
    def takes_all(self) -> bool:
        """Whether it reads every column (``**columns``)."""
        return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in self._parameters.values())

    @property
    def _by_name(self) -> bool:
        """Whether the first two arguments are something other than prompts and completions, in this order."""
        kinds = {name: one.kind for name, one in self._parameters.items()}
        if not kinds or inspect.Parameter.VAR_POSITIONAL in kinds.values():
            return False
        by_name_alone = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
        ordered = [name for name, kind in kinds.items() if kind not in by_name_alone]
        return len(ordered) < 2 or "completions" in (ordered[0], *ordered[2:])

    def _called(self, prompts: list[str], answers: list[str], columns: Mapping[str, Any]) -> Any:
        if not self._by_name:
            return self.rule(prompts, answers, **columns)
        texts = dict(zip(_TEXT, (prompts, answers), strict=True))
        return self.rule(**{k: v for k, v in texts.items() if self.takes_all or k in self._parameters}, **columns)

    def _failure(
        self, prompts: list[str], answers: list[str], columns: Mapping[str, Any], error: BaseException
    ) -> RewardError:
        """Which answer it was that the rule fails on, alone."""
        for row in range(len(prompts) if len(prompts) > 1 else 0):
            own = slice(row, row + 1)
            try:
                self._called(prompts[own], answers[own], of_rows(columns, [row], len(prompts)))
            except (Exception, SystemExit) as alone:
                return RewardError(row, f"the rule fails: {type(alone).__name__}: {alone}")
        row_or_all = 0 if len(prompts) == 1 else None
        return RewardError(row_or_all, f"the rule fails: {type(error).__name__}: {error}")


def of_rows(columns: Mapping[str, Any], rows: Sequence[int], count: int) -> dict[str, Any]:
    """Columns of some of ``count`` rows; what TRL gives besides, such as its state, as it is."""
    return {
        name: [value[row] for row in rows] if isinstance(value, list | tuple) and len(value) == count else value
        for name, value in columns.items()
    }


def _number(row: int, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RewardError(row, f"the rule gave {value!r}: not a number") from None
    if not math.isfinite(number):
        raise RewardError(row, f"{number}: not a finite number")
    return number


@dataclass(frozen=True)
class ModelReward:
    """A reward model as a scorer; a preference model by ``group_log_odds``.

    A policy may end its answer at once, and a reward model refuses an answer without words: it is read as ``...``.

    Args:
        model: scalar, attributes, PAL or gpm.
        batch_size: answers in one forward pass.
    """

    model: RewardModel
    batch_size: int = 16

    @property
    def compares(self) -> bool:
        """Whether a reward is one among the answers to a prompt alone."""
        return self.model.config.kind == "gpm"

    @property
    def columns(self) -> dict[str, bool]:
        """It asks for none."""
        return {}

    def asks(self, name: str) -> bool:
        """It reads no column."""
        return False

    def __call__(
        self, prompts: Sequence[Content], completions: Sequence[Content], columns: Mapping[str, Any] = NO_COLUMNS
    ) -> list[float | None]:
        """One number an answer; of a gpm, the answers to one prompt stand next to each other.

        Raises:
            ValueError: a row that cannot be scored; the message names it.
        """
        answers = [some_words(answer) for answer in completions]
        if self.compares:
            found = group_log_odds(self.model, prompts, answers, batch_size=self.batch_size)
        else:
            found = self.model.rewards(prompts, answers, batch_size=self.batch_size)
        return list(found.double().tolist())

    def log_odds(self, prompts: Sequence[Content], answers: Sequence[Sequence[Content]]) -> list[Tensor]:
        """Of all answers to each prompt against each other, (K, K) each (``RewardModel.score_groups``).

        Raises:
            ValueError: a row that cannot be scored.
        """
        groups = [[some_words(answer) for answer in group] for group in answers]
        return self.model.score_groups(prompts, groups, batch_size=self.batch_size)


Scorer = RuleReward | ModelReward


def load_scorer(name: str, *, batch_size: int = 16) -> Scorer:
    """What ``name`` says: a rule (``module:function``), or a reward model (its folder, its run or a hub id).

    Of a PAL model, ``FOLDER@WHO`` says whose reward (``PalRewardModel.choose``).

    Raises:
        ValueError: no such rule, or a choice of annotator that is missing, unknown or out of place; OSError: no such
            model.
    """
    if is_rule(name):
        return RuleReward(load_reward(name))
    from .pal_model import load_reward_model  # transformers: not for rules

    return ModelReward(load_reward_model(name), batch_size)


def asked_columns(rewards: Iterable[str]) -> tuple[dict[str, str | None], bool]:
    """What rules among ``rewards`` read of the data: columns by name, and whether one of them reads every column.

    Each column stands with a rule that cannot do without it, or None.

    Raises:
        ValueError: no such rule.
    """
    rules = {name: RuleReward(load_reward(name)) for name in rewards if is_rule(name)}
    columns: dict[str, str | None] = {}
    for name, rule in rules.items():
        for column, needed in rule.columns.items():
            if column not in OF_TRL and columns.get(column) is None:
                columns[column] = name if needed else None
    return columns, any(rule.takes_all for rule in rules.values())


def group_log_odds(
    model: RewardModel, prompts: Sequence[Content], completions: Sequence[Content], *, batch_size: int = 16
) -> Tensor:
    """Mean over the other answers of a prompt of the log-odds of being preferred to it, (N,).

    The answers to a prompt are those that stand next to each other. The rewards of a prompt sum to 0.

    Raises:
        ValueError: a prompt with a single answer.
    """
    numbers = [list(group) for _, group in groupby(range(len(prompts)), key=lambda row: prompts[row])]
    alone = next((group[0] for group in numbers if len(group) < 2), None)
    if alone is not None:
        raise RewardError(
            alone,
            "one answer to its prompt, and a preference model compares answers: give two or more next to each other "
            "(in GRPO, a batch per device that num_generations divides)",
        )
    matrices = model.score_groups(
        [prompts[group[0]] for group in numbers],
        [[completions[row] for row in group] for group in numbers],
        batch_size=batch_size,
    )
    return torch.cat([matrix.sum(1) / (len(matrix) - 1) for matrix in matrices])


def some_words(answer: Content) -> Content:
    """The answer, or ``...`` where it has no words, which a reward model would refuse."""
    if isinstance(answer, str):
        return answer if answer.strip() else SILENCE
    blank = not any(str(turn.get("content") or "").strip() or turn.get("tool_calls") for turn in answer)
    return [{"role": "assistant", "content": SILENCE}] if blank else answer
