"""Two processes with half the batch each: the loss, gradient and metrics of one process with the whole batch."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from align.trainers.pair import PairTrainer

ROWS = [
    {"prompt": "the inner", "chosen": " thing is there", "rejected": " cat"},
    {"prompt": "an apple", "chosen": " fell", "rejected": " in the garden, then another"},
    {"prompt": "there", "chosen": " she is", "rejected": " they are an ant"},
    {"prompt": "a hint then:", "chosen": " think again", "rejected": " no"},
]


def train(model, output, batch, settings, train_and_log):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    for name, peft in (("full", None), ("lora", lora)):
        trainer = PairTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
            args=DPOConfig(
                str(output / name),
                per_device_train_batch_size=batch,
                **settings,
                beta=0.5,
            ),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=peft,
            loss="dpo",
        )
        train_and_log(trainer, output / f"{name}.json")


def test_two_processes_equal_one(tmp_path, tiny_model_dir, two_processes, three_steps, train_and_log):
    one, two = (tmp_path / name for name in ("one", "two"))
    train(tiny_model_dir, one, 4, three_steps, train_and_log)
    two_processes(lambda: train(tiny_model_dir, two, 2, three_steps, train_and_log))
    for kind in ("full", "lora"):
        logs = [json.loads((output / f"{kind}.json").read_text()) for output in (one, two)]
        assert len(logs[0]) == 3
        for whole, halves in zip(*logs, strict=True):
            for key in (k for k in whole if not k.startswith("perf/") and k != "num_tokens"):
                assert halves[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), (kind, key)
        # Padding differs between the processes and is not counted.
        assert logs[1][-1]["num_tokens"] == logs[0][-1]["num_tokens"]
