"""Reference rewards of prompts by a language model: of its own answers, and predicted from how it sees the prompt.

``align score`` and GRPO both take them from here: the same model, seed and settings give the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.data.prompts import PromptRow, read_prompts
from align.data.rows import Content
from align.data.tokenize import encode_prompt
from align.errors import AlignError
from align.evals.sampling import sample
from align.models.ends import end_tokens
from align.rewards.encoding import as_answer
from align.rewards.references import PromptReference
from align.rewards.scorers import NO_COLUMNS, Scorer

from .matching import hidden_state_encoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draws:
    """How a model's own answers to a prompt are drawn, at temperature 1.

    Args:
        samples: answers a prompt, two or more; 16 to 64 are usual, and few make a quantile uncertain.
        max_new_tokens: longest answer; one that is cut counts as it is.
        seed: of the draws.
        batch_size: answers in one forward pass.
    """

    samples: int
    max_new_tokens: int
    seed: int
    batch_size: int = 16


def drawn_rewards(
    prompt: Content,
    scorers: Mapping[str, Scorer],
    model: Any,
    tokenizer: Any,
    draws: Draws,
    columns: Mapping[str, Any] = NO_COLUMNS,
) -> dict[str, list[float | None]]:
    """Rewards, by name, of the model's own answers to a prompt.

    The answers to one prompt are batches of their own, so that they depend on the prompt, the model and the draws, and
    on nothing else. An empty answer counts like any other: it is one that the model gives.

    Args:
        scorers: by name; none of them compares answers.
        columns: of the prompt's row, one value each, for rules that ask for them.

    Raises:
        AlignError: the prompt cannot be tokenised. ValueError: an answer that cannot be scored.
    """
    count = draws.samples
    drawn = sample(
        model,
        tokenizer,
        [encode_prompt(prompt, tokenizer)] * count,
        eos_ids=end_tokens(model, tokenizer),
        max_new_tokens=draws.max_new_tokens,
        temperature=1.0,
        seed=draws.seed,
        batch_size=draws.batch_size,
    )
    answers = [as_answer(prompt, answer.text) for answer in drawn]
    repeated = {name: [value] * count for name, value in columns.items()}
    return {name: scorer([prompt] * count, answers, repeated) for name, scorer in scorers.items()}


def prompt_embeddings(prompts: Sequence[Content], model: Any, tokenizer: Any) -> Tensor:
    """Mean of the model's last hidden states over each prompt's tokens, (P, D)."""
    return hidden_state_encoder(model, tokenizer.pad_token_id)(
        [encode_prompt(prompt, tokenizer) for prompt in prompts]
    )


def fitted_reference(source: str, column: str, model: Any, tokenizer: Any) -> PromptReference:
    """The regression of ``column`` on the prompts of ``source``, as the model sees them.

    Raises:
        AlignError: the data cannot be read, or fewer than three prompts have the column.
    """
    table = read_prompts(source, [column])
    rows = [row for row in table.rows if isinstance(row, PromptRow)]
    without = table.counts["set_aside"]
    if without:
        logger.warning("%s: %d of %d rows have no %s and are left out", source, without, table.counts["rows"], column)
    if not rows:
        raise AlignError(
            f"{source}: no row has a prompt and {column}, which the regression is fitted to: align score "
            f"--reference-quantile writes it; the first row: {table.faults[0].field}: {table.faults[0].reason}"
        )
    embeddings = prompt_embeddings([row.prompt for row in rows], model, tokenizer)
    try:
        found = PromptReference.fit(
            embeddings, torch.tensor([row.references[column] for row in rows], dtype=torch.float64)
        )
    except ValueError as error:
        raise AlignError(f"{source}: {column}: {error}") from error
    if found.explained < 0.05:
        logger.warning(
            "%s: a regression on %d prompts predicts %s hardly better than its mean (%.2f of the variance, of prompts "
            "left out one by one): score more prompts, or draw more samples of each",
            source,
            found.prompts,
            column,
            found.explained,
        )
    return found
