"""Formulas in the pair trainer: they train as the losses that they are."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig

from align.losses import Loss
from align.losses.logic import LogicLoss
from align.trainers.pair import PairTrainer

ROWS = [
    {"prompt": "the inner", "chosen": " thing is there", "rejected": " cat"},
    {"prompt": "an apple", "chosen": " fell", "rejected": " in the garden, then another"},
    {"prompt": "there", "chosen": " she is", "rejected": " they are an ant"},
    {"prompt": "a hint then:", "chosen": " think again", "rejected": " no"},
]
ORPO = {"logic": "implies(M(l), M(w))", "where": "xor(M(l), M(w))"}
DPO = {
    "logic": "Ref(w) & M(l) -> Ref(l) & M(w)",
    "where": "Ref(w) & M(l) | Ref(l) & M(w)",
    "also": "M(w) & M(l) & Ref(w) & Ref(l)",
}


def trained(tmp_path, tokenizer, model, loss) -> tuple[list[dict[str, float]], torch.Tensor]:
    """The log of three steps, and all weights after them."""
    torch.manual_seed(0)
    settings = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none"}
    computing = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    arguments = DPOConfig(
        str(tmp_path), per_device_train_batch_size=2, max_steps=3, save_strategy="no", **settings, **computing
    )
    data = Dataset.from_list(ROWS)
    trainer = PairTrainer(model, args=arguments, loss=loss, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return [entry for entry in trainer.state.log_history if "loss" in entry], weights


@pytest.mark.parametrize(
    ("formula", "hand"),
    [
        (LogicLoss(**ORPO), Loss.of("orpo", odds_weight=1.0, sft_weight=0.0)),
        (LogicLoss(**DPO, norm="sum", beta=0.3), Loss.of("dpo", beta=0.3)),
        (
            [LogicLoss(**ORPO, weight=0.1), Loss.of("sft")],
            [Loss.of("orpo", weight=0.1, odds_weight=1.0, sft_weight=0.0), Loss.of("sft")],
        ),
    ],
    ids=["orpo", "dpo", "orpo with its likelihood term"],
)
def test_a_formula_trains_as_the_loss_that_it_is(tmp_path, tiny_tokenizer, make_tiny_model, formula, hand):
    """Three steps of full training: the same loss, margin and gradient norm, and the same weights in the end."""
    ours, weights = trained(tmp_path, tiny_tokenizer, make_tiny_model(), formula)
    theirs, expected = trained(tmp_path, tiny_tokenizer, make_tiny_model(), hand)
    assert len(ours) == 3
    for one, other in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-3)
    before = torch.cat([parameter.detach().flatten() for parameter in make_tiny_model().parameters()])
    assert (weights - before).abs().max() > 1e-3


def test_a_formula_without_a_name_trains(tmp_path, tiny_tokenizer, make_tiny_model):
    """CCPO: no reference is loaded, and the loss falls."""
    loss = LogicLoss("implies(M(l), M(w))", where="or(M(l), M(w))")
    log, _ = trained(tmp_path, tiny_tokenizer, make_tiny_model(), loss)
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(entry["rewards/margins"] == entry["rewards/margins"] for entry in log)
    assert not any("displacement/chosen_delta" in entry for entry in log)
