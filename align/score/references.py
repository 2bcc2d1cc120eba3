"""Reference columns: a quantile of the rewards of the model's own answers to each prompt (arXiv:2402.00742).

``LogSigmoidCentered`` centres a reward on such a column. The model is the policy before training: its answers to a
prompt are drawn at temperature 1, scored by each reward that is asked for, and their quantile is the column.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from align.data.fields import FieldError
from align.data.rows import Content, row_id
from align.data.tokenize import encode_prompt
from align.errors import AlignError
from align.evals.sampling import sample
from align.models.ends import end_tokens
from align.rewards.references import quantile_reference

from .rows import ScoreRow
from .scorers import AnswerScorer, Columns, Policy, Scored


@dataclass(frozen=True)
class Draws:
    """How reference answers are drawn, and which quantile of their rewards is taken.

    Args:
        quantile: in (0, 1).
        samples: answers a prompt, two or more; 16 to 64 are usual, and few make the quantile uncertain.
        max_new_tokens: longest answer; one that is cut counts as it is.
        seed: of the draws.
    """

    quantile: float
    samples: int
    max_new_tokens: int
    seed: int


class ReferenceScorer:
    """``NAME_reference`` for every reward; a prompt that comes again gets the same.

    The answers to one prompt are batches of their own, so that they depend on the prompt, the model and the seed, to
    the bit, and on nothing else. Empty answers are left out: not every reward can judge them.
    """

    def __init__(self, scorers: Sequence[AnswerScorer], policy: Policy, draws: Draws) -> None:
        self.name = "reference"
        self.scorers = scorers
        self.policy = policy
        self.draws = draws
        self.eos_ids = end_tokens(policy.loaded.model, policy.loaded.tokenizer)
        self.identity = {"references": policy.identity, **vars(draws), "of": [scorer.name for scorer in scorers]}
        self._known: dict[str, Columns] = {}

    def score(self, rows: Sequence[ScoreRow]) -> Scored:
        for row in rows:
            key = row_id(row.prompt)
            if key not in self._known:
                self._known[key] = self._reference(row)
        return Scored([self._known[row_id(row.prompt)] for row in rows])

    def _reference(self, row: ScoreRow) -> Columns:
        answers = self._answers(row)
        drawn = ScoreRow(row.row_id, row.prompt, {"completions": answers}, frozenset())
        columns: Columns = {}
        for scorer in self.scorers:
            rewards = torch.tensor(scorer.rewards(drawn), dtype=torch.float64)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one answer that is not empty: counted as it is
                found = quantile_reference([rewards], quantile=self.draws.quantile)
            columns[f"{scorer.name}_reference"] = float(found)
        return columns

    def _answers(self, row: ScoreRow) -> list[Content]:
        try:
            ids = encode_prompt(row.prompt, self.policy.loaded.tokenizer)
        except AlignError as error:
            raise FieldError("prompt", str(error).removeprefix("prompt: ")) from error
        limit = self.policy.max_length
        if limit is not None and len(ids) + self.draws.max_new_tokens > limit:
            raise FieldError(
                "prompt",
                f"{len(ids):,} tokens and a reference answer of {self.draws.max_new_tokens:,} are more than "
                f"--max-length {limit:,}",
            )
        drawn = sample(
            self.policy.loaded.model,
            self.policy.loaded.tokenizer,
            [ids] * self.draws.samples,
            eos_ids=self.eos_ids,
            max_new_tokens=self.draws.max_new_tokens,
            temperature=1.0,
            seed=self.draws.seed,
            batch_size=self.policy.batch_size,
        )
        texts = [answer.text for answer in drawn if answer.text.strip()]
        if not texts:
            raise FieldError("prompt", f"all {len(drawn)} reference answers are empty")
        return [text if isinstance(row.prompt, str) else [_assistant(text)] for text in texts]


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
