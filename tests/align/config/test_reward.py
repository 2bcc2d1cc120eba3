"""Recipes that train a reward model: what goes together, and what the model itself refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from align.config.load import load_recipe, resolved_yaml
from align.data.rewards import RewardRules
from align.errors import ConfigError
from align.losses import LOSSES

Write = Callable[..., str]
METHODS = ("bradley_terry", "margin_bradley_terry", "scaled_bradley_terry", "regression", "gpm")


def problems(source: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(source)
    return dict(caught.value.problems)


def sound(method: str, held_out: dict[str, str], **changes: Any) -> dict[str, Any]:
    reward = {"attributes": ["score"]} if method == "regression" else {}
    return {"method": method, "data": held_out, "reward": reward, **changes}


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_method_has_its_section_its_suite_and_its_data(write_recipe: Write, held_out, tmp_path, method):
    recipe = load_recipe(write_recipe(**sound(method, held_out)))
    assert recipe.reward is not None
    assert recipe.evals == ["reward"]
    assert recipe.data_kind == ("ratings" if method == "regression" else "pairs")
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe(str(tmp_path / "resolved.yaml")) == recipe


def test_every_reward_loss_that_ranks_is_a_method(write_recipe: Write, held_out):
    assert {name for name, info in LOSSES.items() if info.kind == "reward" and info.ranks} - set(METHODS) <= {
        "pal_cross_entropy",
        "pal_hinge",
        "pal_logistic",
    }


def test_defaults_are_filled_in(write_recipe: Write, held_out):
    recipe = load_recipe(write_recipe(method="gpm", data=held_out))
    assert recipe.loss == {}  # tau is 0.1, or that of the model that is gone on from
    assert recipe.reward.over_long == "cut"
    recipe = load_recipe(write_recipe(method="scaled_bradley_terry", data=held_out))
    assert recipe.loss == {"normalize_weights": False}


def test_the_rules_of_the_data(write_recipe: Write, held_out):
    recipe = load_recipe(
        write_recipe(**sound("margin_bradley_terry", held_out, reward={"gap_of": "score", "over_long": "set_aside"}))
    )
    assert recipe.data_rules == RewardRules(gap_of="score", needs_margin=True, over_long="set_aside")
    assert load_recipe(write_recipe(**sound("regression", held_out))).data_rules.attributes == ("score",)
    assert load_recipe(write_recipe(data=held_out)).data_rules is None


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"method": "dpo", "reward": {}}, "reward", "belongs to methods that train a reward model"),
        ({"reward": {"dimension": 4}}, "reward", "dimension is that of a gpm's embedding"),
        ({"method": "gpm", "reward": {"dimension": 3}}, "reward", "the embedding has 3 dimensions"),
        ({"reward": {"gate": True}}, "reward", "gate weighs the form of a gpm"),
        ({"reward": {"attributes": ["a"]}}, "reward", "attributes are the names of what"),
        ({"method": "regression"}, "reward.attributes", "is missing: the columns of ratings"),
        ({"method": "regression", "reward": {"attributes": ["a", "b"]}}, "reward", "several attributes: ranking says"),
        (
            {"method": "regression", "reward": {"attributes": ["a", "b"], "ranking": "c"}},
            "reward",
            "ranking names c; the attributes are a, b",
        ),
        ({"method": "gpm", "reward": {"centering": 0.1}}, "reward.centering", "centres the scores of scalar models"),
        ({"reward": {"centering": -0.1}}, "reward.centering", "is -0.1; it must be at least 0"),
        ({"reward": {"gap_of": "score"}}, "reward.gap_of", "gives margins and strengths, which method bradley_terry"),
        ({"reward": {"over_long": "drop"}}, "reward.over_long", "'drop' is not one of cut, set_aside"),
        ({"reward": {"gaet": True}}, "reward.gaet", "unknown key; did you mean reward.gate?"),
        (
            {"reward": {"frozen": True}, "model": {"name": "a/b", "lora": {"r": 4}}},
            "reward.frozen",
            "model.lora trains",
        ),
        ({"evals": ["preference"]}, "evals.0", "preference compares pairs, and method: bradley_terry trains a reward"),
        ({"method": "dpo", "evals": ["reward"]}, "evals.0", "reward judges a reward model, and the losses read pairs"),
        (
            {"training": {"center_rewards_coefficient": 0.1}},
            "training.center_rewards_coefficient",
            "set it as reward.c",
        ),
        ({"training": {"beta": 0.1}}, "training.beta", "set it as loss.beta"),
        ({"method": "gpm", "loss": {"tau": 0.0}}, "loss", "tau is 0.0: it must be positive"),
        ({"loss": {"beta": 1.0}}, "loss.beta", "bradley_terry has no such setting"),
        (
            {"method": None, "losses": [{"name": "dpo"}, {"name": "gpm"}]},
            "losses.1.name",
            "gpm trains a reward model and stands alone; write method: gpm",
        ),
    ],
)
def test_what_does_not_go_together(write_recipe: Write, held_out, changes, where, what):
    found = problems(write_recipe(**{"method": "bradley_terry", "data": held_out, **changes}))
    assert found.get(where, f"not among {found}").startswith(what)
