"""Two results against each other: paired and unpaired intervals by hand, directions, and what does not go together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from align.evals.difference import Change, changes, only_in_one, unshared_rows
from align.evals.frontier import point
from align.evals.preference import preference_suite
from align.evals.result import compared_result, suite_result
from align.evals.statistics import Estimate, bootstrap_interval


def of(metrics: dict[str, Estimate], rows: list[dict[str, Any]] | None = None, suite: str = "s") -> dict[str, Any]:
    return suite_result(suite, metrics, rows or [], None)


def one(first: dict[str, Any], second: dict[str, Any], **options: float) -> Change:
    (change,) = changes(first, second, **options)
    return change


def rewards(by: float, ids: str = "row", size: int = 60) -> dict[str, Any]:
    """Accuracy and margin of pairs that differ widely; ``by`` is what each margin has more."""
    chosen = torch.tensor(np.random.default_rng(0).normal(0.5, 5, size=size) + by)
    return preference_suite(chosen, torch.zeros(size, dtype=torch.float64), [f"{ids}{n}" for n in range(size)])


def test_paired_where_rows_are_the_same() -> None:
    """Every margin falls by 0.1, so that is the difference for sure; by the two intervals it could be anything."""
    margin = {change.metric: change for change in changes(rewards(0), rewards(-0.1))}["margin"]
    assert (margin.paired, margin.status) == (True, "worse")
    assert (margin.difference.low, margin.difference.high) == pytest.approx((-0.1, -0.1))
    other = {change.metric: change for change in changes(rewards(0), rewards(-0.1, "other"))}["margin"]
    assert (other.paired, other.status) == (False, "same")
    assert other.difference.low < -1 < 1 < other.difference.high
    assert {change.status for change in changes(rewards(0), rewards(0))} == {"same", "told"}
    assert {c.metric: c.status for c in changes(rewards(0), rewards(1))}["margin"] == "better"


def test_unpaired_by_hand() -> None:
    """0.5 [0.4, 0.7] to 0.6 [0.3, 0.65]: below, 0.3 and 0.2 add to 0.36056; above, 0.05 and 0.1 to 0.1118.

    At 99 % both are 2.5758 / 1.95996 = 1.31423 times that.
    """
    first, second = of({"accuracy": Estimate(0.5, 0.4, 0.7, 9)}), of({"accuracy": Estimate(0.6, 0.3, 0.65, 7)})
    found = one(first, second).difference
    assert (found.value, found.low, found.high, found.n) == pytest.approx((0.1, -0.260555, 0.211803, 7), abs=1e-6)
    wider = one(first, second, level=0.99).difference
    assert (wider.low, wider.high) == pytest.approx((0.1 - 0.473859, 0.1 + 0.146937), abs=1e-5)


def test_coverage_of_unpaired_differences() -> None:
    """Two samples of 80 whose means differ by 0.5: 94.5 % of 300 intervals hold it, as those of each mean do."""
    rng, hits, trials = np.random.default_rng(1), 0, 300
    for _ in range(trials):
        sides = [
            of({"margin": bootstrap_interval(rng.normal(by, 1, 80), resamples=500)}, [{"row_id": n}])
            for n, by in enumerate((0.0, 0.5))
        ]
        found = one(*sides).difference
        hits += found.low <= 0.5 <= found.high
    assert hits / trials == pytest.approx(0.945, abs=4 * (0.945 * 0.055 / trials) ** 0.5)


def test_rows_of_one_prompt_are_not_independent() -> None:
    """Pairs of 40 prompts, three of which are alike each: what differs is paired, and as wide as one pair a prompt."""
    reward = torch.tensor(np.random.default_rng(0).normal(0.2, 1, 40))
    moved = reward + torch.tensor(np.random.default_rng(1).normal(0.3, 1, 40))

    def of_prompts(rewards: torch.Tensor, times: int) -> dict[str, Any]:
        repeated, prompts = rewards.repeat_interleave(times), np.repeat(np.arange(40), times)
        ids = [str(n) for n in range(len(repeated))]
        return preference_suite(repeated, torch.zeros(len(repeated)), ids, groups=prompts.tolist())

    single, threefold = (
        {change.metric: change for change in changes(of_prompts(reward, times), of_prompts(moved, times))}
        for times in (1, 3)
    )
    for metric, change in threefold.items():
        assert (change.paired, change.difference.n) == (True, 40)
        for end in ("value", "low", "high"):
            assert getattr(change.difference, end) == pytest.approx(getattr(single[metric].difference, end))
    assert "group" not in of_prompts(reward, 1)["rows"][0]


def test_rows_that_go_together_in_other_ways() -> None:
    reward, ids = torch.tensor([1.0, 2.0, -1.0, 3.0]), list("abcd")
    one, other = (preference_suite(reward, torch.zeros(4), ids, groups=groups) for groups in ("xxyy", "xyxy"))
    assert all(change.paired for change in changes(one, one))
    assert not any(change.paired for change in changes(one, other))


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("accuracy", 1),
        ("accuracy/Chat Hard", 1),
        ("accuracy/length", 1),
        ("accuracy/ties", 1),
        ("accuracy/unfinished", 1),
        ("accuracy/v1.ties", 1),
        ("ties/accuracy", 0),
        ("rewardbench/Chat", 1),
        ("rmse_price_before", -1),
        ("rmse_seen/unseen", -1),
        ("seen/gain/pal/mean", 1),
        ("unseen/accuracy/ties", 1),
        ("correct_at_24", 1),
        ("reward_after", 1),
        ("length_controlled_win_rate", 1),
        ("auc", 1),
        ("valid", 1),
        ("calls_per_token", -1),
        ("chosen_delta_per_token", 1),
        ("repetition_after", -1),
        ("unfinished_after", -1),
        ("ece", -1),
        ("ece_mass", -1),
        ("frac_chosen_down", -1),
        ("wrong_at_24", -1),
        ("missed", -1),
        ("reward_before", 0),
        ("repetition_before", 0),
        ("ece_if_calibrated", 0),
        ("ties", 0),
        ("kl_to_reference", 0),
        ("best_k_at_cost_1", 0),
        ("rejected_delta", 0),
        ("flavour", None),
        ("flavour/accuracy", None),
        ("task.accuracy", None),
    ],
)
def test_directions(metric: str, direction: int | None) -> None:
    """It rises beyond its interval: better, worse, or told where neither is."""
    change = one(of({metric: Estimate(0.1, 0.1, 0.1, 5)}), of({metric: Estimate(0.3, 0.3, 0.3, 5)}))
    assert change.direction == direction
    assert change.status == {1: "better", -1: "worse", 0: "told", None: "told"}[direction]


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [(0.1, 0.3, "worse"), (0.3, 0.1, "better"), (-0.1, -0.3, "worse"), (-0.3, -0.1, "better"), (-0.1, 0.3, "told")],
)
@pytest.mark.parametrize("metric", ["overconfidence", "length_bias"])
def test_what_is_best_at_0(metric: str, before: float, after: float, status: str) -> None:
    sides = [of({metric: Estimate(value, value, value, 5)}) for value in (before, after)]
    assert one(*sides).status == status


def test_a_result_that_says_its_directions() -> None:
    first, second = of({"t.bits": Estimate(1, 1, 1, 5)}), of({"t.bits": Estimate(2, 2, 2, 5)})
    assert one({**first, "higher_is_better": {"t.bits": False}}, second).status == "worse"
    assert one({**first, "higher_is_better": {"t.bits": True}}, second).status == "better"


def test_without_an_interval() -> None:
    """Told; but a miss of an exact comparison is one more miss."""
    first, second = Estimate(0.9, None, None, 1), Estimate(0.1, None, None, 1)
    assert one(of({"accuracy": first}), of({"accuracy": second})).status == "told"
    assert (
        one(of({"missed": Estimate(0, None, None, 5)}), of({"missed": Estimate(1, None, None, 5)})).status == "worse"
    )


def test_models_by_name() -> None:
    """Those of the same name, and the one that is left on each side; what one lacks is said."""

    def result(**values: float) -> dict[str, Any]:
        models = {name: of({"accuracy": Estimate(value, value, value, 5)}) for name, value in values.items()}
        return compared_result("s", models, [], {"source": "d", "sha256": "1"}, None, None)

    found = changes(result(base=0.5, old=0.6), result(new=0.4, base=0.5))
    assert [(change.model, change.status) for change in found] == [("base", "same"), ("old → new", "worse")]
    assert only_in_one(result(base=0.5, old=0.6), result(base=0.5)) == (["old: not in the second"], [])
    assert only_in_one(result(base=0.5), result(base=0.5, new=0.6)) == ([], ["new: not in the first"])
    with pytest.raises(ValueError, match="no metric in common"):
        changes(result(a=1, b=1), result(c=1, d=1))


def test_metrics_that_one_lacks() -> None:
    """A value that is gone is as a metric that is."""
    one, none = Estimate(0.5, 0.4, 0.6, 5), {"value": None, "low": None, "high": None, "n": 0}
    first, second = of({"accuracy": one, "gain": one}), of({"accuracy": one, "ties": one})
    found = ["gain: not in the second"], ["ties: not in the first"]
    assert only_in_one(first, second) == found
    second["metrics"]["gain"] = none
    assert only_in_one(first, second) == found


def test_rows_that_are_not_shared() -> None:
    first = of({"accuracy": Estimate(0.5, 0.4, 0.6, 3)}, [{"row_id": row} for row in "abc"])
    for rows, said in (
        ("abc", []),
        ("xbc", ["2 rows are in both, of 3 and 3: they are compared unpaired"]),
        ("bca", ["3 rows are in both, in another order, of 3 and 3: they are compared unpaired"]),
        ("abcd", ["3 rows are in both, of 3 and 4: they are compared unpaired"]),
        ("aa", ["1 rows are in both, of 3 and 2: they are compared unpaired"]),
    ):
        second = {**first, "rows": [{"row_id": row} for row in rows]}
        assert unshared_rows(first, second) == said
        assert changes(first, second)[0].paired is False


def test_points_of_frontiers() -> None:
    """Each is compared with the same one of the other run, prompt by prompt; one that is gone is told."""

    def frontier(run: str, by: float, *labels: str) -> dict[str, Any]:
        def at(label: str, less: float) -> dict[str, Any]:
            rows = [{"row_id": f"{n}", "reward": 5.0 * n - less, "kl": 0.1 * n, "tokens": 9} for n in range(8)]
            return point("model", label, rows, "k1")

        points = {"base": [at("base", 0), at("best of 2", by)], run: [at(label, by) for label in labels]}
        models = {name: {"n": 8, "metrics": {}, "points": own} for name, own in points.items()}
        return compared_result("frontier", models, [], {}, "base", None)

    first = frontier("runs/a", 0, "runs/a/checkpoint-2", "runs/a", "runs/a times 0.5")
    second = frontier("runs/b", 0.1, "runs/b/checkpoint-2", "runs/b")
    found = changes(first, second)
    said = {change.model: (change.paired, change.status) for change in found if change.metric == "reward"}
    assert said == {
        "base": (True, "same"),
        "best of 2": (True, "worse"),
        "runs/a/checkpoint-2 → runs/b/checkpoint-2": (True, "worse"),
        "runs/a → runs/b": (True, "worse"),
    }
    assert {change.status for change in found if change.metric == "kl_to_reference"} == {"told"}
    assert only_in_one(first, second) == (["runs/a times 0.5: not in the second"], [])


def test_a_name_that_is_in_the_words_of_a_label() -> None:
    """Runs a and b, what a decoder made of them is compared, nothing is gone."""

    def frontier(base: str, run: str) -> dict[str, Any]:
        rows = [{"row_id": f"{n}", "reward": 1.0 * n, "kl": 0.1, "tokens": 9} for n in range(4)]
        labels = {
            base: {"reference": base, "best-of-n": "best of 2", "smc": "AWRS-SMC, strength 2"},
            run: {"scaling": f"{run} times 0.5", "transfer-q": f"Transfer-Q* with {run}, alpha 0.3", "run": run},
        }
        models = {
            name: {"n": 4, "metrics": {}, "points": [point(kind, label, rows, "") for kind, label in own.items()]}
            for name, own in labels.items()
        }
        return compared_result("frontier", models, [], {}, base, None)

    first, second = frontier("best", "a"), frontier("best", "t")
    assert only_in_one(first, second) == ([], [])
    names = [change.model for change in changes(first, second) if change.metric == "reward"]
    assert names[3:] == [
        "a times 0.5 → t times 0.5",
        "Transfer-Q* with a, alpha 0.3 → Transfer-Q* with t, alpha 0.3",
        "a → t",
    ]
    assert names[:3] == ["best", "best of 2", "AWRS-SMC, strength 2"]


def test_what_does_not_go_together() -> None:
    first = of({"accuracy": Estimate(1, 1, 1, 5)})
    for second, message in (
        ({**first, "suite": "t"}, "different suites, s and t"),
        ({**first, "schema": 99}, "the second is of schema 99"),
        (of({"x": Estimate(1, 1, 1, 5)}), "no metric in common"),
    ):
        with pytest.raises(ValueError, match=message):
            changes(first, second)
    data = [{**first, "data": {"source": name, "sha256": name}} for name in "ab"]
    with pytest.raises(ValueError, match="different data: a and b"):
        changes(*data)
    with pytest.raises(ValueError, match="level is a share"):
        changes(first, first, level=95)
