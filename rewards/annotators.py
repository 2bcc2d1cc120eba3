"""Annotators: which of K answers to a prompt is preferred, as the probabilities that online methods learn from.

    annotator = annotator_of({"reward": "align.rewards.rules:everyday_answer", "temperature": 0.1})
    verdicts = annotator(["Say hi."], [["Hi.", "Hello there.", "No."]])
    verdicts.preference[0, 0, 2]      # probability that "Hi." is preferred to "No."

In a recipe an annotator is one of

- a reward: ``"module:function"``, the folder or hub id of a reward model, ``FOLDER@WHO`` of a PAL model, or an
  expression of ``align.rewards.expression``. ``{reward: ..., temperature: 0.1}`` says how sure it is:
  ``p = sigmoid((r_i - r_j) / temperature)``; 1 if not given, and of a reward model the tau that it was saved with.
- ``{gpm: FOLDER}``  a preference model, ``p = sigmoid(s / tau)``; ``temperature`` takes the place of its tau.
- ``{pal: FOLDER, annotators: {ann: 2, bob: 1}}``  the people of a PAL model in these shares, or ``all`` alike: the
  mean of ``sigmoid(r_i - r_j)``, each by their own reward.
- ``{compare: "module:function"}``  a function of prompts, first and second answers to probabilities that the first is
  preferred; asked in both orders unless ``both_orders: false``.
- ``{judge: {url: "http://localhost:8000", model: NAME}}``  a language model behind a server (``align.rewards.judge``).

**Which preferences are transitive.** Those of one reward are, or of one expression, whatever the temperature: one
answer is best, online and offline. The others may prefer a to b, b to c and c to a, a population too, though none of
its people does. No answer is best then: the solution of the game is a mixture of answers, which online methods look
for, while offline ones find what does best against the data's answers.

**Labels.** The verdicts are probabilities. *Soft* labels give them to the loss as they are; *drawn* ones
(``align.losses.selfplay.draw_labels``) flip a coin of that bias: the same game in expectation, with more variance.
*Argmax* (``argmax_labels``) plays another game, of ``1[p > 1/2]``: an answer that wins 51 of 100 times wins always, a
sure and a hesitant annotator say the same, the temperature says nothing, and preferences that hardly run in a circle
do so at full strength.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

from .annotator_kinds import CompareAnnotator, ModelAnnotator, PalAnnotator, RewardAnnotator
from .encoding import Content
from .expression import NODES as EXPRESSIONS
from .expression import CannedReference, Expression, ExpressionError, parse_expression
from .functions import RewardFunction
from .judge import Judge, parse_judge
from .named import FITTED_FILE, is_gpm, is_rule, load_function, load_reward, reward_folder, reward_name, split_choice
from .pal import CONFIG_FILE as PAL_FILE
from .scorers import ModelReward, load_scorer
from .verdicts import NO_COLUMNS, AnnotatorError, Columns, Groups, Problem, Verdicts

__all__ = [
    "Annotator",
    "AnnotatorError",
    "ParsedAnnotator",
    "Problem",
    "Verdicts",
    "annotator_of",
    "parse_annotator",
]


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
            ExpressionError: a model that cannot be loaded, or is of another kind than the recipe says; a judge whose
                key is not in the environment.
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
    given = {key: value for key, value in given.items() if value is not None} or given  # null takes a key away
    if len(given) == 1 and next(iter(given)) in EXPRESSIONS:
        return _reward(given, "", None)
    kinds = [kind for kind in _KINDS if kind in given]
    if len(kinds) > 1:
        _fail("", f"has {' and '.join(kinds)}: give one, or the whole annotator at once, {{{kinds[-1]}: ...}}")
    if not kinds:
        key = str(next(iter(given)))
        near = difflib.get_close_matches(key, [*_KINDS, *EXPRESSIONS], n=1)
        _fail(key, f"did you mean {near[0]}?" if near else f"give one of {', '.join(_KINDS)}")
    kind = kinds[0]
    parse, known = _KINDS[kind]
    for key in given:
        if key != kind and key not in known:
            _fail(str(key), f"unknown key; known beside {kind}: {', '.join(known) or 'none'}")
    return parse(given)


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
            if split_choice(part.reward)[1] is None and (Path(models[place]) / PAL_FILE).is_file():
                _fail(place, f"{part.reward} has a reward a person: write pal: FOLDER with annotators, or FOLDER@WHO")
            if part.is_made and is_gpm(part.reward):
                _fail(_join(where, f"{part.where}.reference"), "a gpm compares answers: no canned one has a reward")
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


def _pal(given: Mapping[str, Any]) -> ParsedAnnotator:
    spec = _text(given, "pal")
    folder = _model(spec, "pal")
    if split_choice(spec)[1] is not None:
        _fail("pal", f"{spec} names one person, who is a reward: write reward, or the folder alone and annotators")
    if not (Path(folder) / PAL_FILE).is_file():
        _fail("pal", f"{spec}: no {PAL_FILE} in this folder, so it holds no PAL model")
    known = list(json.loads((Path(folder) / PAL_FILE).read_text(encoding="utf-8"))["users"])
    if (Path(folder) / FITTED_FILE).is_file():
        known += json.loads((Path(folder) / FITTED_FILE).read_text(encoding="utf-8"))
    people = _people(given.get("annotators"), known)
    name = reward_name(spec)

    def make() -> Annotator:
        from .pal_model import PalRewardModel  # transformers: not for reading recipes

        return PalAnnotator(name, PalRewardModel.from_pretrained(folder), people)

    return ParsedAnnotator(name, make, {"pal": folder})


def _people(given: Any, known: Sequence[str]) -> dict[str, float]:
    """Shares by name, 1 in sum."""
    if given == "all":
        given = dict.fromkeys(known, 1)
    if not isinstance(given, Mapping) or not given:
        _fail("annotators", "is missing: all, or weights by name, {ann: 2, bob: 1}")
    for name, weight in given.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1) or known[:8]
            _fail(f"annotators.{name}", f"the model knows no such annotator; it knows {', '.join(near)}")
        _positive(weight, f"annotators.{name}")
    total = math.fsum(given.values())
    return {name: weight / total for name, weight in given.items()}


def _compare(given: Mapping[str, Any]) -> ParsedAnnotator:
    spec, both_orders = _text(given, "compare"), given.get("both_orders", True)
    if not isinstance(both_orders, bool):
        _fail("both_orders", f"is {both_orders!r}; it must be true or false")
    try:
        function = load_function(spec, "function", "(prompts, first, second)")
    except ValueError as error:
        raise ExpressionError("compare", str(error)) from error
    name = spec.rpartition(":")[2]
    return ParsedAnnotator(name, lambda: CompareAnnotator(name, function, both_orders))


def _judge(given: Mapping[str, Any]) -> ParsedAnnotator:
    try:
        settings = parse_judge(given["judge"])
    except ExpressionError as error:
        raise ExpressionError(_join("judge", error.where), error.problem) from error
    return ParsedAnnotator(settings.model, lambda: Judge.of(settings))


def _temperature(given: Mapping[str, Any]) -> float | None:
    value = given.get("temperature")
    if value is None:
        return None
    return _positive(value, "temperature")


def _positive(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        _fail(where, f"is {value!r}; it must be a positive number")
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
    "pal": (_pal, ("annotators",)),
    "compare": (_compare, ("both_orders",)),
    "judge": (_judge, ()),
}
