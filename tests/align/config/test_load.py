"""Recipes: read, merged, checked, resolved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.config.load import config_hash, load_recipe, resolved_yaml, shipped_recipes
from align.data.load import SUFFIXES
from align.errors import ConfigError

Write = Callable[..., str]


def problems(source: str, *overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(source, overrides)
    return dict(caught.value.problems)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.model.name == "smollm2-135m-instruct") is not name.endswith("_large")
    assert recipe.output == f"runs/{name}"
    of_kind = {"completions": ["generation"], "thumbs": ["thumbs", "generation"], "judgements": ["pal"]}
    of_kind["prompts"] = ["generation", "goals"] if recipe.grpo is not None else ["generation"]
    pairs = ["preference", "generation", "displacement"] if recipe.reward is None else ["reward"]
    if name.startswith("reward_cycles"):
        pairs = ["cycles"]
    assert recipe.evals == {"ratings": ["reward"], **of_kind}.get(recipe.data_kind, pairs)
    if "generation" in recipe.evals:
        assert recipe.generation.reward == "align.rewards.rules:everyday_answer"


def test_shipped_recipes_are_all_there() -> None:
    assert {"quickstart", "sft", "simpo", "dpo_full", "combined", "bco", "kto"} <= set(shipped_recipes())


def test_defaults_are_filled_in(write_recipe: Write) -> None:
    """LN-DPO's default beta is 5; without held-out data there is nothing to evaluate on."""
    recipe = load_recipe(write_recipe())
    assert recipe.loss == {"beta": 5.0}
    assert recipe.model.name == "some/model"
    assert recipe.evals == []
    assert [(term.name, term.weight, term.settings) for term in recipe.terms] == [("ln_dpo", 1.0, {"beta": 5.0})]


def test_terms_of_a_sum_get_their_own_defaults(write_recipe: Write) -> None:
    """DPO's default beta is 0.1; SimPO's are beta 2 and gamma 1; SFT has no settings."""
    losses = [{"name": "dpo", "weight": 0.5}, {"name": "simpo", "beta": 4.0}, {"name": "sft"}]
    recipe = load_recipe(write_recipe(method=None, losses=losses))
    settings = [(term.name, term.weight, term.settings) for term in recipe.terms]
    dpo, simpo = {"beta": 0.1, "label_smoothing": 0.0}, {"beta": 4.0, "gamma": 1.0}
    assert settings == [("dpo", 0.5, dpo), ("simpo", 1.0, simpo), ("sft", 1.0, {})]


def test_all_problems_at_once_in_the_published_look(write_recipe: Write) -> None:
    source = write_recipe(loss={"betaa": 2.0}, training={"max_steps": "many"})
    with pytest.raises(ConfigError) as caught:
        load_recipe(source)
    assert str(caught.value) == (
        f"{source}: 2 problems\n"
        "  loss.betaa          unknown key; did you mean loss.beta?\n"
        "  training.max_steps  'many' is not a whole number"
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("keys", "where", "what"),
    [
        ({"metod": "dpo"}, "metod", "did you mean method?"),
        ({"max_length": 8}, "max_length", "did you mean data.max_length?"),
        ({"model": {"name": "a/b", "dtype": "bf16"}}, "model.dtype", "'bf16' is not one of auto, float32"),
        ({"model": {"name": "a/b", "dtype": "bfloat"}}, "model.dtype", "did you mean bfloat16?"),
        ({"model": {"name": "a/b", "lora": {"r": 0}}}, "model.lora.r", "is 0; it must be at least 1"),
        ({"model": {"name": "a/b", "lora": {"r": 16.0}}}, "model.lora.r", "write 16"),
        ({"model": {"name": "a/b", "lora": {"r": True}}}, "model.lora.r", "true is not a whole number"),
        ({"model": {"name": "a/b", "lora": {"target_modules": 3}}}, "model.lora.target_modules", "text or a list"),
        ({"model": {"dtype": "auto"}}, "model.name", "is missing"),
        ({"model": "./nowhere"}, "model.name", "no such folder: './nowhere'"),
        ({"model": {"name": "a/b", "adapter": "./nowhere"}}, "model.adapter", "no such folder"),
        ({"data": None}, "data", "is missing"),
        ({"data": {"train": "pears.jsonl"}}, "data.train", "no such file or folder: 'pears.jsonl'"),
        ({"data": {"train": "align:quickstart/nowhere"}}, "data.train", "no data set 'align:quickstart/nowhere'"),
        ({"method": "dpoo"}, "method", "'dpoo' is not a known method; did you mean dpo?"),
        ({"method": None}, "method, losses", "neither is given"),
        ({"losses": [{"name": "dpo"}]}, "method, losses", "both are given"),
        ({"method": "sft", "loss": {"beta": 1.0}}, "loss.beta", "method sft has no such setting"),
        ({"loss": {"beta": "x"}}, "loss.beta", "'x' is not a number"),
        ({"loss": {"beta": -1.0}}, "loss", "beta is -1.0: it must be positive"),
        (
            {"method": "dpo", "loss": {"label_smoothing": 0.5}},
            "loss",
            "label_smoothing is 0.5: a share of wrong labels",
        ),
        ({"method": "r_dpo", "loss": {"alpha": "short"}}, "loss.alpha", "'short' is not a number"),
        ({"loss": {"gamma": 1.0}}, "loss.gamma", "ln_dpo has no such setting; it has: beta"),
        ({"method": None, "losses": [{"name": "ipoo"}]}, "losses.0.name", "did you mean ipo?"),
        ({"method": None, "losses": [{"name": "dpo", "beat": 1}]}, "losses.0.beat", "did you mean losses.0.beta?"),
        ({"method": None, "losses": [{"name": "dpo", "weight": 0}]}, "losses.0.weight", "must be at least 1e-12"),
        ({"evals": ["preference"]}, "evals", "need held-out data"),
        ({"base": 3}, "base", "is not the name of a recipe"),
    ],
)
def test_a_problem_is_named_with_its_key(write_recipe: Write, keys: dict[str, Any], where: str, what: str) -> None:
    assert what in problems(write_recipe(**keys))[where]


def test_a_file_with_a_similar_name_is_offered(write_recipe: Write, tmp_path: Path) -> None:
    source = write_recipe(data={"train": str(tmp_path / "pars.jsonl")})
    assert problems(source)["data.train"].endswith(f"did you mean {tmp_path / 'pairs.jsonl'}?")


def test_a_reward_that_cannot_be_imported(write_recipe: Write, held_out: dict[str, str]) -> None:
    found = problems(write_recipe(data=held_out, generation={"reward": "json:lods"}))
    assert "did you mean json:load" in found["generation.reward"]


@pytest.mark.parametrize(
    ("method", "generation", "evals"),
    [
        ("dpo", None, ["preference", "displacement"]),
        ("dpo", {"prompts": 8}, ["preference", "displacement"]),
        ("dpo", {"reward": "math:sqrt"}, ["preference", "generation", "displacement"]),
        ("sft", None, []),
        ("sft", {"reward": "math:sqrt"}, ["generation"]),
    ],
)
def test_answers_are_scored_by_default_only_with_a_reward_of_the_recipe(
    write_recipe: Write, held_out: dict[str, str], method: str, generation: dict[str, Any] | None, evals: list[str]
) -> None:
    recipe = load_recipe(write_recipe(data=held_out, method=method, generation=generation))
    assert recipe.evals == evals


def test_generation_asked_for_without_a_reward(write_recipe: Write, held_out: dict[str, str]) -> None:
    found = problems(write_recipe(data=held_out, evals=["generation"]))
    assert found["generation.reward"].startswith("name a function that scores answers, as module:function")


@pytest.mark.parametrize(
    ("method", "idle"),
    [
        ("dpo", []),
        ("bradley_terry", []),
        ("sft", ["shared_prompt", "packing", "reference_cache"]),
        ("bco", ["shared_prompt", "packing", "reference_cache"]),
        ("gpo", ["reference_cache"]),
    ],
)
def test_a_switch_that_changes_nothing(
    write_recipe: Write, held_out: dict[str, str], method: str, idle: list[str]
) -> None:
    off = dict.fromkeys(("shared_prompt", "packing", "reference_cache"), False)
    recipe = write_recipe(method=method, data={"train": held_out["train"], **off}, evals=[])
    found = problems(recipe) if idle else {}
    assert list(found) == [f"data.{key}" for key in idle]
    assert all(text.startswith(f"changes nothing for method: {method}, ") for text in found.values())
    if not idle:
        assert not load_recipe(recipe).data.packing


def test_training_data_is_not_held_out_data(write_recipe: Write, held_out: dict[str, str]) -> None:
    found = problems(write_recipe(data={**held_out, "eval": held_out["train"]}))
    assert found == {"data.eval": "the same as data.train; held-out data must be other data"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_of_a_kind_that_can_be_read_is_no_hub_id(write_recipe: Write, suffix: str) -> None:
    found = problems(write_recipe(data={"train": f"nowhere/pairs{suffix}"}))
    assert found["data.train"] == f"no such file or folder: 'nowhere/pairs{suffix}'"


def test_overrides_reach_every_key(write_recipe: Write) -> None:
    source = write_recipe(method=None, losses=[{"name": "dpo"}])
    recipe = load_recipe(source, ["losses.0.beta=5e-1", "model=other/model", "model.lora.r=4", "resume=never"])
    assert recipe.terms[0].settings == {"beta": 0.5, "label_smoothing": 0.0}
    assert recipe.model.name == "other/model"
    assert recipe.model.lora is not None
    assert recipe.model.lora.r == 4
    assert recipe.resume == "never"


def test_overrides_that_cannot_be_set(write_recipe: Write) -> None:
    source = write_recipe(method=None, losses=[{"name": "dpo"}])
    found = problems(source, "resume", "losses.0.beta=[", "losses.7.beta=1")
    assert found["resume"] == "is not key=value, such as loss.beta=2"
    assert found["losses.0.beta"].startswith("'[' is not YAML")
    assert found["losses.7.beta"].startswith("cannot be set")
    assert "did you mean data.train?" in problems(source, "data.trian=x")["data.trian"]


def test_a_base_gives_what_the_recipe_leaves_open(write_recipe: Write) -> None:
    write_recipe("parent.yaml", loss={"beta": 3.0}, model={"name": "a/b", "lora": {"r": 4}})
    child = write_recipe("child.yaml", base="parent.yaml", model="c/d", data=None)
    recipe = load_recipe(child)
    assert recipe.loss == {"beta": 3.0}
    assert recipe.model.name == "c/d"
    assert recipe.model.lora is not None
    assert recipe.model.lora.r == 4
    assert recipe.data.train.endswith("pairs.jsonl")


JUDGE = {"judge": {"url": "http://localhost:8000", "model": "some/judge"}}


@pytest.mark.parametrize(("recipe", "section"), [("ipo_md", "online"), ("gpo_iterated", "iterate")])
def test_an_annotator_of_another_kind_takes_the_place_of_the_old_one(
    recipe: str, section: str, tmp_path: Path
) -> None:
    """Whole, with the section or alone, by override or over a base; what stands beside it merges as ever."""
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"base": recipe, section: {"annotator": JUDGE, "answers": 3}}))
    for loaded in (
        load_recipe(str(child)),
        load_recipe(recipe, [f"{section}.annotator={json.dumps(JUDGE)}", f"{section}.answers=3"]),
        load_recipe(recipe, [f"{section}={json.dumps({'annotator': JUDGE, 'answers': 3})}"]),
    ):
        found = getattr(loaded, section)
        assert found.annotator == JUDGE
        assert (found.answers, found.max_new_tokens) == (3, 48)
    kept = getattr(load_recipe(recipe, [f"{section}.annotator.temperature=0.3"]), section).annotator
    assert kept == {"reward": "align.rewards.rules:everyday_answer", "temperature": 0.3}
    named = load_recipe(str(child), [f"{section}.annotator.judge.retries=1"])
    assert getattr(named, section).annotator == {"judge": {**JUDGE["judge"], "retries": 1}}
    keys = [f"{section}.annotator.judge.{key}={value}" for key, value in JUDGE["judge"].items()]
    assert problems(recipe, *keys)[f"{section}.annotator"].startswith("has reward and judge: give one")
    gone = [f"{section}.annotator.reward=null", f"{section}.annotator.temperature=null"]
    assert load_recipe(recipe, [*gone, *keys])


def test_another_expression_of_rewards_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    rule = "align.rewards.rules:everyday_answer"
    old, new = {"raw_sum": [{"reward": rule}]}, {"lsc": {"reward": rule, "reference": 0.5}}
    source = tmp_path / "old.yaml"
    source.write_text(yaml.safe_dump({"base": "grpo_lsc", "grpo": {"rewards": old}}))
    found = [load_recipe(str(source)), load_recipe(str(source), [f"grpo.rewards={json.dumps(new)}"])]
    assert [recipe.grpo.rewards for recipe in found if recipe.grpo] == [old, new]


def test_a_base_has_no_base(write_recipe: Write) -> None:
    write_recipe("grandparent.yaml")
    write_recipe("parent.yaml", base="grandparent.yaml")
    assert "one level is the limit" in problems(write_recipe("child.yaml", base="parent.yaml"))["base"]


def test_sources_that_are_no_recipe(tmp_path: Path) -> None:
    assert "did you mean simpo?" in problems("simpoo")["recipe"]
    assert "is a folder" in problems(str(tmp_path))["recipe"]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in problems(str(tmp_path / "binary.yaml"))["file"]


def test_the_resolved_recipe_reads_back(write_recipe: Write, tmp_path: Path) -> None:
    losses = [{"name": "ln_dpo", "beta": 2}, {"name": "sft", "weight": 0.2}]
    model = {"name": "a/b", "lora": {"r": 4}}
    recipe = load_recipe(write_recipe(method=None, losses=losses, model=model, tracking={"wandb": {"group": "g"}}))
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe(str(tmp_path / "resolved.yaml")) == recipe


def test_the_hash_follows_what_changes_the_result(write_recipe: Write) -> None:
    source = write_recipe(loss={"beta": 2.0})
    base = config_hash(load_recipe(source))
    same = config_hash(load_recipe(source, ["output=elsewhere", "resume=never", "tracking.wandb.mode=offline"]))
    assert same == base == config_hash(load_recipe(source, ["loss.beta=2"]))
    assert config_hash(load_recipe(source, ["loss.beta=2.5"])) != base
    assert config_hash(load_recipe(source, ["data.max_length=512"])) != base
