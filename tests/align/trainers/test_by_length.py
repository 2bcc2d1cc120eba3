"""Batches of near lengths: every row once an epoch, the longest first, the same after a resume, apart in processes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, KTOConfig, RewardConfig

from align.losses.layouts import SEPARATE
from align.rewards.models import RewardModel
from align.trainers.by_length import POOL, order
from align.trainers.pair import PairTrainer
from align.trainers.reward import RewardTrainer
from align.trainers.thumbs import ThumbsTrainer


def cells(lengths: list[int], found: list[int], batch: int) -> int:
    """Positions of all batches, each as wide as its longest row."""
    batches = [found[start : start + batch] for start in range(0, len(found), batch)]
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)


@given(st.lists(st.integers(1, 40), max_size=200), st.integers(1, 5), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_every_row_once_and_the_longest_in_the_first_batch(lengths, batch, seed, epoch):
    found = order(lengths, batch, seed, epoch)
    assert sorted(found) == list(range(len(lengths)))
    assert found == order(lengths, batch, seed, epoch)
    if len(lengths) >= batch:
        assert max(lengths) in [lengths[row] for row in found[:batch]]


def test_little_is_padding_and_no_epoch_is_like_another():
    """1,003 rows of 1 to 300 tokens, batches of 8: under 3 % of the cells are empty, at random it is over 40 %."""
    draw = random.Random(0)
    lengths = [draw.randint(1, 300) for _ in range(1003)]
    shuffled = draw.sample(range(1003), 1003)
    ours = [order(lengths, 8, seed=7, epoch=epoch) for epoch in range(2)]
    for found in ours:
        assert 1 - sum(lengths) / cells(lengths, found, 8) < 0.03
    assert 1 - sum(lengths) / cells(lengths, shuffled, 8) > 0.4
    batches = [{frozenset(found[start : start + 8]) for start in range(0, 1003, 8)} for found in ours]
    assert len(batches[0] & batches[1]) < 5
    assert ours[0] != order(lengths, 8, seed=8, epoch=0)
    # Neighbouring batches are of any length: a run does not go through the data from long to short.
    widths = [max(lengths[row] for row in ours[0][start : start + 8]) for start in range(8, 1000, 8)]
    assert abs(torch.corrcoef(torch.tensor([widths, list(range(len(widths)))], dtype=torch.float))[0, 1]) < 0.3
    assert len(range(0, 1003, 8 * POOL)) == 3  # pools, so that the last is a whole one and a bit


ROWS = [{"prompt": "a" * (1 + n), "chosen": "b" * (2 + n % 5), "rejected": "c" * (1 + n % 3)} for n in range(11)]


class Seen:
    """A collator that writes down the first prompt length of each batch and its rows, by their prompts."""

    def __init__(self, real) -> None:
        self.real = real
        self.batches: list[list[int]] = []

    def __call__(self, examples):
        self.batches.append([len(example["prompt_ids"]) for example in examples])
        return self.real(examples)


def settings(folder: Path, **changes) -> dict:
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 64,
        "seed": 3,
        "train_sampling_strategy": "group_by_length",
    }
    return {**common, **changes}


def pair_trainer(model, folder: Path, rows=ROWS, **changes) -> tuple[PairTrainer, Seen]:
    trainer = PairTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=DPOConfig(**settings(folder, **changes)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        loss="simpo",
    )
    trainer.data_collator = Seen(trainer.data_collator)
    return trainer, trainer.data_collator


def test_the_pair_trainer_takes_its_rows_so(tmp_path, tiny_model_dir):
    """Two epochs of 11 rows: each prompt once an epoch, the longest row in the first batch; evaluation in order."""
    trainer, seen = pair_trainer(tiny_model_dir, tmp_path, num_train_epochs=2)
    trainer.train()
    epochs = [[row for batch in half for row in batch] for half in (seen.batches[:6], seen.batches[6:])]
    for rows in epochs:
        assert sorted(rows) == list(range(1, 12))
        assert 10 in rows[:2]  # 10 + 6 + 1 tokens, of which both answers get their end token
    assert epochs[0] != epochs[1]
    seen.batches.clear()
    trainer.evaluate()
    assert [row for batch in seen.batches for row in batch] == list(range(1, 12))


def test_lengths_are_those_of_the_layout(tmp_path, tiny_model_dir):
    """Tokens are bytes: prompt, chosen + end and rejected + end in one row; or the longer of two rows."""
    trainer, _ = pair_trainer(tiny_model_dir, tmp_path)
    assert trainer._row_lengths(trainer.train_dataset) == [1 + n + 3 + n % 5 + 2 + n % 3 for n in range(11)]
    trainer.layout = SEPARATE
    assert trainer._row_lengths(trainer.train_dataset) == [1 + n + max(3 + n % 5, 2 + n % 3) for n in range(11)]


def test_the_reward_trainer_takes_its_rows_so(tmp_path, tiny_model_dir):
    trainer = RewardTrainer(
        model=RewardModel.create(tiny_model_dir, kind="scalar", frozen=True, dtype=torch.float32),
        args=RewardConfig(**settings(tmp_path, num_train_epochs=1)),
        train_dataset=Dataset.from_list(ROWS),
    )
    trainer.data_collator = seen = Seen(trainer.data_collator)
    trainer.train()
    rows = [row for batch in seen.batches for row in batch]
    assert sorted(rows) == list(range(1, 12))
    assert 10 in rows[:2]


def test_the_thumbs_trainer_takes_its_rows_so(tmp_path, tiny_model_dir):
    """The 22 answers of 11 pairs, the one with the longest row in the first batch."""
    trainer = ThumbsTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float32"),
        args=KTOConfig(**settings(tmp_path, num_train_epochs=1)),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        loss="bco",
    )
    trainer.data_collator = seen = Seen(trainer.data_collator)
    trainer.train()
    rows = [row for batch in seen.batches for row in batch]
    assert sorted(rows) == sorted([*range(1, 12)] * 2)
    assert 10 in rows[:2]


def test_other_strategies_are_transformers_own(tmp_path, tiny_model_dir):
    trainer, seen = pair_trainer(tiny_model_dir, tmp_path, num_train_epochs=1, train_sampling_strategy="sequential")
    trainer.train()
    assert [row for batch in seen.batches for row in batch] == list(range(1, 12))


def seen_by(model, folder: Path, resume: Path | None = None) -> None:
    """Train two epochs of 12 rows, and write down what this process has seen."""
    rows = [*ROWS, {"prompt": "a" * 12, "chosen": "b", "rejected": "c"}]
    trainer, seen = pair_trainer(
        model,
        folder,
        rows,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    (folder / f"seen-{trainer.args.process_index}.json").write_text(json.dumps(seen.batches))


def read(folder: Path) -> list[list[list[int]]]:
    return [json.loads((folder / f"seen-{process}.json").read_text()) for process in range(2)]


def test_two_processes_see_disjoint_parts_and_resume_within_an_epoch(tmp_path, tiny_model_dir, two_processes):
    """12 rows, two a process: three steps an epoch; the run goes on from step 4, the first of the second epoch.

    What both see at a step is of near lengths: neither waits for the other.
    """
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    two_processes(lambda: seen_by(tiny_model_dir, whole))
    two_processes(lambda: seen_by(tiny_model_dir, resumed, resume=whole / "checkpoint-4"))
    for epoch in (slice(0, 3), slice(3, 6)):
        rows = [row for process in read(whole) for batch in process[epoch] for row in batch]
        assert sorted(rows) == list(range(1, 13))
    first = [row for process in read(whole) for row in process[0]]
    assert max(first) - min(first) <= 5
    assert [process[-2:] for process in read(resumed)] == [process[4:] for process in read(whole)]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_epoch_is_counted_in_optimiser_steps(tmp_path, tiny_model_dir, accumulation):
    """Three epochs, whole and from a checkpoint in the second: the same rows at the same place."""

    def seen_from(folder: str, resume: Path | None = None) -> list[list[int]]:
        trainer, seen = pair_trainer(
            tiny_model_dir,
            tmp_path / folder,
            num_train_epochs=3,
            gradient_accumulation_steps=accumulation,
            save_strategy="steps",
            save_steps=8 // accumulation,
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return seen.batches

    whole = seen_from("whole")
    step = 8 // accumulation
    rest = seen_from("resumed", tmp_path / "whole" / f"checkpoint-{step}")
    per_epoch, skipped = 6, {1: 8, 3: 6}[accumulation]  # 6 batches an epoch, in 6 steps or in 2
    assert len(whole) == 3 * per_epoch
    assert rest[-(len(whole) - skipped) :] == whole[skipped:]
