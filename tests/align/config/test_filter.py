"""The section ``data.filter``: one rule a column, checked with everything else."""

from __future__ import annotations

from typing import Any

import pytest

from align.config.load import config_hash, load_recipe, resolved_yaml
from align.errors import ConfigError


def test_rules_are_read_and_written(write_recipe, held_out, tmp_path):
    rules = {"ches_ln": {"keep": 0.5, "group": "task", "quotas": {"sum": 1}}, "quality": {"above": 3, "below": 9}}
    recipe = load_recipe(write_recipe(data={**held_out, "filter": rules}))
    assert recipe.data.filter is not None
    assert recipe.data.filter["ches_ln"].quotas == {"sum": 1.0}
    assert (recipe.data.filter["quality"].above, recipe.data.filter["quality"].below) == (3.0, 9.0)
    again = tmp_path / "again.yaml"
    again.write_text(resolved_yaml(recipe))
    assert load_recipe(str(again)) == recipe


def test_a_rule_changes_the_run_and_none_does_not(write_recipe, held_out):
    """With another share it is another run; a recipe without a filter resolves to one without."""
    plain, half, third = (
        load_recipe(write_recipe(data=held_out | rules))
        for rules in ({}, {"filter": {"x": {"keep": 0.5}}}, {"filter": {"x": {"keep": 0.3}}})
    )
    assert len({config_hash(recipe) for recipe in (plain, half, third)}) == 3
    assert "filter" not in resolved_yaml(plain)


@pytest.mark.parametrize(
    ("rules", "where", "what"),
    [
        ({"q": {"kep": 0.5}}, "data.filter.q.kep", "unknown key; did you mean data.filter.q.keep?"),
        ({"q": {"keep": 0}}, "data.filter.q.keep", "is 0; it must be over 0"),
        ({"q": {"keep": "half"}}, "data.filter.q.keep", "'half' is not a number"),
        ({"q": 0.5}, "data.filter.q", "0.5 is not a section"),
        ({"q": {}}, "data.filter.q", "has no rule; give one of keep, window, below, above"),
        ({"q": {"keep": 0.5, "window": [0, 1]}}, "data.filter.q", "has keep and window"),
        ({"q": {"above": 2, "below": 1}}, "data.filter.q", "nothing lies between"),
        ({"q": {"window": [0.5]}}, "data.filter.q.window", "it must be [from, to]"),
        ({"q": {"above": 2, "group": "g"}}, "data.filter.q", "group goes with keep and window"),
        ({"q": {"keep": 0.5, "quotas": {"a": 0.5}}}, "data.filter.q", "quotas go with keep"),
        ({"q": {"keep": 0.5, "group": "g", "quotas": {"a": 2}}}, "data.filter.q.quotas.a", "it must be at most 1"),
    ],
)
def test_what_is_refused(write_recipe, held_out, rules: dict[str, Any], where: str, what: str):
    with pytest.raises(ConfigError) as caught:
        load_recipe(write_recipe(data={**held_out, "filter": rules}))
    ((found, said),) = caught.value.problems
    assert found == where
    assert what in said


def test_keys_of_rules_are_not_offered_elsewhere(write_recipe):
    with pytest.raises(ConfigError, match=r"keep +unknown key; known here"):
        load_recipe(write_recipe(keep=0.5))
