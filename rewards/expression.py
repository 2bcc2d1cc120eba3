"""A reward as a recipe writes it: rewards by name, what each has to beat, and how they are put together.

    all_of:                                     # good in all: the sum of log sigmoid((r - reference) / temperature)
      - lsc: {reward: "align.rewards.rules:everyday_answer", reference: 0.4, temperature: 0.1}
      - lsc: {reward: runs/harmless/model, reference: harmless_canned}        # a column of the data
      - not:
          lsc: {reward: "my_rules:flattery", reference: {quantile: 0.85, samples: 16}}   # of the model's own answers

Its nodes, each a mapping with one key:

- ``lsc``       one reward against its reference, the log-probability that the answer is good (arXiv:2402.00742). The
  reference is a number, a column of the data, or made: the reward of a canned answer (``{canned: "I cannot help."}``),
  a quantile of the rewards of the starting policy's own answers (``{quantile: 0.85, samples: 16}``), or a prediction
  from the prompt (``{regression: scored.jsonl}``), by a regression on prompts that have a reference: ``align score``
  writes it, as the column NAME_reference.
- ``all_of``, ``any_of``  a list of nodes; ``not``  one node.
- ``weighted``  a list of nodes, each with a ``weight`` beside it: required so many times.
- ``raw_sum``   at the top alone: rewards as they are, ``[{reward, weight}, ...]``, to compare with. A reference there
  changes nothing of the sum; it says from where on an answer counts as good when the answers are judged.

A name alone (``"module:function"``, or the folder or hub id of a reward model) is that reward as it is.

A rule may give None where it does not apply. Where it gives None for all answers to a prompt, the other rewards judge
them (``Expression.of``); where it judges some of them, the others have no value in the whole expression.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from .named import reward_name
from .transforms import AllOf, AnyOf, Goal, LogSigmoidCentered, Not, RawSum, Weighted

T = TypeVar("T")
NODES = ("lsc", "all_of", "any_of", "not", "weighted", "raw_sum")
_LSC_KEYS = ("reward", "reference", "temperature", "name")
_RAW_KEYS = ("reward", "weight", "reference", "name")
_REFERENCE_KEYS = ("quantile", "samples", "canned", "regression")
_REFERENCES = 'a number, a column of the data, {quantile: 0.85, samples: 16}, {canned: "..."} or {regression: DATA}'
_FEWEST_SAMPLES = 2


class ExpressionError(ValueError):
    """What is wrong, and where: ``where`` is dotted, such as ``all_of.0.lsc.reference``, and empty at the top."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.where, self.problem = where, problem


@dataclass(frozen=True)
class SampledReference:
    """The quantile of the rewards of ``samples`` answers that the starting policy gives to a prompt."""

    quantile: float
    samples: int


@dataclass(frozen=True)
class CannedReference:
    """The reward of one and the same answer to every prompt, such as a refusal."""

    answer: str


@dataclass(frozen=True)
class PredictedReference:
    """A prediction from the prompt, by a regression on the prompts of ``source`` and their references."""

    source: str


Reference = float | str | SampledReference | CannedReference | PredictedReference


@dataclass(frozen=True)
class Part:
    """One reward of an expression.

    Attributes:
        name: its column; what metrics call it.
        reward: ``module:function``, or the folder or hub id of a reward model.
        reference: a number, a column of the data, or how it is made; None for a raw reward that has none.
        where: its place in the expression.
    """

    name: str
    reward: str
    reference: Reference | None
    where: str

    @property
    def is_made(self) -> bool:
        """Whether its reference is made of rewards or prompts, and neither given nor left out."""
        return isinstance(self.reference, SampledReference | CannedReference | PredictedReference)

    @property
    def reference_column(self) -> str | None:
        """The column that its reference stands in; None for a number, or where there is none."""
        if self.is_made:
            return f"{self.name}_reference"
        return self.reference if isinstance(self.reference, str) else None

    def check_reference(self, compares: bool) -> None:
        """Raise an ExpressionError where a reference is to be made for a reward that ``compares`` answers."""
        if compares and self.is_made:
            problem = (
                f"{self.reward} is a gpm, whose reward is of an answer among the others of its prompt: no answer has "
                "one by itself that could be the reference; give a number (0: as good as the others on the whole)"
            )
            raise ExpressionError(_join(self.where, "reference"), problem)


@dataclass(frozen=True)
class Expression:
    """What a recipe's expression says.

    Attributes:
        goal: of columns by name (``align.rewards.transforms``).
        parts: its rewards, in the order in which they stand.
    """

    goal: Goal | RawSum
    parts: tuple[Part, ...]

    @property
    def data_columns(self) -> tuple[str, ...]:
        """Columns that the data must have."""
        return tuple(dict.fromkeys(part.reference for part in self.parts if isinstance(part.reference, str)))

    def of(self, names: Collection[str]) -> Goal | RawSum | None:
        """The goal of an answer that has these rewards alone, as if the others were not asked for; None: of none."""
        found: Goal | RawSum | None = _of(self.goal, names)
        return found


def _of(goal: Goal | RawSum, names: Collection[str]) -> Any:
    if isinstance(goal, LogSigmoidCentered):
        return goal if goal.reward in names else None
    if isinstance(goal, Not):
        inner = _of(goal.goal, names)
        return None if inner is None else Not(inner)
    if isinstance(goal, RawSum):
        kept: list[Any] = [name if name in names else None for name in goal.rewards]
    elif isinstance(goal, AllOf | AnyOf | Weighted):
        kept = [_of(one, names) for one in goal.goals]
    else:
        raise TypeError(f"{type(goal).__name__} is no goal of an expression")
    left = [one for one in kept if one is not None]
    if not left:
        return None
    if isinstance(goal, AllOf | AnyOf):
        return type(goal)(left)
    weights = goal.weights or (1.0,) * len(kept)
    return type(goal)(left, [w for w, one in zip(weights, kept, strict=True) if one is not None])


def parse_expression(given: Any) -> Expression:
    """Read an expression.

    Raises:
        ExpressionError: it is not of the form above, or two of its rewards have the same name.
    """
    parts: list[Part] = []
    if isinstance(given, str):
        given = {"raw_sum": [given]}
    goal = _raw_sum(given["raw_sum"], parts) if _is_raw_sum(given) else _node(given, "", parts)
    _check_names(parts)
    return Expression(goal, tuple(parts))


def _is_raw_sum(given: Any) -> bool:
    return isinstance(given, Mapping) and set(given) == {"raw_sum"}


def _node(given: Any, where: str, parts: list[Part]) -> Goal:
    if not isinstance(given, Mapping) or len(given) != 1:
        _fail(where, f"is not one of {', '.join(NODES)} with what belongs to it, such as lsc: {{reward: ...}}")
    kind, content = next(iter(given.items()))
    inside = _join(where, kind)
    if kind == "raw_sum":
        _fail(inside, "stands at the top alone: a sum of raw rewards is the probability of nothing")
    if kind not in NODES:
        near = difflib.get_close_matches(str(kind), NODES, n=1)
        _fail(inside, f"is no way to combine rewards; {f'did you mean {near[0]}?' if near else ', '.join(NODES)}")
    if kind == "lsc":
        return _lsc(content, inside, parts)
    if kind == "not":
        return _built(inside, lambda: Not(_node(content, inside, parts)))
    if kind == "weighted":
        nodes, weights = [], []
        for place, item in _items(content, inside):
            if not isinstance(item, Mapping) or "weight" not in item:
                _fail(place, "has no weight: write {weight: 2, lsc: {...}}")
            weights.append(_number(item["weight"], _join(place, "weight")))
            nodes.append(_node({key: value for key, value in item.items() if key != "weight"}, place, parts))
        return _built(inside, lambda: Weighted(nodes, weights))
    goals = [_node(item, place, parts) for place, item in _items(content, inside)]
    return AllOf(goals) if kind == "all_of" else AnyOf(goals)


def _lsc(given: Any, where: str, parts: list[Part]) -> Goal:
    fields = _fields(given, where, _LSC_KEYS)
    if fields.get("reference") is None:
        _fail(_join(where, "reference"), f"is missing: {_REFERENCES}")
    part = _part(fields, where, parts)
    temperature = _number(fields.get("temperature", 1.0), _join(where, "temperature"))
    reference = part.reference if isinstance(part.reference, float) else part.reference_column
    assert reference is not None
    return _built(where, lambda: LogSigmoidCentered(part.name, reference, temperature))


def _raw_sum(given: Any, parts: list[Part]) -> RawSum:
    names, weights = [], []
    for place, item in _items(given, "raw_sum"):
        fields = _fields({"reward": item} if isinstance(item, str) else item, place, _RAW_KEYS)
        names.append(_part(fields, place, parts).name)
        weights.append(_number(fields.get("weight", 1.0), _join(place, "weight")))
    return _built("raw_sum", lambda: RawSum(names, weights))


def _part(fields: Mapping[str, Any], where: str, parts: list[Part]) -> Part:
    reward, name = fields.get("reward"), fields.get("name")
    if not isinstance(reward, str) or not reward:
        _fail(_join(where, "reward"), "is missing: module:function, or the folder or hub id of a reward model")
    if name is not None and (not isinstance(name, str) or not name):
        _fail(_join(where, "name"), "is not text")
    reference = _reference(fields.get("reference"), _join(where, "reference"))
    part = Part(name or reward_name(reward), reward, reference, where)
    parts.append(part)
    return part


def _reference(given: Any, where: str) -> Reference | None:
    if given is None or (isinstance(given, str) and given):
        return given or None
    if not isinstance(given, Mapping):
        return _number(given, where)
    fields = _fields(given, where, _REFERENCE_KEYS)
    for key, kind in (("canned", CannedReference), ("regression", PredictedReference)):
        if key not in fields:
            continue
        if len(fields) > 1:
            _fail(where, f"{' and '.join(fields)} are two references: give one")
        if not isinstance(fields[key], str) or not fields[key].strip():
            _fail(_join(where, key), "is empty: the text of an answer" if key == "canned" else "is no data set")
        return kind(fields[key])
    quantile = _number(fields.get("quantile", 0.85), _join(where, "quantile"))
    samples = fields.get("samples", 16)
    if not 0 < quantile < 1:
        _fail(_join(where, "quantile"), f"is {quantile:g}; it must be between 0 and 1, without the ends")
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < _FEWEST_SAMPLES:
        _fail(_join(where, "samples"), f"is {samples!r}; a quantile takes {_FEWEST_SAMPLES} answers a prompt or more")
    return SampledReference(quantile, samples)


def _check_names(parts: Sequence[Part]) -> None:
    """A name is one column: of one reward against one reference, and not of the data's."""
    seen: dict[str, Part] = {}
    columns = {part.reference_column for part in parts}
    for part in parts:
        other = seen.setdefault(part.name, part)
        if other is not part:
            _fail(part.where, f"{part.name} is the name of {other.where} too; give each a name")
        if part.name in columns:
            _fail(part.where, f"{part.name} is the name of a reference column too; give this reward another name")


def _fields(given: Any, where: str, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        _fail(where, f"is not a section with {', '.join(known)}")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            _fail(_join(where, str(key)), f"unknown key; {hint}")
    return given


def _items(given: Any, where: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        _fail(where, "is not a list of one or more")
    return ((f"{where}.{number}", item) for number, item in enumerate(given))


def _number(given: Any, where: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        _fail(where, f"is {given!r}; it must be a finite number")
    return float(given)


def _built(where: str, make: Callable[[], T]) -> T:
    """What the transforms refuse, with its place."""
    try:
        return make()
    except ExpressionError:
        raise
    except ValueError as error:
        raise ExpressionError(where, str(error)) from error


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _fail(where: str, problem: str) -> NoReturn:
    raise ExpressionError(where, problem)
