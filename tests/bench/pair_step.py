"""Seconds per training step: PairTrainer with shared and with separate rows, and TRL's DPOTrainer, on the same pairs.

Run it with ``make bench``. The packaged model with a LoRA adapter, LN-DPO, the quickstart's own pairs; the three
trainers take turns, so that what else the machine does meets all alike, and ratios are medians over the rounds. TRL
runs with gradient checkpointing off, as ours does, and otherwise in its defaults.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from align.data.splits import read_split
from align.models.hardware import best_dtype
from align.models.load import load_model, load_tokenizer
from align.trainers.pair import PairTrainer

MODEL = "smollm2-135m-instruct"


def stepper(kind: type, rows: Dataset, batch: int, **kwargs: Any) -> Callable[[], float]:
    """A function that does one optimiser step on the next batch and returns its seconds."""
    dtype, _ = best_dtype()
    name = str(dtype).removeprefix("torch.")
    settings = kwargs.pop("settings", {})
    trainer = kind(
        model=load_model(MODEL, dtype=name)[0],
        args=DPOConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=batch,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=name == "bfloat16",
            report_to="none",
            beta=5.0,
            max_length=256,
            **settings,
        ),
        train_dataset=rows,
        processing_class=load_tokenizer(MODEL),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        **kwargs,
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    trainer.model.train()
    batches = iter(trainer.get_train_dataloader())

    def step() -> float:
        inputs = next(batches)
        began = time.perf_counter()
        trainer.training_step(trainer.model, inputs)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return time.perf_counter() - began

    return step


def main() -> None:
    """Print the median step of each trainer and the ratios to TRL."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="steps of each trainer, after one to warm up")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step")
    options = parser.parse_args()
    split = read_split("align:quickstart/train", load_tokenizer(MODEL), 256, kind="pairs")
    text = Dataset.from_list(
        [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in split.table.rows]
    )
    ids = split.tokenized.dataset()
    steppers = {
        "TRL DPOTrainer": stepper(DPOTrainer, text, options.pairs, settings={"loss_type": ["sigmoid_norm"]}),
        "separate rows": stepper(PairTrainer, ids, options.pairs, loss="ln_dpo", shared_prompt=False),
        "shared prompt": stepper(PairTrainer, ids, options.pairs, loss="ln_dpo"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(options.rounds + 1):
        for name, step in steppers.items():
            took = step()
            if turn:
                seconds[name].append(took)
    theirs = seconds["TRL DPOTrainer"]
    print(f"{options.pairs} pairs a step, {options.rounds} steps each, {best_dtype()[1]}")
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(theirs, values, strict=True)]
        print(
            f"{name:<15} {statistics.median(values):6.2f} s a step · TRL takes {statistics.median(ratios):.2f} times "
            f"as long ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
