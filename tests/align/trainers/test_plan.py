"""The plan of a run: its steps are counted, its parameters are those of the model, its memory adds up."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.load import load_recipe
from align.models.load import load_model, load_tokenizer
from align.trainers.build import training_arguments
from align.trainers.plan import plan


def planned(path: Path, rows: list[int], *overrides: str):
    recipe = load_recipe(str(path), list(overrides))
    tokenizer = load_tokenizer(recipe.model.name)
    return plan(recipe, training_arguments(recipe, Path(recipe.output), tokenizer), rows)


def test_steps_and_tokens(write_recipe):
    """10 rows of 20 tokens, batches of 4: 3 steps an epoch, two epochs are 6; 80 tokens a step."""
    found = planned(write_recipe(training={"max_steps": -1, "num_train_epochs": 2}), [20] * 10)
    assert (found.steps, found.epochs, found.pairs_per_step, found.tokens_per_step) == (6, 2.0, 4, 80)
    accumulated = planned(write_recipe(training={"gradient_accumulation_steps": 2}), [20] * 16)
    assert (accumulated.steps, accumulated.epochs, accumulated.pairs_per_step) == (6, 3.0, 8)


def test_parameters_are_those_of_the_model(write_recipe, tiny_model_dir):
    model, _ = load_model(str(tiny_model_dir))
    every = sum(p.numel() for p in model.parameters())
    adapted = planned(write_recipe(), [20] * 8)
    full = planned(write_recipe(method="dpo", model={"lora": None}, loss={"beta": 0.1}), [20] * 8)
    assert adapted.parameters == full.parameters == full.trainable == every
    # r (in + out) for q, k, v, o, gate, up and down of two layers, at r = 4.
    assert adapted.trainable == 2 * 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))


def test_memory_by_purpose(write_recipe):
    """A reference copy only where one is kept; activations grow with the longest rows and not with the short ones.

    Six steps of four see at least half of 48 rows, and not of 49: then the log-probs are not all there before.
    """
    adapted = planned(write_recipe(), [20] * 8).memory
    whole = write_recipe(method="dpo", model={"lora": None}, loss={"beta": 0.1})
    full = planned(whole, [20] * 8, "data.reference_cache=false").memory
    assert [planned(whole, [20] * rows).memory["reference"] > 0 for rows in (8, 48, 49)] == [False, False, True]
    free = planned(write_recipe(method="simpo", model={"lora": None}, loss={"beta": 2.0}), [20] * 8).memory
    assert adapted["reference"] == free["reference"] == 0
    assert full["reference"] == full["weights"] == pytest.approx(4 * 35616 / 1e9)
    longer = planned(write_recipe(), [20] * 4 + [40] * 4).memory
    assert longer["activations"] == pytest.approx(2 * adapted["activations"])
    shorter = planned(write_recipe(model={"gradient_checkpointing": True}), [20] * 8).memory
    assert shorter["activations"] == pytest.approx(adapted["activations"] / 2)
