"""Reference columns: what an answer to each prompt has to beat (arXiv:2402.00742).

``LogSigmoidCentered`` centres a reward on such a column. The model is the policy before training. GRPO's references
are the same numbers (``align.trainers.references``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from align.data.fields import FieldError
from align.data.rows import row_id
from align.data.tokenize import encode_prompt
from align.errors import AlignError
from align.rewards.encoding import as_answer
from align.rewards.references import sampled_reference
from align.rewards.scorers import RewardError
from align.trainers.references import Draws, drawn_rewards, fitted_reference, prompt_embeddings

from .rows import ScoreRow
from .scorers import AnswerScorer, Columns, Policy, Scored


class SampledReferences:
    """``NAME_reference`` for every reward: a quantile of the rewards of the model's own answers to the prompt.

    A prompt that comes again gets the same.
    """

    def __init__(self, scorers: Sequence[AnswerScorer], policy: Policy, quantile: float, draws: Draws) -> None:
        self.name = "reference"
        self.scorers = scorers
        self.policy = policy
        self.quantile = quantile
        self.draws = draws
        self.identity = {
            "references": policy.identity,
            "quantile": quantile,
            **asdict(draws),
            "of": [scorer.name for scorer in scorers],
        }
        self._known: dict[str, tuple[Columns, int]] = {}

    def score(self, rows: Sequence[ScoreRow]) -> Scored:
        found = [self._reference(row) for row in rows]
        for row, (columns, _) in zip(rows, found, strict=True):
            lack = f"none of the {self.draws.samples} reference answers has a reward: sample more (--samples)"
            _check_judged(row, self.scorers, columns, lack)
        return Scored([columns for columns, _ in found], left_out=sum(without for _, without in found))

    def _reference(self, row: ScoreRow) -> tuple[Columns, int]:
        asked = {name: row.fields[name] for one in self.scorers for name in row.fields if one.reward.asks(name)}
        key = row_id(row.prompt) + repr(sorted(asked.items()))
        if key not in self._known:
            self._check_length(row)
            named = {scorer.name: scorer.reward for scorer in self.scorers}
            loaded = self.policy.loaded
            try:
                rewards = drawn_rewards(row.prompt, named, loaded.model, loaded.tokenizer, self.draws, asked)
                made = {f"{name}_reference": sampled_reference(own, self.quantile) for name, own in rewards.items()}
            except ValueError as error:
                raise FieldError("prompt", f"reference answers: {error}") from error
            self._known[key] = made, sum(one is None for own in rewards.values() for one in own)
        return self._known[key]

    def _check_length(self, row: ScoreRow) -> None:
        try:
            length = len(encode_prompt(row.prompt, self.policy.loaded.tokenizer))
        except AlignError as error:
            raise FieldError("prompt", str(error).removeprefix("prompt: ")) from error
        limit = self.policy.max_length
        if limit is not None and length + self.draws.max_new_tokens > limit:
            raise FieldError(
                "prompt",
                f"{length:,} tokens and a reference answer of {self.draws.max_new_tokens:,} are more than "
                f"--max-length {limit:,}",
            )


def _check_judged(row: ScoreRow, scorers: Sequence[AnswerScorer], references: Columns, lack: str) -> None:
    """Raise a FieldError where an answer of the row has a reward, and the prompt no reference to judge it by.

    Where the row's answers have none either, the rule does not apply to it.
    """
    for scorer in scorers:
        if references[f"{scorer.name}_reference"] is None:
            (columns,) = scorer.score([row]).columns
            values = [one for own in columns.values() for one in (own if isinstance(own, list) else [own])]
            if any(value is not None for value in values):
                raise FieldError(f"{scorer.name}_reference", f"an answer of the row has a reward, and {lack}")


class CannedReferences:
    """``NAME_reference`` for every reward: that of one and the same answer to each prompt, such as a refusal."""

    def __init__(self, scorers: Sequence[AnswerScorer], answer: str) -> None:
        self.name = "reference"
        self.scorers = scorers
        self.answer = answer
        self.identity = {"canned": answer, "of": [scorer.name for scorer in scorers]}

    def score(self, rows: Sequence[ScoreRow]) -> Scored:
        return Scored([self._reference(row) for row in rows])

    def _reference(self, row: ScoreRow) -> Columns:
        found: Columns = {}
        for scorer in self.scorers:
            own = {name: [value] for name, value in row.fields.items() if scorer.reward.asks(name)}
            try:
                (found[f"{scorer.name}_reference"],) = scorer.reward(
                    [row.prompt], [as_answer(row.prompt, self.answer)], own
                )
            except ValueError as error:
                problem = error.problem if isinstance(error, RewardError) else str(error).removeprefix("row 0: ")
                raise FieldError(scorer.name, f"the canned answer: {problem}") from error
        _check_judged(row, self.scorers, found, "the canned answer has none: name another (--reference-canned)")
        return found


class PredictedReferences:
    """``NAME_reference`` for every reward, by a regression on the prompts of a data set that has this column."""

    def __init__(self, scorers: Sequence[AnswerScorer], policy: Policy, source: str) -> None:
        self.name = "reference"
        self.policy = policy
        loaded = policy.loaded
        self.fitted = {
            column: fitted_reference(source, column, loaded.model, loaded.tokenizer)
            for column in (f"{scorer.name}_reference" for scorer in scorers)
        }
        fits = {column: [one.prompts, one.intercept, one.explained] for column, one in self.fitted.items()}
        self.identity: Mapping[str, Any] = {"references": policy.identity, "regression": source, "fitted": fits}

    def score(self, rows: Sequence[ScoreRow]) -> Scored:
        try:
            embeddings = prompt_embeddings(
                [row.prompt for row in rows], self.policy.loaded.model, self.policy.loaded.tokenizer
            )
        except AlignError as error:
            raise FieldError("prompt", str(error).removeprefix("prompt: ")) from error
        predicted = {column: one.predict(embeddings).tolist() for column, one in self.fitted.items()}
        return Scored([{column: values[row] for column, values in predicted.items()} for row in range(len(rows))])
