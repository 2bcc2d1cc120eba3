"""Reward models on rows that share prompts and are packed: what they say of separate rows, and its gradients."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from align.losses.layouts import layout_of
from align.losses.rows import Rows, answer_rows, pair_rows
from align.rewards.batches import padded
from align.rewards.models import RewardModel, RewardOutput

Backbones = Callable[[str], Path]
LAYOUTS: list[dict[str, Any]] = [
    {"shared_prompt": False},
    {"shared_prompt": False, "row_tokens": 50},
    {"shared_prompt": True},
    {"shared_prompt": True, "row_tokens": 0},
    {"shared_prompt": True, "row_tokens": 90},
]


def make(backbone: Path, **settings: Any) -> RewardModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = RewardModel.create(backbone, **settings)
        if model.gate is not None:
            torch.nn.init.normal_(model.gate.weight)
    return model


def pairs(seed: int = 0, count: int = 7) -> list[list[list[int]]]:
    """Prompts, chosen and rejected answers; answers of one token too."""
    rng = random.Random(seed)
    return [[[rng.randrange(200) for _ in range(rng.randint(1, 12))] for _ in range(count)] for _ in range(3)]


def by_rows(model: RewardModel, rows: Rows) -> RewardOutput:
    return model.read(*model.states_of(rows))


def by_mask(model: RewardModel, texts: list[list[list[int]]]) -> RewardOutput:
    """One padded row an answer, as ``score`` reads them."""
    prompts, *answers = texts
    ids, mask = padded([[*p, *a] for side in answers for p, a in zip(prompts, side, strict=True)], 0)
    return model(ids, mask, torch.tensor([len(p) for p in prompts] * len(answers)))


def test_where_prompts_and_answers_end():
    """[7 7 | 1 | 2 3] and [8 | 4 4 | 5] in one row, of 5 and of 4 tokens."""
    rows = pair_rows([[7, 7], [8]], [[1], [4, 4]], [[2, 3], [5]], pad_token_id=0, shared_prompt=True, row_tokens=9)
    assert rows.prompt_ends().tolist() == [1, 5, 1, 5]
    assert rows.last_tokens().tolist() == [2, 7, 4, 8]
    single = answer_rows([[7, 7], [8]], [[1], [4, 4]], pad_token_id=0)
    assert single.prompt_ends().tolist() == [1, 3]
    assert single.last_tokens().tolist() == [2, 5]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "granite"])
def test_values_of_all_layouts_are_those_of_separate_rows(backbone_dir: Backbones, family: str, attention: str):
    settings = {"kind": "gpm", "dimension": 4, "gate": True, "attn_implementation": attention}
    model, texts = make(backbone_dir(family), **settings), pairs()
    assert layout_of(model.carrier) == {"shared_prompt": True, "row_tokens": 0}
    with torch.no_grad():
        expected = by_mask(model, texts)
        for layout in LAYOUTS:
            found = by_rows(model, pair_rows(*texts, pad_token_id=0, **layout))
            torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)])
def test_gradients_of_all_layouts_are_those_of_separate_rows(
    backbone_dir: Backbones, lora: LoraConfig | None, checkpointing: bool
):
    model, texts = make(backbone_dir("llama"), kind="scalar", lora=lora).train(), pairs()
    if checkpointing:
        model.carrier.gradient_checkpointing_enable()
        model.carrier.enable_input_require_grads()

    def gradients(output: RewardOutput) -> dict[str, Tensor]:
        model.zero_grad()
        (output.values * torch.linspace(-1, 2, len(output.values))).mean().backward()
        return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}

    expected = gradients(by_mask(model, texts))
    assert len(expected) > 10
    for layout in LAYOUTS:
        found = gradients(by_rows(model, pair_rows(*texts, pad_token_id=0, **layout)))
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name, w=layout: f"{w} {n}: {m}"
            )


def test_a_pair_is_untouched_by_its_neighbours(backbone_dir: Backbones):
    """In one row with six others: its values, and the gradient of its loss, with other tokens around it."""
    model, texts, others = make(backbone_dir("llama"), kind="scalar"), pairs(), pairs(seed=5)
    found = []
    for beside in (texts, others):
        mixed = [[*part[:2], own[2], *part[3:]] for part, own in zip(beside, texts, strict=True)]
        rows = pair_rows(*mixed, pad_token_id=0, shared_prompt=True, row_tokens=1000)
        assert len(rows.input_ids) == 1
        model.zero_grad()
        values = by_rows(model, rows).values[[2, 9]]
        (values[0] - values[1]).backward()
        found.append([values.detach(), *(w.grad.clone() for w in model.parameters() if w.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
