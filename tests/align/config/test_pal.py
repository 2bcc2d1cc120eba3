"""Recipes with method pal."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.load import load_recipe, resolved_yaml
from align.errors import ConfigError


def test_the_shipped_recipe():
    recipe = load_recipe("pal")
    assert recipe.pal is not None
    assert (recipe.data_kind, recipe.evals, recipe.terms, recipe.pal.groups) == ("judgements", ["pal"], [], 2)


def test_the_section_has_defaults(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: pal\nmodel: smollm2-135m-instruct\ndata: {train: align:annotators/train}\noutput: x\n")
    recipe = load_recipe(str(path))
    assert recipe.pal is not None
    assert recipe.pal.variant == "a"
    assert recipe.evals == []
    path.write_text(resolved_yaml(recipe))
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("override", "where", "what"),
    [
        ("training.learning_rate=1.0e-4", "training.learning_rate", "those of section pal"),
        ("evals=[preference]", "evals.0", "leave pal"),
        ("pal.shots=[5, 2]", "pal.shots", "larger than the one before"),
        ("pal.groups=0", "pal.groups", "1"),
        ("pal.group=2", "pal.group", "pal.groups"),
        ("method=dpo", "pal", "belongs to method: pal"),
        ("pal={variant: b, loss: hinge}", "pal.loss", "hinge is of variant a"),
    ],
)
def test_what_does_not_go_together(override: str, where: str, what: str):
    with pytest.raises(ConfigError) as error:
        load_recipe("pal", [override])
    problems = dict(error.value.problems)
    assert what in problems[where]


def test_the_seed_alone_is_taken_from_training():
    assert load_recipe("pal", ["training.seed=3"]).training == {"seed": 3}


def test_an_adapter_or_frozen_false_trains_the_backbone():
    assert load_recipe("pal").pal.frozen
    trained = load_recipe("pal_lora")
    assert (trained.pal.frozen, trained.training["max_steps"], trained.evals) == (False, 30, ["pal"])
    assert (trained.pal.baselines, load_recipe("pal_large").pal.baselines) == (True, False)
    assert load_recipe("pal", ["model.lora.r=4", "training.learning_rate=1.0e-4"]).pal.frozen is False
    assert load_recipe("pal", ["pal.frozen=false", "training.max_steps=3"]).model.lora is None
    with pytest.raises(ConfigError, match=r"pal\.frozen"):
        load_recipe("pal_lora", ["pal.frozen=true"])
    with pytest.raises(ConfigError, match=r"training\.learning_rat"):
        load_recipe("pal_lora", ["training.learning_rat=1"])
