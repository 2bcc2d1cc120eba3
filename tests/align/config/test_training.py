"""``training:`` against the fields of TRL's configs."""

from __future__ import annotations

import dataclasses

import pytest
from trl import DPOConfig, KTOConfig, RewardConfig, SFTConfig

from align.config.json_schema import recipe_schema
from align.config.training import ELSEWHERE, RETIRED, check_training, training_fields


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("max_steps", "many", "'many' is not a whole number"),
        ("max_steps", 0, "is 0; it must be at least 1, or -1 to train num_train_epochs"),
        ("per_device_train_batch_size", 12.5, "12.5 is not a whole number"),
        ("per_device_train_batch_size", 8.0, "8.0 is not written as a whole number; write 8"),
        ("per_device_train_batch_size", True, "true is not a whole number"),
        ("gradient_accumulation_steps", 0, "is 0; it must be at least 1"),
        ("learning_rate", "5e-7", "'5e-7' is not a number"),
        ("learning_rate", -1e-5, "is -1e-05; it must be at least 0"),
        ("learning_rate", float("nan"), "is nan; it must be finite"),
        ("disable_dropout", 1, "1 is not true or false"),
        ("optim", "adamw_torhc", "'adamw_torhc' is not a known value; did you mean adamw_torch?"),
        ("lr_scheduler_type", "cosinus", "'cosinus' is not a known value; did you mean cosine?"),
        ("eval_strategy", "sometimes", "'sometimes' is not one of no, steps, epoch"),
        ("lerning_rate", 1.0, "unknown key; did you mean training.learning_rate?"),
        ("xyzzy", 1.0, "unknown key; not a field of trl.DPOConfig"),
        ("beta", 0.1, "set it as loss.beta"),
        ("output_dir", "x", "set output"),
        ("max_prompt_length", 64, "gone from TRL; data.max_length limits a prompt and its answer together"),
        ("packing", True, "set data.packing, for pairs and groups; other rows are not packed"),
    ],
)
def test_a_value_that_does_not_fit(key: str, value: object, what: str) -> None:
    assert check_training({key: value}, "dpo") == [(f"training.{key}", what)]


def test_the_order_of_rows_in_grpo() -> None:
    """TRL's trainer has a sampler of its own, and would not read the key."""
    problem = "each prompt stands as often as it has answers, in random order; remove it"
    key = "train_sampling_strategy"
    assert check_training({key: "group_by_length"}, "grpo") == [(f"training.{key}", problem)]
    assert check_training({key: "group_by_length"}, "dpo") == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 5e-7),
        ("learning_rate", 0),
        ("max_steps", -1),
        ("save_steps", 0.2),
        ("save_steps", 20),
        ("optim", "adamw_torch"),
        ("lr_scheduler_kwargs", {"num_cycles": 1}),
        ("max_grad_norm", 1.0),
        ("data_seed", None),
        ("seed", 7),
    ],
)
def test_a_value_that_fits(key: str, value: object) -> None:
    assert check_training({key: value}, "dpo") == []
    assert check_training({key: value}, "sft") == []
    assert check_training({key: value}, "bco") == []


def test_every_default_of_trl_fits_its_own_check() -> None:
    """Otherwise the annotations are read too narrowly."""
    for config, method in ((DPOConfig, "dpo"), (SFTConfig, "sft"), (KTOConfig, "bco")):
        fields = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
        allowed = {name: getattr(v, "value", v) for name, v in fields.items() if name in training_fields(method)}
        problems = check_training(allowed, method)
        assert [p for p in problems if fields[p[0].removeprefix("training.")] is not None] == []


def test_the_two_lists_do_not_rot() -> None:
    """What another key sets must still be a field of TRL; what is retired must not."""
    fields = {f.name for config in (DPOConfig, KTOConfig, RewardConfig, SFTConfig) for f in dataclasses.fields(config)}
    assert set(ELSEWHERE) - fields == set()
    assert set(RETIRED) & fields == set()


def test_the_json_schema_knows_losses_and_training_fields() -> None:
    schema = recipe_schema()
    training = schema["properties"]["training"]["properties"]
    assert training["per_device_train_batch_size"]["minimum"] == 1
    assert "cosine" in training["lr_scheduler_type"]["enum"]
    assert "beta" not in training
    assert "ln_dpo" in schema["properties"]["method"]["enum"]
    assert schema["properties"]["loss"]["properties"]["beta"] == {"type": "number"}
    assert schema["$defs"]["DataSpec"]["properties"]["max_length"]["description"].startswith("Tokens of a prompt")
    assert schema["$defs"]["LossTerm"]["additionalProperties"] is False
