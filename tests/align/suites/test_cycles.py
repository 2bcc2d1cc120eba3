"""``align eval --suite cycles``: rules and preference models on pairs that run in a circle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from align.rewards.pal_model import load_reward_model

Evaluated = Callable[..., tuple[dict[str, Any], str]]
SUITE = ("--suite", "cycles")
ANSWERS = (" a", " bb", " ccc")
ROWS = [{"prompt": "Say:", "chosen": ANSWERS[place], "rejected": ANSWERS[(place + 1) % 3]} for place in range(3)]


def test_a_reward_and_a_preference_model(
    evaluated: Evaluated, jsonl: Callable[..., Path], users_rule: str, reward_dirs: dict[str, Path]
) -> None:
    """Of a over bb over ccc over a the rule of length has the last; the gpm's scores are its own, in the same order.

    The second pair is given the other way round with the label 0.1, and once again; another one is in no circle.
    """
    rows = [dict(row) for row in ROWS]
    rows[1] = {**rows[1], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"], "preference": 0.1}
    rows += [rows[1], {"prompt": "Tell:", "chosen": " yes", "rejected": " no"}]
    found, shown = evaluated(users_rule, reward_dirs["gpm"], *SUITE, "--data", jsonl(rows))
    rule, gpm = found["models"].values()
    assert rule["metrics"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert rule["metrics"]["ceiling"]["value"] == pytest.approx(2 / 3)
    assert (found["n"], found["cycles"]) == (1, {"3": 1})
    model = load_reward_model(str(reward_dirs["gpm"]), dtype=torch.float32)
    (matrix,) = model.score_groups(["Say:"], [ANSWERS])
    expected = {round(float(matrix[place, (place + 1) % 3]), 3) for place in range(3)}
    assert {round(score, 3) for score in gpm["rows"][0]["scores"]} == expected
    assert [one["metric"] for one in found["comparisons"]] == ["accuracy"]
    assert "1 cycles of" in shown
    assert "66.7%" in shown


def test_without_circles(refused: Callable[..., str], jsonl: Callable[..., Path], users_rule: str):
    assert "no pairs run in a circle" in refused(users_rule, *SUITE, "--data", jsonl(ROWS[:2]))
