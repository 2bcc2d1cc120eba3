"""Batches of tokenised answers with thumbs, and KTO's mismatched answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from align.losses.rows import Rows, answer_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ThumbsCollator:
    """Rows of a tokenised data set to the tensors of one forward pass, or of two where there are mismatched answers.

    Args:
        pad_token_id: fills rows on the right.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """``prompt_ids, completion_ids, label`` and, where given, ``weight`` and ``KL_completion_ids``."""
        # Rows come first: the Trainer reads the size of a batch off its first tensor.
        batch = self._rows(examples, "completion_ids", "")
        batch["label"] = torch.tensor([bool(example["label"]) for example in examples])
        if "weight" in examples[0]:
            batch["weight"] = torch.tensor([float(example["weight"]) for example in examples])
        if "KL_completion_ids" in examples[0]:
            batch |= self._rows(examples, "KL_completion_ids", "KL_")
        return batch

    def _rows(self, examples: Sequence[Mapping[str, Any]], answers: str, prefix: str) -> dict[str, torch.Tensor]:
        rows = answer_rows(
            [example["prompt_ids"] for example in examples],
            [example[answers] for example in examples],
            pad_token_id=self.pad_token_id,
        )
        return {f"{prefix}{name}": value for name, value in rows.tensors().items()}


def rows_of(batch: Mapping[str, torch.Tensor], prefix: str = "") -> Rows:
    """The rows of a collated batch; with prefix ``KL_`` those of the mismatched answers."""
    tensors = {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}
    return Rows.of(tensors, len(batch["label"]))


def with_mismatched(dataset: Dataset, batch_size: int, max_length: int | None) -> Dataset:
    """A column ``KL_completion_ids``: within each batch, the answers rotated by one to the prompt of the next row.

    A last batch of one row takes the answer of the row before it, where TRL would give it its own. Answers are cut to
    what ``max_length`` leaves after the prompt.
    """
    prompts, answers = list(dataset["prompt_ids"]), list(dataset["completion_ids"])
    partners: list[int] = []
    for start in range(0, len(prompts), batch_size):
        block = range(start, min(start + batch_size, len(prompts)))
        partners += [block[-1], *block[:-1]] if len(block) > 1 else [max(start - 1, 0)]
    same = sum(prompts[row] == prompts[partner] for row, partner in enumerate(partners))
    if same:
        logger.warning(
            "in %d of %d rows the mismatched answer is one to the same prompt, since rows of that prompt share a "
            "batch: the KL is over-estimated there; shuffle the data set",
            same,
            len(partners),
        )
    room = [None if max_length is None else max_length - len(prompt) for prompt in prompts]
    column = [list(answers[partner])[: room[row]] for row, partner in enumerate(partners)]
    return dataset.add_column("KL_completion_ids", column)
