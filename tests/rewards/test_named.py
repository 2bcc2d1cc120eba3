"""Rewards by name, and what a wrong name says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from align.rewards.named import load_reward


def test_finds_the_function():
    assert load_reward("math:dist") is math.dist


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("everyday_answer", "not of the form module:function"),
        ("align.evals:", "not of the form module:function"),
        ("no_such_module_here:reward", "no module 'no_such_module_here'"),
        ("align.no_such_part.rules:reward", r"no module 'align\.no_such_part'"),
        ("math:dits", "did you mean math:dist"),
        ("math:pi", "is a float, not a function"),
    ],
)
def test_says_what_is_wrong(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


def test_a_missing_dependency_is_not_a_missing_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "needy_reward.py").write_text("import dependency_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="dependency_that_is_not_there"):
        load_reward("needy_reward:score")
