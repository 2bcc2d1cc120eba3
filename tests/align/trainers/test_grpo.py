"""GRPO's log-probs by our head are TRL's."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from align.rewards.functions import RewardFunction
from align.rewards.scorers import RuleReward
from align.trainers.grpo import GroupTrainer


@pytest.fixture
def trainer(make_tiny_model, tiny_tokenizer, tmp_path):
    scorers = {"m:length": RuleReward(lambda prompts, answers: [float(len(text)) for text in answers])}
    arguments = GRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        use_cpu=True,
        bf16=False,
        report_to="none",
        beta=0.1,
        gradient_checkpointing=False,
    )
    prompts = Dataset.from_dict({"prompt": ["one", "two three", "four", "five six seven"]})
    from peft import LoraConfig

    return GroupTrainer(
        make_tiny_model(),
        RewardFunction.of("m:length", scorers=scorers),
        arguments,
        train_dataset=prompts,
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def test_log_probs_entropies_and_gradients_equal_trls(trainer):
    """Prompts padded on the left, answers of unequal length on the right, in two parts."""
    torch.manual_seed(0)
    ids = torch.randint(5, 200, (3, 9))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 0]])
    trainer.model.eval()
    found = []
    for method in (GroupTrainer, GRPOTrainer):
        trainer.model.zero_grad()
        logps, entropies, _ = method._get_per_token_logps_and_entropies(
            trainer, trainer.model, ids, mask, 5, batch_size=2, compute_entropy=True
        )
        kept = mask[:, -5:]
        (logps * kept).square().sum().backward()
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
        found.append([logps * kept, entropies.detach() * kept, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_an_answer_without_a_reward_moves_nothing_and_no_average(trainer, caplog):
    """Of rewards None, 0, 1 and 5 the mean is 2: advantages 0, -2, -1 and 3. Of a prompt with None alone all are 0."""
    trainer.num_generations, trainer.scale_rewards = 4, "none"
    values = iter([[None, 0.0, 1.0, 5.0], [None] * 4])
    trainer.reward.scorers["m:length"] = RuleReward(lambda prompts, answers: next(values))
    caplog.set_level(logging.WARNING)
    for expected in ([0.0, -2.0, -1.0, 3.0], [0.0] * 4):
        found = trainer._generate_and_score_completions([{"prompt": "one"}] * 4)
        assert found["advantages"].tolist() == expected
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == ["length:"]
    assert trainer._metrics["train"]["unrewarded/answers"] == [0.25, 1.0]
