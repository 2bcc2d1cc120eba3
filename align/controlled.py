"""Answers under a constraint or a reward: ``align generate --constraint``, on a prompt or on rows of data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from align.data.rows import Content
from align.decoding.constraints import (
    Built,
    Constraint,
    ConstraintError,
    Fault,
    FunctionError,
    Memo,
    Vocabulary,
    file_of,
    parse,
    read_schemas,
    written,
)
from align.decoding.constraints.wire import BYTES
from align.decoding.law import Law
from align.decoding.request import Answer, Method, Potential, Request, satisfies
from align.errors import AlignError, ConfigError
from align.rewards.encoding import as_answer
from align.rewards.scorers import RewardError, Scorer, asked_columns, load_scorer

if TYPE_CHECKING:
    from align.generate import Answerer


ROWS = 512
"""Rows whose constraints are held at a time."""
KEPT = 64
"""Constraints of rows that are kept for rows to come."""
Write = Callable[[Mapping[int, dict[str, Any]]], None]


class Decode(Protocol):
    """``align.decoding.generate`` on some engine."""

    def __call__(
        self,
        requests: Sequence[Request],
        vocabulary: Vocabulary,
        *,
        on_answer: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]: ...


@dataclass(frozen=True)
class Control:
    """What answers must be, and how they are drawn.

    Args:
        constraint: as ``align.decoding.constraints.parse`` reads it; None for any text.
        constraint_field: column with each row's own constraint; with a constraint ``sql:FILE``, the name of the
            row's schema in that file.
        constraint_timeout: seconds for one call of a Python predicate, of the rows that have one.
        method: see ``align.decoding.request.Request``.
        particles: sequences a prompt.
        top_k, top_p: what the law is cut to, see ``align.decoding.law.Law``.
        max_draws: questions about one token after which it is a dead end; None for no limit.
        take: the answer is ``drawn`` by weight, or the ``best``, the text of most weight.
        reward: rule or reward model; the target is multiplied by ``exp(reward_strength * reward)``.
        reward_strength: nats a unit of reward.
        reward_every: steps between looks at unfinished answers, to guide; 0: only complete answers are judged.
    """

    constraint: str | None = None
    constraint_field: str | None = None
    constraint_timeout: float | None = None
    method: Method = "awrs-smc"
    particles: int = 8
    top_k: int | None = None
    top_p: float | None = None
    max_draws: int | None = None
    take: Literal["drawn", "best"] = "drawn"
    reward: str | None = None
    reward_strength: float = 1.0
    reward_every: int = 0


def check(control: Control, temperature: float) -> list[tuple[str, str]]:
    """What is wrong with settings by themselves, without a model: ``(option, what)`` for each."""
    problems = []
    try:
        Law(temperature, control.top_k, control.top_p)
    except ValueError as error:
        name, _, _ = str(error).partition(" ")
        problems.append((_option(name), str(error)))
    spec, field = control.constraint, control.constraint_field
    try:
        if spec is not None and field is not None:
            path = file_of(spec)
            if not spec.startswith("sql:") or "#" in spec:
                problems.append(("--constraint", f"{spec}: with --constraint-field, write sql:FILE alone, or nothing"))
            elif path is not None:
                read_schemas(path)
        elif spec is not None and not (spec.startswith("python:") and control.constraint_timeout is not None):
            parse(spec, BYTES, timeout=control.constraint_timeout)
    except ConstraintError as error:
        problems.append(("--constraint", str(error)))
    return problems


class Controller:
    """A model that answers under control.

    Args:
        answerer: the model.
        control: what its answers must be.

    Raises:
        AlignError: the model's cache cannot be forked, a setting is out of range, the one constraint of all rows
            cannot be had, or the reward cannot be loaded or compares answers instead of scoring them.
    """

    def __init__(self, answerer: Answerer, control: Control) -> None:
        self.answerer, self.control = answerer, control
        try:
            self.law = Law(answerer.settings.temperature, control.top_k, control.top_p)
            self.vocabulary, self._decode = answerer.decoder()
        except ValueError as error:
            raise AlignError(f"{answerer.settings.model}: {error}") from error
        self.scorer = load_reward(control.reward) if control.reward else None
        self._parsed = lru_cache(maxsize=KEPT)(self._parse)
        self._shared: Memo | None = None
        if control.constraint and control.constraint_field is None:
            found = self._parse(control.constraint)
            if isinstance(found, ConstraintError):
                raise AlignError(str(found)) from found
            self._shared = Memo(found)

    def answer(
        self,
        encoded: Mapping[int, Sequence[int]],
        rows: Mapping[int, Mapping[str, Any]],
        write: Write,
    ) -> None:
        """Answer rows of data; ``write`` is called with each as soon as it is there.

        Args:
            encoded: token ids of the prompts, by number of the row.
            rows: the rows, with their columns.
            write: takes the columns that a row gains. Where a row fails, they say why.
        """
        numbers = list(encoded)
        for start in range(0, len(numbers), ROWS):
            self._answer({number: encoded[number] for number in numbers[start : start + ROWS]}, rows, write)

    def _answer(
        self,
        encoded: Mapping[int, Sequence[int]],
        rows: Mapping[int, Mapping[str, Any]],
        write: Write,
    ) -> None:
        numbers, requests = list[int](), list[Request]()
        for number, ids in encoded.items():
            try:
                requests.append(self._request(number, ids, rows[number]))
                numbers.append(number)
            except ConstraintError as error:
                write({number: self._columns(Answer(None, (), False, str(error)), None)})
        self._decode(
            requests,
            self.vocabulary,
            on_answer=lambda place, answer: write({numbers[place]: self._columns(answer, requests[place].constraint)}),
        )

    def _request(self, number: int, ids: Sequence[int], row: Mapping[str, Any]) -> Request:
        settings, control = self.answerer.settings, self.control
        return Request(
            prompt=ids,
            constraint=self._constraint(row),
            method=control.method,
            particles=control.particles,
            law=self.law,
            seed=settings.seed * 1_000_003 + number,
            max_new_tokens=settings.max_new_tokens,
            max_draws=control.max_draws,
            potential=self._potential(row) if self.scorer is not None else None,
            potential_every=control.reward_every,
        )

    def _constraint(self, row: Mapping[str, Any]) -> Constraint | None:
        if self.control.constraint_field is None:
            return self._shared
        found = self._parsed(spec_of(self.control, row) or "")
        if isinstance(found, ConstraintError):
            raise found
        return found

    def _parse(self, spec: str) -> Constraint | ConstraintError:
        timeout = self.control.constraint_timeout
        if self.control.constraint_field is not None and not spec.startswith("python:"):
            timeout = None  # it is for the rows that can use it
        try:
            found = parse(spec, self.vocabulary, timeout=timeout)
            if self.answerer.settings.engine == "vllm":
                return Built(found, written(spec, timeout=timeout))  # which goes into the engine as JSON
            return found
        except ConstraintError as error:
            return error
        except Exception as error:  # whatever a row's file holds, the others go on
            return ConstraintError(f"{spec}: {type(error).__name__}: {error}")

    def _potential(self, row: Mapping[str, Any]) -> Potential:
        assert self.scorer is not None
        others = {name: value for name, value in row.items() if name != "prompt"}
        control = self.control
        return reward_potential(
            self.scorer, f"reward {control.reward}", control.reward_strength, row["prompt"], others, self.vocabulary
        )

    def _columns(self, answer: Answer, constraint: Constraint | None) -> dict[str, Any]:
        result, valid, reason = answer.result, answer.valid, answer.reason
        taken = result.drawn if result is not None else None
        if result is not None and result.best is not None and self.control.take == "best":
            taken = result.best
            valid = satisfies(constraint, taken.tokens, self.vocabulary)
            reason = "" if valid else reason or "the constraint refuses it when it is asked again from the start"
        weighted = self.control.method != "rejection"
        return {
            "completion": self.vocabulary.text(taken.tokens) if taken is not None else None,
            "tokens": len(taken.tokens) if taken is not None else 0,
            "finished": taken is not None and taken.tokens[-1] in self.vocabulary.ends,
            "valid": valid,
            "reason": reason,
            "log_normaliser": _number(result.log_normaliser) if result is not None and weighted else None,
            "ess": result.ess if result is not None else None,
            "calls_per_token": float(np.mean(answer.evaluations)) if answer.evaluations else None,
            "masks": answer.masks,
            "dead_ends": result.dead_ends if result is not None else None,
            "resamplings": result.resamplings if result is not None else None,
            "samples": [
                {"completion": self.vocabulary.text(sample.tokens), "log_weight": _number(sample.log_weight)}
                for sample in (result.samples if result is not None else ())
            ],
        }


def reward_potential(
    scorer: Scorer, name: str, strength: float, prompt: Content, others: Mapping[str, Any], vocabulary: Vocabulary
) -> Potential:
    """``strength`` times a reward, of the texts of particles.

    Args:
        scorer: of answers one by one.
        name: of the reward, for errors.
        strength: nats a unit of reward.
        prompt: that they answer.
        others: the prompt's further columns, which rules may ask for.
        vocabulary: of the model.
    """

    def potential(sequences: Sequence[tuple[int, ...]]) -> list[float]:
        answers = [as_answer(prompt, vocabulary.text(tokens)) for tokens in sequences]
        columns = {column: [value] * len(answers) for column, value in others.items()}
        try:
            scores = scorer([prompt] * len(answers), answers, columns)
        except (ValueError, TypeError) as error:
            kind = FunctionError if reward_fault(error) else ConstraintError
            raise kind(f"{name}: {error}") from error
        found = [score for score in scores if score is not None]
        if len(found) < len(scores):
            said = repr(vocabulary.text(sequences[list(scores).index(None)]))
            raise ConstraintError(
                f"{name}: no number for {said}, so that it has no weight; a rule that judges here gives a number for "
                "every answer, and for unfinished ones where they are looked at on the way"
            )
        return [strength * score for score in found]

    return potential


def reward_fault(error: Exception) -> Fault:
    """Whose it is that a scorer raised: rows that cannot be scored it refuses by a ValueError, and so does a rule.

    A reward model names what is wrong with a row itself; what a rule raises is the cause of a ``RewardError``, which
    has none where the rule gave the wrong thing.
    """
    refused = (
        isinstance(error.__cause__, ValueError)
        if isinstance(error, RewardError)
        else isinstance(error, ValueError | TypeError)
    )
    return "" if refused else "function"


class Inputs:
    """What an answer depends on beside the settings: files and columns as they are now, so that changes are seen.

    Args:
        control: what answers must be. A reward model goes by its name, as the model does.

    Raises:
        AlignError: there is no such rule.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._digest = lru_cache(maxsize=64)(_digest)
        try:
            self._asked, self._asks_all = asked_columns([control.reward] if control.reward else [])
        except ValueError as error:
            raise AlignError(f"reward {control.reward}: {error}") from error

    def of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row's constraint and the columns that are read, with SHA-256 of files; as JSON gives them back."""
        control = self._control
        try:
            constraint = spec_of(control, row)
        except ConstraintError:
            constraint = None
        names = row.keys() - {"prompt"} if self._asks_all else self._asked.keys() & row.keys()
        found = {
            "constraint": constraint,
            "constraint_sha256": self._digest(constraint) if constraint else None,
            "reward_sha256": self._digest(f"python:{control.reward}") if control.reward else None,
            "columns": {name: row[name] for name in sorted(names)},
        }
        return dict(json.loads(json.dumps(found, default=str)))


def spec_of(control: Control, row: Mapping[str, Any]) -> str | None:
    """The text of a row's constraint.

    Raises:
        ConstraintError: it should stand in a column, and does not.
    """
    spec, column = control.constraint, control.constraint_field
    if column is None:
        return spec
    own = row.get(column)
    if not isinstance(own, str) or not own:
        raise ConstraintError(f"column {column}: the row has {own!r}; write the constraint there as text")
    return own if spec is None else f"{spec}#{own}"


def check_columns(control: Control, source: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """The column of the constraints is one that rows have.

    Raises:
        ConfigError: no row has it.
    """
    wanted, columns = control.constraint_field, set[str]().union(*rows)
    if wanted is not None and columns and wanted not in columns:
        raise ConfigError(source, [(wanted, f"no row has this column; there are {', '.join(sorted(columns))}")])


def load_reward(name: str) -> Scorer:
    """A rule or a reward model that scores one answer alone.

    Raises:
        AlignError: there is none of the name, or it compares answers.
    """
    try:
        scorer = load_scorer(name)
    except (ValueError, OSError) as error:
        raise AlignError(f"reward {name}: {error}") from error
    if scorer.compares:
        raise AlignError(f"reward {name}: a preference model compares answers; name a reward that scores one alone")
    return scorer


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _digest(spec: str) -> str | None:
    """SHA-256 of the file that a constraint or a rule is in, if it is in one that can be read."""
    path = file_of(spec)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path else None
    except OSError:
        return None


def _number(value: float) -> float | None:
    """What JSON can say; None for the logarithm of 0."""
    return value if math.isfinite(value) else None
