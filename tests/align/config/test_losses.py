"""``method``, ``losses`` and ``loss`` of a recipe, formulas among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from align.config.json_schema import recipe_schema
from align.config.kinds import reward_kind
from align.config.load import load_recipe, resolved_yaml
from align.config.losses import with_implied_method
from align.errors import ConfigError
from align.losses import LOSSES, LogicLoss
from align.trainers.build import losses_of

Write = Callable[..., str]
ORPO = {"logic": "implies(M(l), M(w))", "where": "xor(M(w), M(l))"}


def problems(source: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(source)
    return dict(caught.value.problems)


@pytest.mark.parametrize("method", ["logic", None])
def test_a_formula_in_a_recipe(write_recipe: Write, method: str | None) -> None:
    """The formula alone implies method: logic; its settings have their defaults; the loss is LogicLoss's."""
    recipe = load_recipe(write_recipe(method=method, loss=ORPO))
    assert recipe.method == "logic"
    assert recipe.loss == {**ORPO, "also": "false", "f": "logistic", "beta": 1.0, "norm": "mean"}
    (loss,) = losses_of(recipe)
    assert loss.settings == LogicLoss(**ORPO).settings
    assert not loss.reference


def test_the_resolved_recipe_reads_back(write_recipe: Write, tmp_path) -> None:
    recipe = load_recipe(write_recipe(method=None, loss={**ORPO, "f": "hinge", "beta": 2}))
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe(str(tmp_path / "resolved.yaml")) == recipe


def test_a_formula_as_a_term(write_recipe: Write) -> None:
    losses = [{"name": "logic", **ORPO, "weight": 0.1}, {"name": "sft"}]
    first, _ = losses_of(load_recipe(write_recipe(method=None, losses=losses)))
    assert (first.info.name, first.weight, first.settings["logic"]) == ("logic", 0.1, ORPO["logic"])


def test_only_a_recipe_without_method_and_losses_gets_one() -> None:
    assert with_implied_method({"loss": ORPO})["method"] == "logic"
    assert with_implied_method({"loss": ORPO, "method": "dpo"})["method"] == "dpo"
    assert "method" not in with_implied_method({"loss": ORPO, "losses": [{"name": "dpo"}]})
    assert "method" not in with_implied_method({"loss": {"beta": 1.0}})
    assert "method" not in with_implied_method({"loss": "logic"})


@pytest.mark.parametrize(
    ("loss", "where", "what"),
    [
        (
            {"logic": "implies(M(l), M(x))"},
            "loss.logic",
            "column 17: M takes w, l or the number of an answer, from 1, not 'x'\n"
            "    implies(M(l), M(x))\n                    ^",
        ),
        ({"logic": "M(w)", "where": "M(w) &"}, "loss.where", "column 7: the formula ends where a part of it is"),
        ({"logic": "M(w)", "also": "M(w)) "}, "loss.also", "column 5: ')' comes after the end"),
        ({"logic": "M(w) | ~M(w)"}, "loss.logic", "is a tautology: no world makes it false"),
        ({"logic": "M(w)", "where": "false"}, "loss.where", "is true in no world"),
        ({"logic": "M(1) & M(3)"}, "loss", "the formula names M(3), and there are 2 answers to a prompt"),
        ({"logic": True}, "loss.logic", "true is not text"),
        ({"logic": "M(w)", "f": "logistc"}, "loss.f", "'logistc' is not a known value; did you mean logistic?"),
        ({"logic": "M(w)", "norm": "avg"}, "loss.norm", "'avg' is not one of mean, sum"),
        ({"logic": "M(w)", "beta": "x"}, "loss.beta", "'x' is not a number"),
        ({"logic": "M(w)", "beta": 0.0}, "loss", "beta is 0.0: it must be positive"),
        ({"logic": "M(w)", "wheer": "true"}, "loss.wheer", "unknown key; did you mean loss.where?"),
    ],
)
def test_a_problem_of_a_formula_is_named_with_its_key(
    write_recipe: Write, loss: dict[str, Any], where: str, what: str
) -> None:
    found = problems(write_recipe(method=None, loss=loss))
    assert list(found) == [where]
    assert what in found[where]


def test_a_term_names_its_place(write_recipe: Write) -> None:
    found = problems(write_recipe(method=None, losses=[{"name": "dpo"}, {"name": "logic", "logic": "M(w) M(l)"}]))
    assert found["losses.1.logic"].startswith("column 6: 'M' comes after the end of the formula")


def test_a_missing_formula(write_recipe: Write) -> None:
    assert problems(write_recipe(method="logic")) == {"loss.logic": "is missing"}


def test_a_formula_that_prefers_the_loser_is_one_plain_line_in_the_log(
    write_recipe: Write, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    load_recipe(write_recipe(method=None, loss={"logic": "M(w)->M(l)"}))
    assert caplog.messages == [
        "loss: logic 'M(w)->M(l)' is not monotone: rho falls with M(w); rho rises with M(l); "
        "training can lower the winner"
    ]
    assert not [one for one in recwarn if "monotone" in str(one.message)]


def test_every_loss_on_pairs_or_thumbs_passes_with_its_defaults(write_recipe: Write) -> None:
    for name, info in LOSSES.items():
        if info.kind in ("pair", "thumbs") and name not in ("logic", "sft"):
            assert load_recipe(write_recipe(method=name)).method == name


@pytest.mark.parametrize("kind", ["ranking", "reward"])
def test_other_losses_say_where_they_are_used(write_recipe: Write, kind: str) -> None:
    names = [name for name, info in LOSSES.items() if info.kind == kind and reward_kind(name) is None]
    assert names
    words = {"ranking": "recipes train on pairs or thumbs", "reward": "reward or"}[kind]
    for name in names:
        found = problems(write_recipe(method=name))["method"]
        assert words in found
        assert found.endswith(f"call it from Python (align.losses.{name})")
        assert words in problems(write_recipe(method=None, losses=[{"name": name}]))["losses.0.name"]


def test_losses_on_answers_of_the_policy(write_recipe: Write) -> None:
    """Two need answers as they are drawn; the others also learn from groups of the data. None is part of a sum."""
    for name in ("mdpo", "nash_md_pg"):
        assert problems(write_recipe(method=name, loss={}))["method"].endswith("it takes section online")
    for name in ("gpo", "gpo_pointwise", "sppo", "sppo_pointwise"):
        assert load_recipe(write_recipe(method=name, loss={})).data_kind == "groups"
        found = problems(write_recipe(method=None, losses=[{"name": name}]))["losses.0.name"]
        assert found == f"{name} learns from groups of answers and stands alone; write method: {name}"


@pytest.mark.parametrize("name", ["bco", "kto"])
def test_a_setting_of_a_thumbs_loss_out_of_range(write_recipe: Write, name: str) -> None:
    assert problems(write_recipe(method=name, loss={"beta": -1.0}))["loss"] == "beta is -1.0: it must be positive"


def test_the_json_schema_knows_the_types_of_settings() -> None:
    schema = recipe_schema()
    loss = schema["properties"]["loss"]["properties"]
    assert loss["logic"] == {"type": "string"}
    assert loss["f"]["enum"] == ["logistic", "squared", "hinge", "rrhf"]
    assert {"logic", "bco", "dpo"} <= set(schema["properties"]["method"]["enum"])
    assert "plackett_luce" not in schema["properties"]["method"]["enum"]
    assert "bco" not in schema["$defs"]["LossTerm"]["properties"]["name"]["enum"]
