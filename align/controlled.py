"""Answers under a constraint or a reward: ``align generate --constraint``, on a prompt or on rows of data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from align.data.rows import Content
from align.decoding.constraints import Constraint, ConstraintError, Memo, Vocabulary, file_of, parse
from align.decoding.engines import TransformersEngine
from align.decoding.generate import generate
from align.decoding.law import Law
from align.decoding.request import Answer, Method, Potential, Request
from align.errors import AlignError
from align.rewards.encoding import as_answer
from align.rewards.scorers import Scorer, asked_columns, load_scorer

if TYPE_CHECKING:
    from align.generate import Answerer


@dataclass(frozen=True)
class Control:
    """What answers must be, and how they are drawn.

    Args:
        constraint: as ``align.decoding.constraints.parse`` reads it; None for any text.
        constraint_field: column with each row's own constraint; with a constraint ``sql:FILE``, the name of the
            row's schema in that file.
        constraint_timeout: seconds for one call of a Python predicate.
        method: see ``align.decoding.request.Request``.
        particles: sequences a prompt.
        top_k, top_p: what the law is cut to, see ``align.decoding.law.Law``.
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
    take: Literal["drawn", "best"] = "drawn"
    reward: str | None = None
    reward_strength: float = 1.0
    reward_every: int = 0


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
        model = answerer.model
        try:
            self.law = Law(answerer.settings.temperature, control.top_k, control.top_p)
            self.engine = TransformersEngine(model)
            columns = model.get_output_embeddings().weight.shape[0]
            self.vocabulary = Vocabulary.of(answerer.tokenizer, size=columns, ends=answerer.eos_ids)
        except ValueError as error:
            raise AlignError(f"{answerer.settings.model}: {error}") from error
        self._constraints: dict[str, Constraint | ConstraintError] = {}
        self.scorer = _load_reward(control.reward) if control.reward else None
        if control.constraint and control.constraint_field is None:
            found = self._parsed(control.constraint)
            if isinstance(found, ConstraintError):
                raise AlignError(str(found)) from found

    def answer(
        self,
        encoded: Mapping[int, Sequence[int]],
        rows: Mapping[int, Mapping[str, Any]],
        write: Callable[[Mapping[int, dict[str, Any]]], None],
    ) -> None:
        """Answer rows of data; ``write`` is called with each as soon as it is there.

        Args:
            encoded: token ids of the prompts, by number of the row.
            rows: the rows, with their columns.
            write: takes the columns that a row gains. Where a row fails, they say why.
        """
        numbers, requests = list[int](), list[Request]()
        for number, ids in encoded.items():
            try:
                requests.append(self._request(number, ids, rows[number]))
                numbers.append(number)
            except ConstraintError as error:
                write({number: self._columns(Answer(None, (), False, str(error)))})
        generate(
            self.engine,
            requests,
            self.vocabulary,
            on_answer=lambda place, answer: write({numbers[place]: self._columns(answer)}),
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
            potential=self._potential(row) if self.scorer is not None else None,
            potential_every=control.reward_every,
        )

    def _constraint(self, row: Mapping[str, Any]) -> Constraint | None:
        spec = spec_of(self.control, row)
        if spec is None:
            return None
        found = self._parsed(spec)
        if isinstance(found, ConstraintError):
            raise found
        return found

    def _parsed(self, spec: str) -> Constraint | ConstraintError:
        """The constraint of a text, made once, with a memo that all its rows share."""
        if spec not in self._constraints:
            try:
                made = parse(spec, self.vocabulary, timeout=self.control.constraint_timeout)
                self._constraints[spec] = Memo(made)
            except ConstraintError as error:
                self._constraints[spec] = error
        return self._constraints[spec]

    def _potential(self, row: Mapping[str, Any]) -> Potential:
        prompt: Content = row["prompt"]
        others = {name: value for name, value in row.items() if name != "prompt"}

        def potential(sequences: Sequence[tuple[int, ...]]) -> list[float]:
            assert self.scorer is not None
            answers = [as_answer(prompt, self.vocabulary.text(tokens)) for tokens in sequences]
            columns = {name: [value] * len(answers) for name, value in others.items()}
            try:
                scores = self.scorer([prompt] * len(answers), answers, columns)
            except ValueError as error:
                raise ConstraintError(f"reward {self.control.reward}: {error}") from error
            return [self.control.reward_strength * (score or 0.0) for score in scores]

        return potential

    def _columns(self, answer: Answer) -> dict[str, Any]:
        result = answer.result
        taken = None if result is None else result.best if self.control.take == "best" else result.drawn
        weighted = self.control.method != "rejection"
        return {
            "completion": self.vocabulary.text(taken.tokens) if taken is not None else None,
            "tokens": len(taken.tokens) if taken is not None else 0,
            "finished": taken is not None and taken.tokens[-1] in self.vocabulary.ends,
            "valid": answer.valid,
            "reason": answer.reason,
            "log_normaliser": _number(result.log_normaliser) if result is not None and weighted else None,
            "ess": result.ess if result is not None else None,
            "calls_per_token": float(np.mean(answer.evaluations)) if answer.evaluations else None,
            "dead_ends": result.dead_ends if result is not None else None,
            "resamplings": result.resamplings if result is not None else None,
            "samples": [
                {"completion": self.vocabulary.text(sample.tokens), "log_weight": _number(sample.log_weight)}
                for sample in (result.samples if result is not None else ())
            ],
        }


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


def _digest(spec: str) -> str | None:
    """SHA-256 of the file that a constraint or a rule is in, if it is in one that can be read."""
    path = file_of(spec)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path else None
    except OSError:
        return None


def _load_reward(name: str) -> Scorer:
    try:
        scorer = load_scorer(name)
    except (ValueError, OSError) as error:
        raise AlignError(f"reward {name}: {error}") from error
    if scorer.compares:
        raise AlignError(f"reward {name}: a preference model compares answers; name a reward that scores one alone")
    return scorer


def _number(value: float) -> float | None:
    """What JSON can say; None for the logarithm of 0."""
    return value if math.isfinite(value) else None
