"""An annotator that knows its mind, and an online trainer of a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from align.data.prompts import ROW_ID
from align.rewards.annotators import Problem, Verdicts
from align.trainers.online import Drawing, OnlineTrainer

PROMPTS = ["the cat", "an inn", "her hat", "then", "a thin man", "other", "in there", "tea"]


class ByLetters:
    """An answer with larger letters is preferred; of ``silent`` prompts the first pair is set aside."""

    name = "by letters"

    def __init__(self, silent: Sequence[str] = ()) -> None:
        self.silent = silent

    def __call__(
        self, prompts: Sequence[Any], answers: Sequence[Sequence[Any]], columns: Mapping[str, Any] | None = None
    ) -> Verdicts:
        sizes = [[float(sum(ord(letter) % 11 for letter in answer)) for answer in own] for own in answers]
        size = torch.tensor(sizes, dtype=torch.float64)
        scores = 0.1 * (size[:, :, None] - size[:, None, :])
        problems = []
        for place, prompt in enumerate(prompts):
            if prompt in self.silent:
                scores[place, 0, 1] = scores[place, 1, 0] = math.nan
                problems.append(Problem(place, 0, 1, "nothing to say"))
        return Verdicts(torch.sigmoid(scores), scores, problems)


@pytest.fixture
def by_letters() -> type[ByLetters]:
    return ByLetters


@pytest.fixture
def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, ROW_ID: [str(n) for n in range(len(PROMPTS))]})


@pytest.fixture
def trainer_of(
    tmp_path: Path,
    make_tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    prompts: Dataset,
) -> Callable[..., OnlineTrainer]:
    """``trainer_of(folder, **settings)``: two steps of four prompts, unless settings say otherwise."""

    def make(folder: str = "run", **settings: Any) -> OnlineTrainer:
        drawing = {"max_new_tokens": 6, **settings.pop("drawing", {})}
        arguments = {
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            **settings.pop("arguments", {}),
        }
        given = {"loss": "ipo", "annotator": ByLetters(), "train_dataset": prompts, **settings}
        return OnlineTrainer(
            given.pop("model", None) or make_tiny_model(),
            TrainingArguments(str(tmp_path / folder), **arguments),
            drawing=Drawing(**drawing),
            **{"tokenizer": tiny_tokenizer, **given},
        )

    return make


@pytest.fixture
def weights() -> Callable[[OnlineTrainer], dict[str, Tensor]]:
    """What is trained, by name."""
    return lambda trainer: {
        name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad
    }


@pytest.fixture
def assert_equal(weights: Callable[[OnlineTrainer], dict[str, Tensor]]) -> Callable[..., None]:
    """Two trainers have the same weights, to a tolerance."""

    def check(one: OnlineTrainer, other: OnlineTrainer, tolerance: float = 0.0) -> None:
        left, right = weights(one), weights(other)
        assert left.keys() == right.keys()
        for name, value in left.items():
            torch.testing.assert_close(value, right[name], rtol=0, atol=tolerance, msg=name)

    return check


@pytest.fixture
def samples() -> Callable[[OnlineTrainer], list[dict[str, Any]]]:
    """The lines of ``samples.jsonl``."""

    def read(trainer: OnlineTrainer) -> list[dict[str, Any]]:
        path = Path(trainer.args.output_dir) / "samples.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]

    return read
