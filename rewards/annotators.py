"""Annotators: which of K answers to a prompt is preferred, as the probabilities that online methods learn from.

    annotator = annotator_of({"reward": "align.rewards.rules:everyday_answer", "temperature": 0.1})
    verdicts = annotator(["Say hi."], [["Hi.", "Hello there.", "No."]])
    verdicts.preference[0, 0, 2]      # probability that "Hi." is preferred to "No."

In a recipe an annotator is one of

- a reward: ``"module:function"``, the folder or hub id of a reward model, ``FOLDER@WHO`` of a PAL model, or an
  expression of ``align.rewards.expression``. ``{reward: ..., temperature: 0.1}`` says how sure it is:
  ``p = sigmoid((r_i - r_j) / temperature)``; 1 if not given, and of a reward model the tau that it was saved with.
- ``{gpm: FOLDER}``  a preference model, ``p = sigmoid(s / tau)``; ``temperature`` takes the place of its tau.

**Which preferences are transitive.** Those of one reward are, whatever its temperature, and then offline and online
methods look for the same best answer. A preference model may prefer a to b, b to c and c to a; no answer is best then,
and the solution of the game is a mixture of answers.

**Labels.** The verdicts are probabilities. *Soft* labels give them to the loss as they are; *drawn* ones
(``align.losses.selfplay.draw_labels``) flip a coin of that bias: the same game in expectation, with more variance.
*Argmax* (``argmax_labels``) plays another game, of ``1[p > 1/2]``: an answer that wins 51 of 100 times wins always, a
sure and a hesitant annotator say the same, the temperature says nothing, and preferences that hardly run in a circle
do so at full strength.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

import torch

from .encoding import Content
from .expression import NODES as EXPRESSIONS
from .expression import CannedReference, Expression, ExpressionError, parse_expression
from .functions import RewardFunction
from .named import is_gpm, is_rule, load_reward, reward_folder, reward_name, split_choice
from .scorers import ModelReward, load_scorer
from .verdicts import AnnotatorError, Problem, Verdicts, check_groups

__all__ = [
    "Annotator",
    "AnnotatorError",
    "ParsedAnnotator",
    "Problem",
    "Verdicts",
    "annotator_of",
    "parse_annotator",
]

Groups = Sequence[Sequence[Content]]
Columns = Mapping[str, Sequence[Any]]
NO_COLUMNS: Columns = MappingProxyType({})


class Annotator(Protocol):
    """Prompts, the K answers to each and columns of the data, one value a prompt, to verdicts.

    Raises an AnnotatorError where it fails. A pair that it has nothing to say of is set aside, with the reason.
    """

    @property
    def name(self) -> str:
        """What it is called in records."""

    def __call__(self, prompts: Sequence[Content], answers: Groups, columns: Columns = NO_COLUMNS) -> Verdicts: ...


@dataclass(frozen=True)
class ParsedAnnotator:
    """What a recipe says of its annotator; nothing is loaded yet.

    Attributes:
        name: what it is called.
        make: the annotator.
        models: folders and hub ids of its models, by their place in the recipe; hub ids are not looked up.
        rules: the ``module:function`` of its rules, for ``align.rewards.scorers.asked_columns``.
        data_columns: with references, which the data must have.
    """

    name: str
    make: Callable[[], Annotator]
    models: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    data_columns: tuple[str, ...] = ()

    def load(self) -> Annotator:
        """The annotator.

        Raises:
            ExpressionError: a model that cannot be loaded, or is of another kind than the recipe says.
        """
        try:
            return self.make()
        except ExpressionError:
            raise
        except (ValueError, OSError) as error:
            raise ExpressionError(next(iter(self.models), ""), str(error)) from error


def annotator_of(given: Any) -> Annotator:
    """What a recipe says, loaded.

    Raises:
        ExpressionError: what is wrong in the recipe, and where.
    """
    return parse_annotator(given).load()


def parse_annotator(given: Any) -> ParsedAnnotator:
    """Read what a recipe says: modules are imported and folders are looked for, and no model is loaded.

    Raises:
        ExpressionError: what is wrong, and where.
    """
    if isinstance(given, str):
        return _reward(given, "", None)
    if not isinstance(given, Mapping) or not given:
        _fail("", f"is no annotator: a reward, or a section with {', '.join(_KINDS)}")
    if len(given) == 1 and next(iter(given)) in EXPRESSIONS:
        return _reward(given, "", None)
    kinds = [kind for kind in _KINDS if kind in given]
    if len(kinds) != 1:
        key = str(next(iter(given)))
        near = difflib.get_close_matches(key, [*_KINDS, *EXPRESSIONS], n=1)
        _fail(
            key if not kinds else "",
            f"did you mean {near[0]}?" if near and not kinds else f"give one of {', '.join(_KINDS)}",
        )
    kind = kinds[0]
    parse, known = _KINDS[kind]
    for key in given:
        if key != kind and key not in known:
            _fail(str(key), f"unknown key; known beside {kind}: {', '.join(known) or 'none'}")
    return parse(given)


# --- kinds -----------------------------------------------------------------------------------------------------------


class _Judging(ABC):
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
class RewardAnnotator(_Judging):
    """Differences of a reward over a temperature, as log-odds; pairs of an answer without one are set aside."""

    name: str
    reward: RewardFunction
    temperature: float

    def _verdicts(self, prompts: Sequence[Content], answers: Groups, columns: Columns) -> Verdicts:
        size, found = len(answers[0]), []
        for rows in _apart(prompts):
            asked = [prompts[row] for row in rows for _ in range(size)]
            given = {name: [values[row] for row in rows for _ in range(size)] for name, values in columns.items()}
            found += self.reward(asked, [answer for row in rows for answer in answers[row]], **given)
        rewards = torch.tensor([torch.nan if one is None else one for one in found], dtype=torch.float64)
        rewards = rewards.view(len(prompts), size) / self.temperature
        lacking = torch.tensor([one is None for one in found]).view_as(rewards)
        problems = []
        for i, j in zip(*torch.triu_indices(size, size, 1).tolist(), strict=True):
            for row in (lacking[:, i] | lacking[:, j]).nonzero()[:, 0].tolist():
                none = i if lacking[row, i] else j
                problems.append(Problem(row, i, j, f"answer {none} has no reward: {self.name} gave None"))
        return Verdicts.of_log_odds(rewards[:, :, None] - rewards[:, None], problems)


@dataclass(frozen=True)
class ModelAnnotator(_Judging):
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


# --- what a recipe says ----------------------------------------------------------------------------------------------


def _reward(given: Any, where: str, temperature: float | None) -> ParsedAnnotator:
    try:
        expression = parse_expression(given)
    except ExpressionError as error:
        raise ExpressionError(_join(where, error.where), error.problem) from error
    models: dict[str, str] = {}
    rules = []
    for part in expression.parts:
        place = _join(where, "" if isinstance(given, str) else f"{part.where}.reward")
        if part.is_made and not isinstance(part.reference, CannedReference):
            problem = "an annotator makes no references: give a number, a column of the data or {canned: ...}"
            _fail(_join(where, f"{part.where}.reference"), problem)
        if is_rule(part.reward):
            _tried(place, load_reward, part.reward)
            rules.append(part.reward)
        else:
            models[place] = _model(part.reward, place)
            if not isinstance(given, str):
                part.check_reference(is_gpm(part.reward))
    name = reward_name(given) if isinstance(given, str) else _named(expression)
    if isinstance(given, str) and models:
        return ParsedAnnotator(name, lambda: _of_model(name, given, temperature), models)

    def make() -> Annotator:
        return RewardAnnotator(name, RewardFunction(expression), 1.0 if temperature is None else temperature)

    return ParsedAnnotator(name, make, models, tuple(rules), expression.data_columns)


def _named(expression: Expression) -> str:
    return expression.parts[0].name if len(expression.parts) == 1 else "combined"


def _of_model(name: str, spec: str, temperature: float | None, kind: str | None = None) -> Annotator:
    scorer = load_scorer(spec)
    assert isinstance(scorer, ModelReward)
    if kind is not None and scorer.model.config.kind != kind:
        raise ValueError(f"{spec} is a reward model of kind {scorer.model.config.kind}, not {kind}: write reward")
    return ModelAnnotator(name, scorer, temperature)


def _tempered(given: Mapping[str, Any]) -> ParsedAnnotator:
    return _reward(given["reward"], "reward", _temperature(given))


def _gpm(given: Mapping[str, Any]) -> ParsedAnnotator:
    spec, temperature = _text(given, "gpm"), _temperature(given)
    folder = _model(spec, "gpm")
    name = reward_name(spec)
    return ParsedAnnotator(name, lambda: _of_model(name, spec, temperature, "gpm"), {"gpm": folder})


def _temperature(given: Mapping[str, Any]) -> float | None:
    value = given.get("temperature")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        _fail("temperature", f"is {value!r}; it must be a positive number")
    return float(value)


def _model(spec: str, where: str) -> str:
    """The folder or hub id of a model, without what ``FOLDER@WHO`` says of annotators."""
    found = _tried(where, reward_folder, spec)
    if found is None:
        _fail(where, f"{spec!r} is a rule, where the folder or hub id of a model is asked for")
    return split_choice(found)[0]


def _text(given: Mapping[str, Any], key: str) -> str:
    value = given[key]
    if not isinstance(value, str) or not value:
        _fail(key, f"is {value!r}; it must be text")
    return value


def _tried(where: str, find: Callable[[str], Any], spec: str) -> Any:
    try:
        return find(spec)
    except ValueError as error:
        raise ExpressionError(where, str(error)) from error


def _join(where: str, inside: str) -> str:
    return ".".join(part for part in (where, inside) if part)


def _fail(where: str, problem: str) -> NoReturn:
    raise ExpressionError(where, problem)


_KINDS: dict[str, tuple[Callable[[Mapping[str, Any]], ParsedAnnotator], tuple[str, ...]]] = {
    "reward": (_tempered, ("temperature",)),
    "gpm": (_gpm, ("temperature",)),
}
