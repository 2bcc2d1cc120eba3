"""Training on groups of answers that data holds: what a step learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from align.losses import Loss
from align.trainers.rated import RatedTrainer

ANSWERS = [["a", " the inn"], ["er", "an"], ["then", " a"], ["in", "other"]]
SCORES = [[0.3, -0.3], [0.1, -0.1], [-1.0, 1.0], [0.5, -0.5]]


@pytest.fixture
def groups(tiny_tokenizer: PreTrainedTokenizerFast) -> Dataset:
    ids = tiny_tokenizer
    columns = {
        "prompt_ids": [ids(prompt)["input_ids"] for prompt in ("the cat", "an inn", "her", "a thin hat")],
        "answer_ids": [[ids(text)["input_ids"] for text in own] for own in ANSWERS],
        "scores": SCORES,
    }
    return Dataset.from_dict(columns)


@pytest.fixture
def trainer_of(
    tmp_path: Path,
    make_tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    groups: Dataset,
) -> Callable[..., RatedTrainer]:
    def make(loss: Any = "gpo", data: Dataset = groups, shared: bool = True, **arguments: Any) -> RatedTrainer:
        settings = {
            "per_device_train_batch_size": 4,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            **arguments,
        }
        given = TrainingArguments(str(tmp_path), **settings)
        common: dict[str, Any] = {"loss": loss, "train_dataset": data, "tokenizer": tiny_tokenizer}
        return RatedTrainer(make_tiny_model(), given, shared_prompt=shared, **common)

    return make


def weights(trainer: RatedTrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize(("compared", "share"), [(None, 1 / 2), (4, 3 / 4)], ids=["both", "best and worst of four"])
def test_the_gradient_is_that_of_the_loss(
    trainer_of: Callable[..., RatedTrainer],
    make_tiny_model: Callable[..., LlamaForCausalLM],
    groups: Dataset,
    compared: int | None,
    share: float,
) -> None:
    """One step of plain SGD is the gradient of the mean over prompts of [h_1 - h_2 - (s_1 - s_2)/beta]^2, by hand.

    Scores are means over all that were compared, where those of the data are over the others.
    """
    data = groups if compared is None else groups.add_column("compared", [compared] * len(groups))
    trainer = trainer_of(Loss.of("gpo", beta=0.5), data)
    before = weights(trainer)
    trainer.train()
    model = make_tiny_model()
    terms = []
    for row in groups:
        totals = []
        for answer in row["answer_ids"]:
            ids = torch.tensor([[*row["prompt_ids"], *answer]])
            logps = model(ids).logits[0].log_softmax(-1)
            start = len(row["prompt_ids"])
            totals.append(sum(logps[at - 1, ids[0, at]] for at in range(start, ids.shape[1])))
        ratio = [total - total.detach() for total in totals]  # the policy is the reference
        terms.append((ratio[0] - ratio[1] - share * (row["scores"][0] - row["scores"][1]) / 0.5) ** 2)
    torch.stack(terms).mean().backward()
    after = weights(trainer)
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(before[name] - after[name], 1e-3 * value.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("sizes", [(2, 2), (1, 4), (3, 1)])
def test_accumulation_and_layout_change_nothing(
    trainer_of: Callable[..., RatedTrainer], groups: Dataset, sizes: tuple[int, int]
) -> None:
    """Also where the batches of an epoch are not alike: 3 and 1 of four."""
    (batch, accumulated), loss = sizes, Loss.of("gpo_pointwise", beta=0.5)
    steps = {"max_steps": 3, "per_device_train_batch_size": batch * accumulated}
    one = trainer_of(loss, **steps)
    other = trainer_of(
        loss,
        shared=False,
        **{**steps, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated},
    )
    one.train()
    other.train()
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=0, atol=1e-5)


def test_regression_reaches_its_target(trainer_of: Callable[..., RatedTrainer], groups: Dataset) -> None:
    """After some steps the log-ratios' differences are (s_1 - s_2)/beta, with win rates alone in the data.

    SPPO's scores are win rates less 1/2: 0.4 and -0.4 against each other are 0.2 and -0.2 with themselves counted,
    and at beta 0.4 ask for a difference of 1 nat.
    """
    rates = [[0.5 + score / 2.5 for score in own] for own in SCORES]
    data = groups.remove_columns("scores").add_column("win_rates", rates)
    steps = {"max_steps": 60, "optim": "adamw_torch", "learning_rate": 3e-3, "logging_steps": 60}
    trainer = trainer_of(Loss.of("sppo", beta=0.4), data, **steps)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert math.isfinite(logged["loss"])
    batch = trainer.judged([list(data)])[0]
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=4)
    assert float(loss) < 0.02


def test_a_loss_on_answers_of_its_own_is_refused(trainer_of: Callable[..., RatedTrainer]) -> None:
    for loss in ("nash_md_pg", Loss.of("ipo", beta=0.1)):
        with pytest.raises(ValueError, match="learns from answers that the policy gives as it learns"):
            trainer_of(loss)
