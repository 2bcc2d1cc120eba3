"""Rows hold what metrics are the means of: of every suite, with rows that go together, on data of all kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from align.evals.answers import compare_answers
from align.evals.calibration import calibration_suite
from align.evals.cycles import cycle_suite
from align.evals.displacement import displacement_suite
from align.evals.generation import compare
from align.evals.goals import goals_suite
from align.evals.judges import Judged, judge_suite
from align.evals.kl import LogRatios
from align.evals.pal import Margins, pal_suite
from align.evals.pluralism import pluralism_suite
from align.evals.preference import compared_preferences, preference_suite
from align.evals.resampling import verifier_metrics
from align.evals.result import suite_result
from align.evals.reward import reward_suite
from align.evals.row_values import column, row_key
from align.evals.sampling import Sample
from align.evals.thumbs import thumbs_suite
from align.losses import PairLogps, SequenceLogps

N = 30
RNG = np.random.default_rng(0)
IDS = [f"row {n}" for n in range(N)]
PROMPTS = [f"prompt {n // 3}" for n in range(N)]
LABELS = RNG.choice([0, 0.5, 0.8, 1], N).tolist()
SCORES = torch.tensor(RNG.normal(0.3, 2, N).round(0))
PARTS = [str(n % 4) for n in range(N)]
PEOPLE = [f"p{n % 7}" for n in range(N)]
GROUPS = {name: "even" if int(name[1]) % 2 == 0 else "odd" for name in set(PEOPLE)} | {"p1": "alone"}


def logps(seed: int) -> PairLogps:
    sides = torch.tensor(np.random.default_rng(seed).normal(-9, 2, (2, N)))
    return PairLogps(*(SequenceLogps(side, torch.arange(1, N + 1)) for side in sides))


def answers(seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    lists = [rng.integers(3, size=rng.integers(1, 9)).tolist() for _ in range(N)]
    return [Sample(tokens, " ".join(map(str, tokens)), bool(tokens[-1])) for tokens in lists]


def length(prompts: Any, completions: Any) -> list[float]:
    return [float(len(text) // 4) for text in completions]


def of_answers() -> dict[str, Any]:
    """One pair was set aside."""
    rewards = {name: [float(len(one.tokens)) for one in answers(seed)] for name, seed in (("a", 1), ("b", 2))}
    ratios = LogRatios(RNG.normal(size=N).tolist(), [4] * N, 1.0)
    wins: list[float | None] = [None, 0.5, *RNG.random(N - 2).tolist()]
    models, _ = compare_answers(IDS, IDS, {"a": answers(1), "b": answers(2)}, "a", {"b": wins}, rewards, {"b": ratios})
    return models["b"]


def of_verifier() -> dict[str, Any]:
    n, good = np.full(N, 6), RNG.integers(7, size=N)
    right, wrong = RNG.binomial(good, 0.7), RNG.binomial(n - good, 0.2)
    names = ("samples", "correct", "passed_correct", "passed_wrong")
    rows = [
        {"row_id": name, **dict(zip(names, map(int, counts), strict=True))}
        | {"ceiling": float(counts[2] / (counts[2] + counts[3])) if counts[2] + counts[3] else None}
        for name, *counts in zip(IDS, n, good, right, wrong, strict=True)
    ]
    return suite_result("resampling", verifier_metrics(n, good, right, wrong), rows, None)


SIDES = (RNG.normal(size=N), np.where(np.arange(N) < 3, np.nan, RNG.normal(size=N)))
GOOD = (RNG.integers(2, size=N), np.where(np.arange(N) < 3, np.nan, RNG.integers(2, size=N)))
WITHOUT_ROWS = {
    "kappa", "unjudged", "longer", "longer_people", "length_bias", "ece", "ece_mass", "ece_if_calibrated",
    "largest_fall", "auc", "worst_annotator", "worst_group", "accuracy/known", "accuracy/new", "completeness",
    "false_positives", "kl_to_reference_per_token", "length_controlled_win_rate", "distinct_1", "distinct_2",
    "distinct_3", "distinct_before", "distinct_after",
} | {f"ceiling{ends}" for ends in ("_3", "_5")}  # fmt: skip
RESULTS: Mapping[str, Any] = {
    "preference, own": lambda: preference_suite(SCORES, SCORES * 0.5, IDS, preference=LABELS, groups=PROMPTS),
    "preference": lambda: compared_preferences(SCORES, IDS, preference=LABELS, groups=PROMPTS, subsets=PARTS),
    "reward": lambda: reward_suite(
        SCORES / 3, IDS, preference=LABELS, groups=PROMPTS, rewards=torch.stack([SCORES, 0 * SCORES], 1)
    ),
    "thumbs": lambda: thumbs_suite(SCORES, torch.arange(N) % 3 == 1, IDS, threshold=1.0, groups=PROMPTS),
    "displacement": lambda: displacement_suite(logps(1), logps(2), IDS, groups=PROMPTS),
    "calibration": lambda: calibration_suite(SCORES, IDS, preference=LABELS, groups=PROMPTS),
    "judges": lambda: judge_suite(
        Judged(RNG.random(N).round(1), RNG.random(N).round(1), RNG.random(N).round(1)),
        LABELS,
        RNG.integers(9, size=(N, 2)),
        IDS,
        groups=PROMPTS,
    ),
    "cycles": lambda: cycle_suite([SCORES[:3], SCORES[3:6], SCORES[6:11]], [["a"], ["b"], ["c"]]),
    "generation, own": lambda: compare(IDS, answers(1), answers(2), length, kl=LogRatios([0.1] * N, [3] * N, 1.0)),
    "generation": of_answers,
    "goals": lambda: goals_suite(IDS, answers(1), answers(2), {"kind": SIDES}, {"kind": GOOD, "all": GOOD}),
    "pluralism": lambda: pluralism_suite(
        RNG.choice([0, 0.5, 1], N), PEOPLE, IDS, groups=GROUPS, known=["p1", "p2"], prompts=PROMPTS
    ),
    "pal": lambda: pal_suite(
        {part: Margins({"pal": SCORES, "one/all": -SCORES, "mean": SCORES + 1}, PEOPLE) for part in ("seen", "new")},
        against=["mean"],
    ),
    "resampling": of_verifier,
}


@pytest.mark.parametrize("name", RESULTS)
def test_every_mean_is_in_the_rows(name: str) -> None:
    """All but extremes, areas and ratios; what goes together is counted as the metric's n counts it."""
    result = RESULTS[name]()
    suite = name.partition(",")[0]
    without = {metric for metric in result["metrics"] if column(suite, metric, result) is None}
    assert without == set(result["metrics"]) & (WITHOUT_ROWS | ({"ceiling"} if suite == "cycles" else set()))
    keys = [row_key(row) for row in result["rows"]]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_what_is_not_the_metrics_mean_is_none() -> None:
    """Rows that were changed, and rows whose groups are not known."""
    result = RESULTS["preference"]()
    assert column("preference", "accuracy", result) is not None
    for row in result["rows"]:
        del row["group"]
    assert column("preference", "accuracy", result) is None
    result = RESULTS["displacement"]()
    result["rows"][0]["chosen_delta"] += 1
    assert column("displacement", "chosen_delta", result) is None
    assert column("displacement", "rejected_delta", result) is not None
    assert row_key({"score": 1.0}) is None
