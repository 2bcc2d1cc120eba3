"""YAML as people expect it."""

from __future__ import annotations

import pytest

from align.config.read import parse_mapping, parse_yaml
from align.errors import ConfigError


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("5e-7", 5e-7),
        ("2.0e-5", 2e-5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", "010"),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("~", None),
        ("", None),
        ("[1, 2.5]", [1, 2.5]),
    ],
)
def test_values_mean_what_they_look_like(written: str, meant: object) -> None:
    found = parse_yaml(written, "r.yaml")
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: [1\nb: 2", "line 2, column 2", "expected ',' or ']'"),
        ("a:\n\tb: 1", "line 2, column 1", "cannot start any token"),
        ("a: 1\nb: {c: 1, c: 2}", "line 2, column 11", "key 'c' stands twice"),
        ("a: 1\na: 2", "line 2, column 1", "key 'a' stands twice"),
        ("1: x", "line 1, column 1", "key 1 is not text"),
        ("!!python/object/apply:os.getcwd []", "line 1, column 1", "could not determine a constructor"),
        ("- 1\n- 2", "file", "is a list"),
        ("", "file", "is empty"),
        ("just words", "file", "is plain text"),
    ],
)
def test_what_is_no_recipe_is_said_with_its_place(text: str, where: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mapping(text, "r.yaml")
    assert caught.value.problems[0][0] == where
    assert what in caught.value.problems[0][1]
