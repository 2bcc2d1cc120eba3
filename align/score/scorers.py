"""What makes columns: a rule, a reward model, or (``policy``) the model that is to be trained.

A further one is a class with ``name``, ``identity`` and ``score`` (see ``Scorer``). ``score`` is given rows of like
length, as many as one forward pass takes, and raises for a row that it cannot score: the pass then finds out which one
it was, and sets that one aside.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from align.config.explain import nearest
from align.data.fields import FieldError
from align.errors import AlignError, ConfigError
from align.models.fingerprint import weights_hash
from align.models.hardware import resolve_dtype
from align.models.load import LOAD_ERRORS, LoadedModel, load_run
from align.rewards import named
from align.rewards.encoding import encode_answers
from align.rewards.named import load_reward
from align.rewards.pal_model import ChoiceError, load_reward_model
from align.rewards.scorers import ModelReward, RewardError, RuleReward

from .rows import LISTED, ScoreRow

Columns = dict[str, Any]


class Scored(NamedTuple):
    """Columns of rows.

    Args:
        columns: one mapping a row, from names to what JSON holds.
        cut: answers that were too long, of which the beginning was scored.
        moved: rows whose prompt ends in other tokens when an answer follows.
        left_out: answers drawn for references that have no reward.
        refused: rows that are to be set aside, by place, and why.
    """

    columns: list[Columns]
    cut: int = 0
    moved: int = 0
    left_out: int = 0
    refused: Mapping[int, FieldError] = MappingProxyType({})


class Scorer(Protocol):
    """What makes columns.

    Attributes:
        name: of its column; further ones begin with it.
        identity: what decides its values, weights and code included, fit for JSON: a run goes on only where this is
            the same.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def score(self, rows: Sequence[ScoreRow]) -> Scored:
        """Columns of some rows; the values of a row do not depend on the others, but for rounding.

        Raises:
            ValueError: a row cannot be scored; of one row alone, the reason.
        """


class AnswerScorer(Scorer, Protocol):
    """A scorer that gives one number to every answer, so that other answers to a prompt can be its reference."""

    @property
    def reward(self) -> RuleReward | ModelReward: ...


class RuleScorer:
    """A function ``(prompts, completions) -> list of numbers``, as ``align.rewards.scorers`` calls it."""

    def __init__(self, name: str, spec: str) -> None:
        try:
            self.reward = RuleReward(load_reward(spec))
        except ValueError as error:
            raise ConfigError("align score", [("--with", str(error))]) from error
        self.name = name
        self.identity = {"rule": spec, "code": code_hash(self.reward.rule)}

    def score(self, rows: Sequence[ScoreRow]) -> Scored:
        own = [row for row in rows for _ in row.each]
        answers = [answer for row in rows for answer in row.each]
        columns = {name: [row.fields[name] for row in own] for name in self._asked(rows)}
        try:
            values = self.reward([row.prompt for row in own], answers, columns)
        except RewardError as error:
            called = [name for row in rows for name in _answer_names(row)]
            where = f"{called[error.row]}: " if error.row is not None and len(called) > 1 else ""
            raise FieldError(self.name, f"{where}{error.problem}") from error
        return Scored(by_answer(rows, {self.name: values}))

    def _asked(self, rows: Sequence[ScoreRow]) -> list[str]:
        """Columns that the rule reads."""
        asked = {name for row in rows for name in row.fields if self.reward.asks(name)}
        if any(name not in row.fields for row in rows for name in asked):
            raise FieldError(
                self.name, f"rows that have {', '.join(sorted(asked))} and rows that do not"
            )  # one by one
        return sorted(asked)


def _answer_names(row: ScoreRow) -> list[str]:
    """What each answer of the row is called."""
    return [
        f"{field} {number}" if field == LISTED else field
        for field, several in row.answers.items()
        for number, _ in enumerate(several, start=1)
    ]


def code_hash(rule: Callable[..., Any]) -> str | None:
    """Hash of the file that the function stands in; None where there is no such file."""
    try:
        source = inspect.getsourcefile(rule)
        return hashlib.sha256(Path(str(source)).read_bytes()).hexdigest()
    except (TypeError, OSError):
        return None


class ModelScorer:
    """A reward model: one column, and one an attribute where it has attributes.

    A gpm compares: a pair gets the log-odds that chosen is preferred to rejected, and each of several answers the mean
    of its log-odds against the others. A PAL model has a reward an annotator: ``FOLDER@WHO`` says whose
    (``PalRewardModel.choose``).
    """

    def __init__(self, name: str, folder: str, *, dtype: str, batch_size: int, device: Any) -> None:
        torch_dtype, _ = resolve_dtype(dtype)
        try:
            self.model = load_reward_model(folder, dtype=torch_dtype).to(device)
        except ChoiceError as error:
            raise AlignError(f"--with {folder}: {error}") from error
        except LOAD_ERRORS as error:
            known = ", ".join(OF_THE_MODEL)
            reason = (
                f"no rule (module:function), none of {known}, and no reward model: {str(error).partition(chr(10))[0]}"
            )
            raise AlignError(f"--with {folder}: {reason}") from error
        self.name = name
        self.batch_size = batch_size
        self.reward = ModelReward(self.model, batch_size)
        weights = weights_hash(self.model.state_dict().items())
        self.identity = {"reward_model": folder, "dtype": str(torch_dtype), "weights": weights}

    def score(self, rows: Sequence[ScoreRow]) -> Scored:
        prompts, answers, cut = self._encoded(rows)
        config = self.model.config
        if config.kind == "gpm":
            return Scored(self._compared(rows), cut)
        values = self.model.score_ids(prompts, answers, batch_size=self.batch_size)
        made = {self.name: self.model.ranking(values).tolist()}
        if config.kind == "attributes":
            columns = values.T.tolist()
            made |= {f"{self.name}_{key}": column for key, column in zip(config.attributes, columns, strict=True)}
        return Scored(by_answer(rows, made), cut)

    def _encoded(self, rows: Sequence[ScoreRow]) -> tuple[list[list[int]], list[list[int]], int]:
        """Ids of the prompt and of the answer, for every answer, and how many are too long."""
        prompts, answers = [], []
        limit = self.model.config.max_length
        for row in rows:
            if not row.each:
                continue
            prompt, several = encode_answers(self.model.tokenizer, row.prompt, row.each)
            prompts += [prompt] * len(several)
            answers += several
        cut = sum(limit is not None and len(p) + len(a) > limit for p, a in zip(prompts, answers, strict=True))
        return prompts, answers, cut

    def _compared(self, rows: Sequence[ScoreRow]) -> list[Columns]:
        for row in rows:
            if len(row.each) == 1:
                raise FieldError(self.name, "a gpm compares answers to a prompt, and this row has one")
        several = [row for row in rows if row.each]
        matrices = iter(
            self.model.score_groups(
                [row.prompt for row in several], [row.each for row in several], batch_size=self.batch_size
            )
        )
        columns: list[Columns] = []
        for row in rows:
            if not row.each:
                columns.append({})
            elif LISTED in row.answers:
                against = next(matrices).sum(1) / (len(row.each) - 1)
                columns.append({f"{self.name}_{LISTED}": against.tolist()})
            else:
                columns.append({self.name: float(next(matrices)[0, 1])})
        return columns


@dataclass(frozen=True)
class Policy:
    """The model of ``--model``, and how it is to be used.

    Args:
        spec: its name.
        loaded: the model and its tokenizer.
        max_length: limit of prompt and answer, tokens; None is the model's own.
        batch_size: rows of one forward pass.
    """

    spec: str
    loaded: LoadedModel
    max_length: int | None
    batch_size: int

    @classmethod
    def load(cls, spec: str, *, dtype: str, max_length: int | None, batch_size: int, device: Any) -> Policy:
        """Load it.

        Raises:
            AlignError: it cannot be found or loaded.
        """
        loaded = load_run(spec, dtype=dtype)
        loaded.model.to(device)
        return cls.of(spec, loaded, max_length, batch_size)

    @classmethod
    def of(cls, spec: str, loaded: LoadedModel, max_length: int | None, batch_size: int) -> Policy:
        """A model that is loaded, with its own limit where none is given.

        Raises:
            AlignError: it is no causal model of transformers.
        """
        config = getattr(loaded.model, "config", None)
        generates = getattr(loaded.model, "generation_config", None) is not None
        if config is None or config.is_encoder_decoder or not generates:
            raise AlignError(f"{spec}: a {type(loaded.model).__name__} is no causal model of transformers")
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        return cls(spec, loaded, max_length or limit, batch_size)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its log-probs."""
        model = self.loaded.model
        weights = weights_hash(model.state_dict().items())
        return {"model": self.spec, "dtype": str(model.dtype), "weights": weights, "max_length": self.max_length}


OF_THE_MODEL = {
    "logps": "each answer's log-prob, nats, and its tokens",
    "ches": "CHES of a pair: the higher, the more its chosen answer will fall",
    "ches_ln": "CHES, length-normalised: what to filter by",
    "last_inner": "inner product of the answers' last hidden states",
    "edit": "minus the normalised edit distance of the answers' tokens",
}
"""Words of ``--with`` that stand for what the model of ``--model`` says; ``policy.PolicyScorer`` makes the columns."""


def by_answer(rows: Sequence[ScoreRow], values: Mapping[str, Sequence[float | None]]) -> list[Columns]:
    """Columns ``NAME_FIELD`` from values of all answers of all rows, in the order of ``ScoreRow.each``."""
    found: list[Columns] = [{} for _ in rows]
    for name, several_values in values.items():
        rest = iter(several_values)
        for row, columns in zip(rows, found, strict=True):
            for field, several in row.answers.items():
                taken = [next(rest) for _ in several]
                columns[f"{name}_{field}"] = taken if field == LISTED else taken[0]
    return found


def named_specs(specs: Sequence[str]) -> dict[str, str]:
    """Column name to spec, of ``SPEC`` or ``NAME=SPEC``.

    The name of a rule is its function's, of a reward model its folder's (its run's, for ``RUN/model``), and for
    ``FOLDER@WHO`` who it is.

    Raises:
        ConfigError: no spec, a word that is misspelt, a name twice, or a name that is none.
    """
    found: dict[str, str] = {}
    what = f"name what is to be added: module:function, a reward model, {', '.join(OF_THE_MODEL)}"
    problems = [] if specs else [("--with", what)]
    for given in specs:
        name, equals, spec = given.partition("=")
        if not equals:
            name, spec = given if given in OF_THE_MODEL else named.reward_name(given), given
        if not name.replace("-", "_").isidentifier() or not spec:
            what = f"is no name for a column; write NAME={spec or 'SPEC'}, of letters, digits and _"
            problems.append(("--with", f"{given!r}: {name!r} {what}"))
        elif spec not in OF_THE_MODEL and not Path(spec).exists() and (near := nearest(spec.lower(), OF_THE_MODEL)):
            problems.append(("--with", f"{given!r}: did you mean {near}?"))
        elif name in found:
            problems.append(("--with", f"{given!r}: there is a column {name} already; write NAME={spec}"))
        found[name] = spec
    if problems:
        raise ConfigError("align score", problems)
    return found


def reward_folder(spec: str) -> str | None:
    """``align.rewards.named.reward_folder``.

    Raises:
        AlignError: a folder that holds no reward model.
    """
    try:
        return named.reward_folder(spec)
    except ValueError as error:
        raise AlignError(f"--with {error}") from error
