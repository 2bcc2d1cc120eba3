"""Batches of tokenised pairs and of rated answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.losses.rows import Rows, answer_rows, pair_rows

from .logp_shards import row_key

PAIR, RATED = ("prompt_ids", "chosen_ids", "rejected_ids"), ("prompt_ids", "completion_ids", "ratings")


@dataclass(frozen=True)
class PairCollator:
    """Rows of a tokenised data set to the tensors of one forward pass.

    Args:
        pad_token_id: fills rows on the right.
        shared_prompt: the prompt once for both answers, or once for each (``align.losses.rows``).
        row_tokens: budget of a row that holds several pairs; None is a row a pair, or a row an answer.
    """

    pad_token_id: int
    shared_prompt: bool = True
    row_tokens: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """``prompt_ids, chosen_ids, rejected_ids`` and, where given, ``strength`` (1 otherwise) and ``preference``.

        A batch has ``preference`` where any of its rows has; the others count as sure, with 1. It has
        ``reference_logps`` (N,), in the order of ``target``, where any of its rows has ``reference_chosen`` and
        ``reference_rejected``; NaN stands for the others, and ``reference_keys`` (B, 32) are there if any is missing.
        """
        rows = pair_rows(
            [example["prompt_ids"] for example in examples],
            [example["chosen_ids"] for example in examples],
            [example["rejected_ids"] for example in examples],
            pad_token_id=self.pad_token_id,
            shared_prompt=self.shared_prompt,
            row_tokens=self.row_tokens,
        )
        # Strengths come first: the Trainer reads the size of a batch off its first tensor, and there are other rows.
        strength = torch.tensor([float(example.get("strength", 1.0)) for example in examples])
        batch = {"strength": strength, **rows.tensors()}
        labels = [example.get("preference") for example in examples]
        if any(label is not None for label in labels):
            batch["preference"] = torch.tensor([1.0 if label is None else float(label) for label in labels])
        if all("reference_chosen" in example for example in examples):
            batch |= _references(examples, rows)
        return batch


def _references(examples: Sequence[Mapping[str, Any]], rows: Rows) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = {}
    unknown = [example["reference_chosen"] is None for example in examples]
    if any(unknown):
        keys = [row_key(*(example[name] for name in PAIR)) for example in examples]
        batch["reference_keys"] = torch.tensor([list(key) for key in keys], dtype=torch.uint8)
    if not all(unknown):
        known = [
            [math.nan] * len(example[f"{side}_ids"]) if new else example[f"reference_{side}"]
            for side in ("chosen", "rejected")
            for example, new in zip(examples, unknown, strict=True)
        ]
        values = torch.cat([torch.tensor(logps, dtype=torch.float32) for logps in known])
        batch["reference_logps"] = torch.empty_like(values)
        batch["reference_logps"][rows.answer.argsort(stable=True)] = values
    return batch


def by_answer(answer: Tensor, values: Tensor) -> list[Tensor]:
    """(N,) values of tokens, answer by answer; ``answer``, (N,), as in ``Rows``."""
    return list(torch.split(values[answer.argsort(stable=True)], answer.bincount().tolist()))


def rows_of(batch: Mapping[str, torch.Tensor]) -> Rows:
    """The rows of a collated batch."""
    return Rows.of(batch, 2 * len(batch["strength"]))


@dataclass(frozen=True)
class RewardCollator:
    """Rows of a tokenised data set to the tensors of one forward pass.

    Args:
        pad_token_id: fills rows.
        shared_prompt: the prompt once for both answers, or once for each (``align.losses.rows``).
        row_tokens: budget of a row that holds several pairs, or several rated answers; None packs none.
    """

    pad_token_id: int
    shared_prompt: bool = False
    row_tokens: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pairs: all chosen answers, then all rejected ones, with the labels that any row has. Rated answers: as is.

        A pair without strength counts 1, one without preference is sure.
        """
        prompts, *answers = (
            [example[name] for example in examples] for name in (RATED[:2] if "ratings" in examples[0] else PAIR)
        )
        # Labels come first: the Trainer reads the size of a batch off its first tensor.
        if "ratings" in examples[0]:
            rated = answer_rows(prompts, *answers, pad_token_id=self.pad_token_id, row_tokens=self.row_tokens)
            ratings = torch.tensor([example["ratings"] for example in examples], dtype=torch.float32)
            return {"ratings": ratings, **rated.tensors()}
        rows = pair_rows(
            prompts,
            *answers,
            pad_token_id=self.pad_token_id,
            shared_prompt=self.shared_prompt,
            row_tokens=self.row_tokens,
        )
        strength = torch.tensor([float(example.get("strength", 1.0)) for example in examples])
        batch = {"strength": strength, **rows.tensors()}
        for name, missing in (("preference", 1.0), ("margin", 0.0)):
            values = [example.get(name) for example in examples]
            if any(value is not None for value in values):
                batch[name] = torch.tensor([missing if value is None else float(value) for value in values])
        return batch
