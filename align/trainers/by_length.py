"""Batches of rows of near lengths: ``train_sampling_strategy: group_by_length``, for rows of ours.

transformers' own sampler of that name knows the length of ``input_ids`` alone, draws from the global generator, and
begins a batch anew at the end of each of its pools. This one gives every row once an epoch, in an order that depends
on the seed and the epoch, so that a run that was resumed within an epoch sees the rest of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.losses.layouts import Layout

STRATEGY = "group_by_length"
POOL = 50  # batches of like lengths are cut from as many rows as these hold: other rows meet in each epoch


def order(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[int]:
    """Every row once, in batches of ``batch`` rows of near lengths; the first of them holds the longest row.

    Rows are drawn into pools of ``POOL`` batches, sorted within each and cut; the batches are drawn again. What is
    left over, less than a batch, comes last.

    Args:
        lengths: of the rows, as they are laid out.
        batch: rows of one step of all processes.
    """
    draw = np.random.default_rng([seed, epoch])
    size = np.asarray(lengths)
    drawn = draw.permutation(len(size))
    pools = np.split(drawn, np.arange(POOL * batch, len(size) - batch, POOL * batch)) if len(size) else []
    ordered = np.concatenate([pool[np.argsort(-size[pool], kind="stable")] for pool in pools] or [drawn])
    whole = len(ordered) - len(ordered) % batch
    batches = draw.permutation(ordered[:whole].reshape(-1, batch))
    if len(batches):
        longest = int(size[batches].max(axis=1).argmax())
        batches[[0, longest]] = batches[[longest, 0]]
    found: list[int] = np.concatenate([batches.ravel(), ordered[whole:]]).tolist()
    return found


class ByLength(Sampler[int]):
    """``order`` of one epoch after the other, as a sampler.

    Args:
        lengths, batch, seed: as in ``order``.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed = lengths, batch, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(order(self.lengths, self.batch, self.seed, self.epoch))


class EpochOfSampler(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler which epoch begins: accelerate's loader does not, once it skips what a run has seen."""

    def __init__(self) -> None:
        self.sampler: ByLength | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, train_dataloader: Any, **_: Any
    ) -> None:
        """Counted by steps, as the Trainer counts when it resumes."""
        if self.sampler is not None:
            steps = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
            self.sampler.set_epoch(state.global_step // steps)


class LengthGrouped(Trainer):  # type: ignore[misc]
    """Goes before TRL's trainer in the bases of a trainer of ours: its sampler of like lengths is ``ByLength``."""

    layout: Layout  # of ``Hosted``
    _epoch_of_sampler: EpochOfSampler | None = None

    def _row_lengths(self, dataset: Dataset) -> Sequence[int]:
        """Tokens of each row as it is laid out: where each answer has a row of its own, the longest of them."""
        answers = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in dataset.column_names]
        if self.layout["shared_prompt"]:
            return list(tokens_of(dataset, "prompt_ids", *answers).tolist())
        longest = np.max([tokens_of(dataset, name) for name in answers], axis=0)
        return list((tokens_of(dataset, "prompt_ids") + longest).tolist())

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != STRATEGY:
            return super()._get_train_sampler(dataset)
        if self._epoch_of_sampler is None:
            self._epoch_of_sampler = EpochOfSampler()
            self.add_callback(self._epoch_of_sampler)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch = self.args.train_batch_size * max(1, self.args.world_size)
        self._epoch_of_sampler.sampler = ByLength(self._row_lengths(dataset), batch, seed)
        return self._epoch_of_sampler.sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.train_sampling_strategy != STRATEGY:
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


def tokens_of(dataset: Dataset, *columns: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How many tokens each row has in columns of token ids together."""
    arrow = dataset.with_format("arrow")
    counts = [pc.list_value_length(arrow[column][:]).to_numpy(zero_copy_only=False) for column in columns]
    total: np.ndarray[Any, np.dtype[np.int64]] = np.sum(counts, axis=0, dtype=np.int64)
    return total
