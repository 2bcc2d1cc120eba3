"""Two processes with half the batch each: BCO's shift, loss and gradient are those of one with the whole batch."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig

from align.losses import Loss
from align.trainers.thumbs import ThumbsTrainer

ANSWERS = [" thing is there", " cat", " fell", " in the garden, then another", " she is", " an ant", " no", " think"]
UP = (0, 1, 2, 4, 6)


def last_digit(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[float(int(text[-1]) > 3), 1.0] for text in texts])


def train(model, output, processes, settings, train_and_log):
    rows = [{"prompt": f"say {n}", "completion": answer, "label": n in UP} for n, answer in enumerate(ANSWERS)]
    for name, loss, accumulate, match in (
        ("bco", "bco", 1, last_digit),
        ("bco_accumulated", "bco", 2, False),
        ("kto", Loss.of("kto", beta=0.5), 1, False),
    ):
        trainer = ThumbsTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
            args=KTOConfig(
                str(output / name),
                per_device_train_batch_size=4 // processes if accumulate == 1 else 2,
                gradient_accumulation_steps=accumulate if processes == 1 else 1,
                **settings,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
            loss=loss,
            match_prompts=match,
        )
        train_and_log(trainer, output / f"{name}.json")


def test_two_processes_equal_one(tmp_path, tiny_model_dir, two_processes, three_steps, train_and_log):
    logs = {}
    for processes, launch in ((1, lambda function: function()), (2, two_processes)):
        output = tmp_path / str(processes)
        launch(
            lambda output=output, processes=processes: train(
                tiny_model_dir, output, processes, three_steps, train_and_log
            )
        )
        logs[processes] = {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}
    assert set(logs[1]) == set(logs[2]) == {"bco", "bco_accumulated", "kto"}
    compared = {
        "bco": ("loss", "grad_norm", "bco/shift", "bco/weight_down", "rewards/margins", "thumbs/accuracy"),
        # Metrics of micro-batches are averaged as they are, and a class mean over two rows is another than over four.
        "bco_accumulated": ("loss", "grad_norm", "bco/shift", "bco/mean_up", "bco/mean_down"),
        # Answers are rotated within the batch of a process, so that the KL is of other pairs from the second step on.
        "kto": ("loss", "rewards/chosen", "logps/chosen"),
    }
    for kind, names in compared.items():
        for one, two in list(zip(logs[1][kind], logs[2][kind], strict=True))[: 1 if kind == "kto" else 3]:
            for name in names:
                assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), (kind, name)
