"""Any reward as a function that TRL's GRPO calls: ``(prompts, completions, **columns) -> list[float]``.

    reward = RewardFunction.of({"all_of": [
        {"lsc": {"reward": "align.rewards.rules:everyday_answer", "reference": 0.4, "temperature": 0.1}},
        {"lsc": {"reward": "runs/harmless/model", "reference": "harmless_canned"}},
    ]})
    GRPOTrainer(model, reward_funcs=reward, ...)      # the data has the columns prompt and harmless_canned

A rule, a reward model and a preference model are interchangeable. A preference model compares answers, so that its
reward is of an answer among the others of its prompt: the mean log-odds of beating them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align.losses.checks import check_finite

from .expression import Expression, Part, SampledReference, parse_expression
from .named import Reward, load_reward, split_choice

if TYPE_CHECKING:
    from .encoding import Content
    from .models import RewardModel

SILENCE = "..."
Scorer = Callable[[Sequence["Content"], Sequence["Content"]], Tensor]
"""``(prompts, completions) -> rewards (N,)``; the answers to one prompt stand next to each other."""


class RewardFunction:
    """An expression of rewards (``align.rewards.expression``), called as TRL's GRPO calls reward functions.

    Args:
        expression: what to compute.
        scorers: by the name that the expression gives a reward; those that are not given are loaded.
        batch_size: answers in one forward pass of a reward model.

    Attributes:
        __name__: what TRL's metrics call it.
    """

    def __init__(
        self, expression: Expression, *, scorers: Mapping[str, Scorer] | None = None, batch_size: int = 16
    ) -> None:
        self.expression = expression
        given = dict(scorers or {})
        names = dict.fromkeys(part.reward for part in expression.parts)
        self.scorers: dict[str, Scorer] = {
            name: given.get(name) or load_scorer(name, batch_size=batch_size) for name in names
        }
        self.__name__ = expression.parts[0].name if len(expression.parts) == 1 else "combined"

    @classmethod
    def of(cls, given: Any, **options: Any) -> RewardFunction:
        """From an expression as a recipe writes it.

        Raises:
            ExpressionError: it is none. ValueError: a reward that cannot be loaded.
        """
        return cls(parse_expression(given), **options)

    def __call__(
        self,
        prompts: Sequence[Content],
        completions: Sequence[Content],
        completion_ids: Any = None,
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """One number an answer.

        Args:
            prompts, completions: text, or chat messages; the answers to one prompt next to each other.
            completion_ids: not read.
            log_metric: TRL's; told each reward's mean, and the share of answers that reach its reference.
            columns: of the data; references are looked for here. What else TRL gives is not read.

        Raises:
            ValueError: a reference that is missing, or a reward or reference that is not a finite number.
        """
        found = self.columns(prompts, completions, columns)
        if log_metric is not None:
            for part in self.expression.parts:
                log_metric(f"rewards/{part.name}", float(found[part.name].mean()))
            for name, good in self.good(found).items():
                log_metric(f"good/{name}", float(good.double().mean()))
        values: list[float] = self.expression.goal(found).tolist()
        return values

    def columns(
        self, prompts: Sequence[Content], completions: Sequence[Content], given: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Each part's rewards, and the references that stand in columns, (N,) in float64 by name."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions: one completion a prompt")
        scores = {
            name: _checked(name, scorer(prompts, completions), len(prompts)) for name, scorer in self.scorers.items()
        }
        found = {part.name: scores[part.reward] for part in self.expression.parts}
        for part in self.expression.parts:
            if (column := part.reference_column) is not None:
                found[column] = _reference(part, column, given.get(column), len(prompts))
        return found

    def good(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which answers reach each part's reference, (N,) Boolean by name, and under ``all`` which reach them all.

        Parts without a reference are left out; ``all`` is there where two or more have one.
        """
        found: dict[str, Tensor] = {}
        for part in self.expression.parts:
            if part.reference is None:
                continue
            reference = part.reference if isinstance(part.reference, float) else columns[str(part.reference_column)]
            found[part.name] = columns[part.name] >= reference
        if len(found) > 1:
            found["all"] = functools.reduce(torch.logical_and, found.values())
        return found


def load_scorer(name: str, *, batch_size: int = 16) -> Scorer:
    """What ``name`` says: a rule (``module:function``), or a reward model (its folder, its run or a hub id).

    Of a PAL model, ``FOLDER@WHO`` says whose reward (``PalRewardModel.choose``).

    Raises:
        ValueError: no such rule, or a choice of annotator that is missing, unknown or out of place; OSError: no such
            model.
    """
    if is_rule(name):
        return rule_scorer(load_reward(name))
    from .pal_model import load_reward_model  # transformers: not for rules

    return model_scorer(load_reward_model(name), batch_size=batch_size)


def is_rule(name: str) -> bool:
    """Whether a name is ``module:function``, and not a folder that has a colon in its path or in ``FOLDER@WHO``."""
    return ":" in name.partition("@")[0] and not Path(split_choice(name)[0]).exists()


def rule_scorer(rule: Reward) -> Scorer:
    """A rule's rewards; it sees text: the last turn of the user and of the answer."""

    def score(prompts: Sequence[Content], completions: Sequence[Content]) -> Tensor:
        found = rule([last_turn(prompt) for prompt in prompts], [last_turn(answer) for answer in completions])
        return torch.tensor([float(value) for value in found], dtype=torch.float64)

    return score


def model_scorer(model: RewardModel, *, batch_size: int = 16) -> Scorer:
    """A reward model's rewards; of a preference model (gpm), ``group_log_odds``.

    A policy may end its answer at once, and a reward model refuses an answer without words: it is read as ``...``.
    """
    scored = functools.partial(group_log_odds, model) if model.config.kind == "gpm" else model.rewards

    def score(prompts: Sequence[Content], completions: Sequence[Content]) -> Tensor:
        return scored(prompts, [_some_words(answer) for answer in completions], batch_size=batch_size)

    return score


def group_log_odds(
    model: RewardModel, prompts: Sequence[Content], completions: Sequence[Content], *, batch_size: int = 16
) -> Tensor:
    """Mean over the other answers of a prompt of ``score / tau``, the log-odds of being preferred to it, (N,).

    The answers to a prompt are those that stand next to each other. The rewards of a prompt sum to 0.

    Raises:
        ValueError: a prompt with a single answer.
    """
    numbers = [list(group) for _, group in groupby(range(len(prompts)), key=lambda row: prompts[row])]
    alone = next((group[0] for group in numbers if len(group) < 2), None)
    if alone is not None:
        raise ValueError(
            f"row {alone}: one answer to its prompt, and a preference model compares answers: give two or more next "
            "to each other (in GRPO, a batch per device that num_generations divides)"
        )
    matrices = model.score_groups(
        [prompts[group[0]] for group in numbers],
        [[completions[row] for row in group] for group in numbers],
        batch_size=batch_size,
    )
    return torch.cat([matrix.sum(1) / (len(matrix) - 1) for matrix in matrices]) / model.config.tau


def last_turn(content: Content) -> str:
    """What a rule sees: the text, or the last message."""
    return content if isinstance(content, str) else content[-1]["content"]


def _some_words(answer: Content) -> Content:
    if isinstance(answer, str):
        return answer if answer.strip() else SILENCE
    blank = not any(str(turn.get("content") or "").strip() or turn.get("tool_calls") for turn in answer)
    return [{"role": "assistant", "content": SILENCE}] if blank else answer


def _checked(name: str, scores: Tensor, rows: int) -> Tensor:
    if scores.shape != (rows,):
        raise ValueError(f"{name} gave rewards of shape {tuple(scores.shape)} for {rows} answers: one number each")
    check_finite(name, scores)
    return scores.detach().double().cpu()


def _reference(part: Part, column: str, values: Any, rows: int) -> Tensor:
    if values is None:
        made = (
            " (it is sampled before training: align train does)"
            if isinstance(part.reference, SampledReference)
            else ""
        )
        raise ValueError(f"no column {column!r} with the references of {part.name}{made}; none is never taken as 0")
    missing = next((row for row, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise ValueError(f"row {missing}: no {column}, the reference of {part.name}; none is never taken as 0")
    return _checked(column, torch.as_tensor([float(value) for value in values], dtype=torch.float64), rows)
