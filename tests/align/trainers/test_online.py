"""Online training on a tiny model: what a step learns, and that nothing of how it is run changes it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from align.data.prompts import ROW_ID
from align.errors import AlignError
from align.losses import LOSSES, Loss
from align.rewards.annotators import Problem, Verdicts
from align.trainers.online import Drawing, OnlineTrainer

PROMPTS = ["the cat", "an inn", "her hat", "then", "a thin man", "other", "in there", "tea"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


class ByLetters:
    """An answer with larger letters is preferred."""

    name = "by letters"

    def __init__(self, weight: float = 0.1, silent: Callable[[str], bool] = lambda prompt: False) -> None:
        self.weight, self.silent = weight, silent

    def __call__(
        self, prompts: Sequence[Any], answers: Sequence[Sequence[Any]], columns: Mapping[str, Any] | None = None
    ) -> Verdicts:
        sizes = [[float(sum(ord(letter) % 11 for letter in answer)) for answer in own] for own in answers]
        size = torch.tensor(sizes, dtype=torch.float64)
        scores = self.weight * (size[:, :, None] - size[:, None, :])
        problems = []
        for place, prompt in enumerate(prompts):
            if self.silent(prompt):
                scores[place, 0, 1] = scores[place, 1, 0] = math.nan
                problems.append(Problem(place, 0, 1, "nothing to say"))
        return Verdicts(torch.sigmoid(scores), scores, problems)


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
    def make(folder: str = "run", **settings: Any) -> OnlineTrainer:
        loss = settings.pop("loss", "ipo")
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
        return OnlineTrainer(
            settings.pop("model", None) or make_tiny_model(),
            TrainingArguments(str(tmp_path / folder), **arguments),
            loss=loss,
            annotator=settings.pop("annotator", None) or ByLetters(),
            drawing=Drawing(**drawing),
            tokenizer=tiny_tokenizer,
            train_dataset=settings.pop("train_dataset", prompts),
            **settings,
        )

    return make


def weights(trainer: OnlineTrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def assert_equal(one: OnlineTrainer, other: OnlineTrainer, tolerance: float = 0.0) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=tolerance)


def samples(trainer: OnlineTrainer) -> list[dict[str, Any]]:
    path = Path(trainer.args.output_dir) / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


ONLINE = ["ipo", "dpo", "slic", "nash_md_pg", "gpo", "gpo_pointwise", "sppo", "sppo_pointwise", "mdpo"]


@pytest.mark.parametrize("loss", ONLINE)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_every_loss_trains(trainer_of: Callable[..., OnlineTrainer], loss: str, lora: LoraConfig | None) -> None:
    trainer = trainer_of(loss=loss, peft_config=lora, inner_steps=2 if loss == "mdpo" else 1, drawing={"mixture": 0.25})
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 2]
    assert all(math.isfinite(value) for entry in logs for value in entry.values())
    assert logs[0]["kl/k1"] == pytest.approx(0, abs=1e-4)  # at the first step the policy is the reference
    assert {"entropy", "length/tokens", "length/truncated", "preference/decided"} <= logs[0].keys()
    assert len(samples(trainer)) == (4 if loss == "mdpo" else 8)


@pytest.mark.parametrize("loss", ["ipo", "gpo", "nash_md_pg", "mdpo"])
def test_accumulation_changes_nothing(trainer_of: Callable[..., OnlineTrainer], loss: str) -> None:
    """Four prompts in one batch, or two and two, or one at a time; one pair of the four has no verdict."""
    settings: dict[str, Any] = {"loss": loss, "annotator": ByLetters(silent=lambda prompt: prompt == "then")}
    settings |= {"drawing": {"mixture": 0.5 if loss in ("ipo", "nash_md_pg") else 0.0}, "inner_steps": 2}
    one = trainer_of("one", **settings)
    one.train()
    for batch, accumulated in ((2, 2), (1, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        other = trainer_of(f"by {batch}", arguments=sizes, **settings)
        other.train()
        assert_equal(one, other, 2e-5)
        ours, theirs = one.state.log_history, other.state.log_history
        for left, right in zip(ours[:-1], theirs[:-1], strict=True):
            assert left.keys() == right.keys()
            for name in left.keys() - {"perf/tokens_per_s", "perf/peak_rss_gb"}:
                assert right[name] == pytest.approx(left[name], rel=2e-3, abs=2e-5), name


def test_the_gradient_is_that_of_the_loss(
    trainer_of: Callable[..., OnlineTrainer], make_tiny_model: Callable[..., LlamaForCausalLM]
) -> None:
    """One step of plain SGD is the gradient of the mean IPO loss over the pairs, by logits and by hand."""
    trainer = trainer_of(
        arguments={"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0},
        annotator=ByLetters(silent=lambda prompt: prompt == "then"),
        loss=Loss.of("ipo", beta=2.0),
        drawing={"answers": 3},
    )
    before = weights(trainer)
    trainer.train()
    assert trainer._window is not None
    (groups,) = trainer._window[1]
    model = make_tiny_model()

    def logp(group: Any, answer: int) -> Tensor:
        ids = torch.tensor([[*group.prompt_ids, *group.answer_ids[answer]]])
        logps = model(ids).logits[0].log_softmax(-1)
        start = len(group.prompt_ids)
        return sum(logps[at - 1, ids[0, at]] for at in range(start, ids.shape[1]))

    terms = []
    for group in groups:
        assert group.preference is not None
        totals = [logp(group, answer) for answer in range(3)]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            p = float(group.preference[i, j])
            if not math.isnan(p):
                h = (totals[i] - totals[i].detach()) - (totals[j] - totals[j].detach())  # the policy is the reference
                terms.append((h - (p - 0.5) / 2.0) ** 2)
    assert len(terms) in (11, 12)  # one of the window's pairs has no verdict, if its prompt is among the four
    torch.stack(terms).mean().backward()
    for name, value in model.named_parameters():
        if value.requires_grad and value.grad is not None:
            torch.testing.assert_close(before[name] - weights(trainer)[name], value.grad, rtol=1e-3, atol=1e-6)
