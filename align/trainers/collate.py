"""Batches of tokenised pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from align.losses.rows import Rows, pair_rows


@dataclass(frozen=True)
class PairCollator:
    """Rows of a tokenised data set to the tensors of one forward pass.

    Args:
        pad_token_id: fills rows on the right.
        shared_prompt: one row a pair, or one row an answer (``align.losses.rows``).
    """

    pad_token_id: int
    shared_prompt: bool = True

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """``prompt_ids, chosen_ids, rejected_ids`` and, where given, ``strength`` (1 otherwise) and ``preference``.

        A batch has ``preference`` where any of its rows has; the others count as sure, with 1.
        """
        rows = pair_rows(
            [example["prompt_ids"] for example in examples],
            [example["chosen_ids"] for example in examples],
            [example["rejected_ids"] for example in examples],
            pad_token_id=self.pad_token_id,
            shared_prompt=self.shared_prompt,
        )
        # Rows come first: the Trainer reads the size of a batch off its first tensor.
        batch = {
            "input_ids": rows.input_ids,
            "position_ids": rows.position_ids,
            "segments": rows.segments,
            "source": rows.source,
            "target": rows.target,
            "answer": rows.answer,
            "strength": torch.tensor([float(example.get("strength", 1.0)) for example in examples]),
        }
        labels = [example.get("preference") for example in examples]
        if any(label is not None for label in labels):
            batch["preference"] = torch.tensor([1.0 if label is None else float(label) for label in labels])
        return batch


def rows_of(batch: Mapping[str, torch.Tensor]) -> Rows:
    """The rows of a collated batch."""
    return Rows(
        batch["input_ids"],
        batch["position_ids"],
        batch["segments"],
        batch["source"],
        batch["target"],
        batch["answer"],
        answers=2 * len(batch["strength"]),
    )
