"""Any reward as a function that TRL's GRPO calls: ``(prompts, completions, **columns) -> list[float | None]``.

    reward = RewardFunction.of({"all_of": [
        {"lsc": {"reward": "align.rewards.rules:everyday_answer", "reference": 0.4, "temperature": 0.1}},
        {"lsc": {"reward": "runs/harmless/model", "reference": {"canned": "I cannot help with that."}}},
    ]})
    GRPOTrainer(model, reward_funcs=reward, ...)

Rules and models are scored by ``align.rewards.scorers``.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .encoding import Content, as_answer, plain
from .expression import CannedReference, Expression, Part, parse_expression
from .named import OF_TRL
from .scorers import NO_COLUMNS, RewardError, Scorer, load_scorer, of_rows

logger = logging.getLogger(__name__)

Rewards = list[float | None]


class RewardFunction:
    """An expression of rewards (``align.rewards.expression``), called as TRL's GRPO calls reward functions.

    Args:
        expression: what to compute.
        scorers: by the name that the expression gives a reward; those that are not given are loaded.
        batch_size: answers in one forward pass of a reward model.

    Attributes:
        __name__: what TRL's metrics call it.

    Raises:
        ExpressionError: a reference that a preference model cannot have. ValueError, OSError: a reward that cannot be
            loaded.
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
        for part in expression.parts:
            part.check_reference(self.scorers[part.reward].compares)
        self.__name__ = expression.parts[0].name if len(expression.parts) == 1 else "combined"
        self._warned = False

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
    ) -> Rewards:
        """One number an answer, or None, which TRL leaves out of its group.

        A rule that gives None for every answer to a prompt does not apply to the prompt: the other rewards judge it.
        Where it judges other answers to the prompt, None is no value to combine, and the answer has none.

        Args:
            prompts, completions: text, or chat messages; the answers to one prompt next to each other.
            completion_ids: for rules that ask for them.
            log_metric: TRL's; told each reward's mean, the share of answers that reach its reference, and the share
                of answers, and of prompts with all their answers, that have no reward (``unrewarded``).
            columns: of the data, for references and for rules that ask for them by name; what else TRL gives, too.

        Raises:
            RewardError: a rule that fails, a reference that is missing, or a number that is not finite.
        """
        trls = {"completion_ids": completion_ids, "log_metric": log_metric}
        given = {key: value for key, value in {**columns, **trls}.items() if value is not None}
        found = self.columns(prompts, completions, given)
        rewards = self._combined(prompts, found, given)
        unrewarded = [all(rewards[row] is None for row in rows) for rows in _same_prompt(prompts, given)]
        self._warn_of(sum(unrewarded), len(unrewarded))
        if log_metric is not None:
            means = {f"rewards/{part.name}": found[part.name] for part in self.expression.parts}
            means |= {f"good/{name}": values for name, values in self.good(prompts, found, given).items()}
            means["unrewarded/answers"] = torch.tensor([reward is None for reward in rewards]).double()
            means["unrewarded/prompts"] = torch.tensor(unrewarded).double()
            for name, values in means.items():
                if len(there := values[~values.isnan()]):
                    log_metric(name, float(there.mean()))
        return rewards

    def columns(
        self, prompts: Sequence[Content], completions: Sequence[Content], given: Mapping[str, Any] = NO_COLUMNS
    ) -> dict[str, Tensor]:
        """Each part's rewards, and the references that stand in columns, (N,) in float64 by name.

        NaN is where a rule gave None: no reward, and no reference where there is no reward. A made reference that is
        missing, since the rule gave None for the answers that it is made of, says that the rule does not judge the
        prompt: no answer to it has that reward.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions: one completion a prompt")
        scores = {name: self._scored(name, prompts, completions, given) for name in self.scorers}
        found = {part.name: scores[part.reward] for part in self.expression.parts}
        for part in self.expression.parts:
            if (column := part.reference_column) is not None:
                values = self._references(part, column, prompts, given)
                if part.is_made and values.shape == found[part.name].shape:
                    found[part.name] = found[part.name].masked_fill(values.isnan(), math.nan)
                _check_references(part, column, values, found[part.name])
                found[column] = values
        return found

    def good(
        self, prompts: Sequence[Content], columns: Mapping[str, Tensor], given: Mapping[str, Any] = NO_COLUMNS
    ) -> dict[str, Tensor]:
        """Which answers reach each part's reference, 1 or 0, (N,) by name, and under ``all`` which reach them all.

        NaN is where there is no reward, of ``all`` where the combination has none. Parts without a reference are left
        out; ``all`` is there where two or more have one.
        """
        found: dict[str, Tensor] = {}
        for part in self.expression.parts:
            if part.reference is None:
                continue
            reference = part.reference if isinstance(part.reference, float) else columns[str(part.reference_column)]
            reached = (columns[part.name] >= reference).double()
            found[part.name] = reached.masked_fill(columns[part.name].isnan(), math.nan)
        if len(found) > 1:
            least = functools.reduce(lambda a, b: torch.fmin(a, b), found.values())  # fmin passes over NaN
            found["all"] = least.masked_fill(~self._judging(prompts, columns, given)[1], math.nan)
        return found

    def _judging(
        self, prompts: Sequence[Content], found: Mapping[str, Tensor], given: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Which parts judge each answer's prompt, (N, P), and whether the answer has all of their rewards, (N,)."""
        there = torch.stack([~found[part.name].isnan() for part in self.expression.parts], 1)
        judging = there.clone()
        for rows in _same_prompt(prompts, given):
            judging[rows] = there[rows].any(0)
        return judging, (there == judging).all(1)

    def _combined(self, prompts: Sequence[Content], found: Mapping[str, Tensor], given: Mapping[str, Any]) -> Rewards:
        """The goal of every answer, of the rewards that judge its prompt."""
        names = [part.name for part in self.expression.parts]
        judging, complete = self._judging(prompts, found, given)
        values: Rewards = [None] * len(prompts)
        for pattern in {tuple(row) for row in judging.tolist()}:
            goal = self.expression.of([name for name, has in zip(names, pattern, strict=True) if has])
            if goal is None:
                continue
            rows = ((judging == torch.tensor(pattern)).all(1) & complete).nonzero()[:, 0]
            reached = goal({name: column[rows] for name, column in found.items() if not column[rows].isnan().any()})
            for row, value in zip(rows.tolist(), reached.tolist(), strict=True):
                values[row] = value
        return values

    def _warn_of(self, unrewarded: int, prompts: int) -> None:
        if unrewarded and not self._warned:
            self._warned = True
            logger.warning(
                "%s: no answer to %d of %d prompts has a reward, so that they teach nothing; said once, and counted "
                "as unrewarded/prompts",
                self.__name__,
                unrewarded,
                prompts,
            )

    def _scored(
        self, name: str, prompts: Sequence[Content], completions: Sequence[Content], given: Mapping[str, Any]
    ) -> Tensor:
        try:
            found = self.scorers[name](prompts, completions, given)
        except ValueError as error:
            row = error.row if isinstance(error, RewardError) else None
            where = "" if row is None else f" (of prompt {plain(prompts[row], 'user')[:60]!r})"
            raise RewardError(None, f"{name}: {error}{where}") from error
        return _tensor(found)

    def _references(self, part: Part, column: str, prompts: Sequence[Content], given: Mapping[str, Any]) -> Tensor:
        if not isinstance(part.reference, CannedReference):
            values = given.get(column)
            if values is None:
                made = " (align train makes it before training)" if part.is_made else ""
                raise RewardError(
                    None, f"no column {column!r} with the references of {part.name}{made}; none is never taken as 0"
                )
            return _tensor(values)
        runs = _same_prompt(prompts, given)
        firsts = [run[0] for run in runs]
        asked = [prompts[row] for row in firsts]
        answers = [as_answer(prompt, part.reference.answer) for prompt in asked]
        canned = self._scored(part.reward, asked, answers, of_rows(_of_data(given), firsts, len(prompts)))
        return canned.repeat_interleave(torch.tensor([len(run) for run in runs], dtype=torch.long))


def _same_prompt(prompts: Sequence[Content], given: Mapping[str, Any]) -> list[list[int]]:
    """Numbers of the answers to each prompt, which stand next to each other; with other columns it is another one."""
    own = _of_data(given)
    keys = [(prompt, repr(of_rows(own, [row], len(prompts)))) for row, prompt in enumerate(prompts)]
    return [list(rows) for _, rows in groupby(range(len(prompts)), key=lambda row: keys[row])]


def _of_data(given: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the data; what TRL gives beside them is of other answers."""
    return {name: value for name, value in given.items() if name not in OF_TRL}


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)


def _check_references(part: Part, column: str, references: Tensor, rewards: Tensor) -> None:
    """Raise a RewardError where an answer has a reward, and no finite reference."""
    if references.shape != rewards.shape:
        raise RewardError(None, f"{len(references)} values of {column} for {len(rewards)} answers: one each")
    missing = (~rewards.isnan() & ~references.isfinite()).nonzero()[:, 0].tolist()
    if missing:
        raise RewardError(missing[0], f"no {column}, the reference of {part.name}; none is never taken as 0")
