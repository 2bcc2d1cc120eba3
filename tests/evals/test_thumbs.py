"""The thumbs suite: an AUC by hand, its interval, and rewards that say nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from align.evals.thumbs import auc_interval, thumbs_suite


def test_auc_by_hand() -> None:
    """Ups 1, 3, 3 against downs 2, 3: wins 0 + 0, 1 + 1/2, 1 + 1/2 of 6."""
    found = auc_interval([1, 3, 3, 2, 3], [True, True, True, False, False])
    assert found.value == pytest.approx(3 / 6)
    assert found.n == 5


def test_auc_is_that_of_sklearn() -> None:
    rng = np.random.default_rng(0)
    scores, up = rng.integers(0, 20, 300).astype(float), rng.random(300) < 0.3
    found = auc_interval(scores, up)
    assert found.value == pytest.approx(roc_auc_score(up, scores))


def test_the_interval_does_not_depend_on_the_order_of_the_rows() -> None:
    rng = np.random.default_rng(1)
    scores, up = rng.normal(size=60), rng.random(60) < 0.5
    groups = [f"prompt {n // 2}" for n in range(60)]
    order = rng.permutation(60)
    one = auc_interval(scores, up, groups=groups)
    other = auc_interval(scores[order], up[order], groups=[groups[n] for n in order])
    assert one == other
    assert one.n == 30
    assert auc_interval(scores, up) == auc_interval(scores[order], up[order])


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Normal scores one standard deviation apart: AUC = Phi(1 / sqrt 2) = 0.7602. 95 % of 200 intervals, +- 4 s.d."""
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        up = np.arange(100) < 50
        found = auc_interval(rng.normal(size=100) + up, up, resamples=400)
        held += found.low <= 0.7602 <= found.high
    assert held >= 190 - 4 * np.sqrt(200 * 0.95 * 0.05)


def test_an_area_of_one_by_hand() -> None:
    """Of 8 up and 4 down 4 pairs are apart: 0.025^(1/4) = 0.39764. Of 4 prompts with both, 2 pairs: 0.025^(1/2)."""
    scores, up = np.arange(12.0), np.arange(12) >= 4
    found = auc_interval(scores, up)
    assert (found.value, found.low, found.high, found.n) == (1, pytest.approx(0.397635, abs=1e-6), 1, 12)
    assert auc_interval(-scores, up).high == pytest.approx(1 - 0.397635, abs=1e-6)
    both = auc_interval([0, 5, 1, 6, 2, 7, 3, 8], [False, True] * 4, groups="aabbccdd")
    assert (both.low, both.n) == (pytest.approx(0.025**0.5), 4)


def test_rows_of_one_prompt_are_drawn_together() -> None:
    """Each answer ten times over: rows alone would give an interval that is too narrow by sqrt 10."""
    rng = np.random.default_rng(3)
    scores, up = rng.normal(size=40), np.arange(40) < 20
    single = auc_interval(scores, up)
    tenfold = auc_interval(np.repeat(scores, 10), np.repeat(up, 10), groups=list(np.repeat(np.arange(40), 10)))
    alone = auc_interval(np.repeat(scores, 10), np.repeat(up, 10))
    width = {name: e.high - e.low for name, e in (("single", single), ("tenfold", tenfold), ("alone", alone))}
    assert width["tenfold"] == pytest.approx(width["single"], rel=1e-6)
    assert width["alone"] < 0.5 * width["single"]


def test_one_class_has_no_auc() -> None:
    with pytest.raises(ValueError, match="all 2 rows are positive: an AUC needs both"):
        auc_interval([1, 2], [True, True])


def suite(rewards: list[float], labels: list[int], threshold: float = 0.0, **kwargs):
    ids = [f"row {n}" for n in range(len(rewards))]
    return thumbs_suite(torch.tensor(rewards), torch.tensor(labels).bool(), ids, threshold=threshold, **kwargs)


def test_suite_by_hand() -> None:
    """Threshold 1: of ups 2, 0 and downs 1, -1, right are 2, half of 1, and -1: 2.5 of 4; AUC (2 + 1) / 4."""
    found = suite([2.0, 0.0, 1.0, -1.0], [1, 1, 0, 0], threshold=1.0, settings={"loss": "bco"})
    values = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert values == {"auc": 0.75, "accuracy": 0.625, "reward_up": 1.0, "reward_down": 0.0}
    assert found["rows"][2] == {"row_id": "row 2", "up": False, "reward": 1.0}
    assert found["settings"]["threshold"] == 1.0
    assert found["settings"]["loss"] == "bco"
    assert found["n"] == 4


def test_an_untrained_policy_is_at_one_half() -> None:
    metrics = suite([0.0] * 4, [1, 0, 1, 0])["metrics"]
    assert metrics["auc"]["value"] == metrics["accuracy"]["value"] == 0.5


def test_counts_and_values_are_checked() -> None:
    with pytest.raises(ValueError, match="2 rewards, 2 labels, 1 row ids"):
        thumbs_suite(torch.zeros(2), torch.tensor([True, False]), ["a"], threshold=0.0)
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan"):
        suite([0.0, float("nan")], [1, 0])
    with pytest.raises(ValueError, match="threshold is nan"):
        suite([0.0, 1.0], [1, 0], threshold=float("nan"))
