"""``align eval --suite calibration``: rules, reward models and annotators on pairs with sure and soft labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from align.rewards.pal_model import load_reward_model

Evaluated = Callable[..., tuple[dict[str, Any], str]]
SUITE = ("--suite", "calibration")
ROWS = [
    {"prompt": "Say:", "chosen": " aa", "rejected": " b"},
    {"prompt": "Say:", "chosen": " c", "rejected": " dd", "preference": 0.25},
    {"prompt": "Tell:", "chosen": " ee", "rejected": " f"},
    {"prompt": "Tell:", "chosen": " g", "rejected": " hhh"},
]


def test_rules_and_annotators(evaluated: Evaluated, jsonl: Callable[..., Path], users_rule: str):
    """A rule is as sure as its differences: sigma(1) thrice and sigma(2); at temperature 1000 it is sure of nothing.

    Right: 1, 3/4, 1, 0. The mean Brier score of who is not sure is a quarter.
    """
    unsure = f"annotators={{unsure: {{reward: '{users_rule}', temperature: 1000}}}}"
    found, shown = evaluated(users_rule, unsure, "bins=4", *SUITE, "--data", jsonl(ROWS))
    rule, other = found["models"].values()
    one, two = (float(torch.sigmoid(torch.tensor(x))) for x in (1.0, 2.0))
    assert rule["metrics"]["confidence"]["value"] == pytest.approx((3 * one + two) / 4)
    assert rule["metrics"]["right"]["value"] == pytest.approx(2.75 / 4)
    assert rule["metrics"]["right"]["n"] == 2
    gaps = 3 * abs(one - 2.75 / 3) + two
    assert rule["metrics"]["ece"]["value"] == pytest.approx(gaps / 4)
    assert other["metrics"]["brier"]["value"] == pytest.approx(0.25, abs=1e-3)
    assert [point["n"] for point in rule["reliability"]["equal_width"]] == [3, 1]
    assert {one["metric"] for one in found["comparisons"]} == {"brier", "log_loss"}
    assert found["settings"]["bins"] == 4
    assert "if calibrated" in shown
    assert "has no interval" in shown


def test_a_reward_models_tau_counts(evaluated: Evaluated, jsonl: Callable[..., Path], reward_dirs: dict[str, Path]):
    """The model as itself and as an annotator state the same probabilities, those of ``preference``."""
    name = str(reward_dirs["gpm"])
    found, _ = evaluated(name, f"annotators={{same: '{name}'}}", *SUITE, "--data", jsonl(ROWS))
    own, annotator = found["models"].values()
    model = load_reward_model(name, dtype=torch.float32)
    expected = model.score_pairs(*([row[key] for row in ROWS] for key in ("prompt", "chosen", "rejected"))).tolist()
    for one in (own, annotator):
        assert [row["score"] for row in one["rows"]] == pytest.approx(expected, abs=1e-3)


def test_what_is_refused(refused: Callable[..., str], jsonl: Callable[..., Path], users_rule: str):
    assert "--suite calibration asks models" in refused(*SUITE, "--data", jsonl(ROWS))
    assert "bins" in refused(users_rule, "bins=0", *SUITE, "--data", jsonl(ROWS))
