"""``align eval --suite constrained``, on random tiny models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SUITE = ("--suite", "constrained", "--data")
SMALL = ("prompts=3", "max_new_tokens=8", "particles=4")


@pytest.fixture
def prompts(jsonl: Callable[..., Path]) -> Path:
    """Three prompts, each with a constraint of its own that one answer satisfies, and what a rule asks for."""
    return jsonl([{"prompt": f"the {word}", "own": f"regex:{word}"} for word in ("cat", "hint", "then")])


def test_methods_of_a_model(
    evaluated: Callable[..., Any], tiny_model_dir: Path, prompts: Path, users_rule: str, tmp_path: Path
) -> None:
    """By a constraint all answers are valid, by none none; the exact probability of it is the normaliser's mean."""
    words = (tiny_model_dir, "constraint=regex:[a-z]{1,3}", f"reward={users_rule}", *SMALL, *SUITE, prompts)
    found, shown = evaluated(*words)
    names = [f"{tiny_model_dir} · {method}" for method in ("plain", "awrs-smc", "awrs", "mask")]
    assert list(found["models"]) == names
    plain, smc, awrs, mask = found["models"].values()
    assert plain["metrics"]["valid"]["value"] == 0
    assert "reward" not in plain["metrics"]
    for one in (smc, awrs, mask):
        assert one["metrics"]["valid"]["value"] == 1
        assert one["metrics"]["ess"]["value"] <= 4
        assert one["metrics"]["log_normaliser"]["value"] < 0
        for row in one["rows"]:
            assert row["reward"] == len(row["text"]) <= 3
            mean = sum(math.exp(w) for w in row["log_weights"] if w is not None) / 4
            assert math.log(mean) == pytest.approx(row["log_normaliser"])
    against = {(one["metric"], one["against"]) for one in found["comparisons"] if one["model"] == names[2]}
    assert against == {(metric, names[0]) for metric in ("valid", "tokens")} | {
        (metric, names[1]) for metric in ("log_normaliser", "reward")
    }
    assert "log Z" in shown
    before = (tmp_path / "result.answers.jsonl").read_text()
    assert evaluated(*words)[0] == found
    assert (tmp_path / "result.answers.jsonl").read_text() == before


def test_a_constraint_of_each_row(evaluated: Callable[..., Any], tiny_model_dir: Path, prompts: Path) -> None:
    found, _ = evaluated(tiny_model_dir, "constraint_field=own", "methods=[mask]", *SMALL, *SUITE, prompts)
    (rows,) = (model["rows"] for model in found["models"].values())
    assert [row["text"] for row in rows] == ["cat", "hint", "then"]


def test_what_cannot_be_asked(refused: Callable[..., str], tiny_model_dir: Path, prompts: Path) -> None:
    assert "constraint is missing" in refused(tiny_model_dir, *SUITE, prompts)
    assert "constraint" in refused(tiny_model_dir, "constraint=regex:(", *SUITE, prompts)
    assert "methods" in refused(tiny_model_dir, "constraint=regex:a", "methods=[magic]", *SUITE, prompts)
    assert "it has no prompt that can be used" in refused(tiny_model_dir, "constraint_field=absent", *SUITE, prompts)
