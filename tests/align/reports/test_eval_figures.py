"""Pictures of results of ``align eval``, as the suites make them: what is drawn, and how it can be told apart."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from align.evals.frontier import point
from align.evals.judges import Judged, judge_suite
from align.evals.pluralism import pluralism_suite
from align.evals.result import compared_result, suite_result
from align.evals.statistics import share_interval
from align.reports.drawing import Picture
from align.reports.eval_figures import result_images, result_pictures
from align.suites.resampling import Counts, Settings, _measured

RNG = np.random.default_rng(0)


def several(suite: str, models: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return compared_result(suite, models, [], {"source": "d"}, None, {}, **extra)


def pictures(result: dict[str, Any]) -> dict[str, Picture]:
    return {picture.title: picture for picture in result_pictures(result)}


def labels(picture: Picture) -> list[str]:
    return picture.figure.axes[0].get_legend_handles_labels()[1]


def frontier(*runs: str) -> dict[str, Any]:
    def at(kind: str, label: str, reward: float) -> dict[str, Any]:
        rows = [{"row_id": f"r{i}", "reward": reward + i, "kl": i + 0.5, "tokens": 9} for i in range(3)]
        return point(kind, label, rows, "k1")

    points = {"base": [at("reference", "base", 0)]}
    points |= {run: [at("checkpoint", f"{run}/checkpoint-2", 1), at("run", run, 2)] for run in runs}
    models = {name: {"n": 3, "metrics": {}, "points": own} for name, own in points.items()}
    return compared_result("frontier", models, [], {"source": "d"}, "base", {}, notes=[])


def test_runs_of_a_frontier_can_be_told_apart() -> None:
    """One colour and marker a kind; the markers of each run are filled in their own way."""
    (picture,) = result_pictures(frontier("runs/a", "runs/b", "runs/c"))
    lines = [bars.lines[0] for bars in picture.figure.axes[0].containers]
    assert labels(picture) == ["reference", "training, a", "training, b", "training, c"]
    assert len({line.get_color() for line in lines[1:]}) == len({line.get_marker() for line in lines[1:]}) == 1
    assert [line.get_fillstyle() for line in lines] == ["full", "full", "none", "left"]


def test_an_image_is_on_white_and_the_page_behind_the_drawing() -> None:
    """Whatever the tracker's or the reader's background; the drawing of the page stays as it was."""
    (image,), (picture,) = result_images(frontier("runs/a")), result_pictures(frontier("runs/a"))
    pixels = imread(io.BytesIO(image.png))
    assert pixels[0, 0].tolist() == [1, 1, 1, 1]
    assert pixels[..., 3].min() == 1
    picture.png()
    assert picture.figure.patch.get_alpha() == 0


def test_pluralism_shows_each_annotator() -> None:
    right, who = RNG.choice([0.0, 1.0], 60), [f"p{n % 9}" for n in range(60)]
    one = pluralism_suite(right, who, [str(n) for n in range(60)], groups={name: name[-1:] for name in set(who)})
    found = pictures(several("pluralism", {"a": one, "b": one}))
    assert list(found) == ["Whom rewards serve", "Annotators", "Accuracy by group"]
    assert "% of an annotator's judgements" in str(found["Annotators"].svg)
    (first, _) = (patch.get_data().values for patch in found["Annotators"].figure.axes[0].patches[::2])
    assert sum(first) == 9


@pytest.mark.parametrize("asked", [True, False])
def test_position_where_an_order_was_seen(asked: bool) -> None:
    said = RNG.random((3, 20)).round(1)
    judged = Judged(said[0], *said[1:]) if asked else Judged(said[0])
    one = judge_suite(judged, RNG.choice([0.0, 1.0], 20), RNG.integers(9, size=(20, 2)), [str(n) for n in range(20)])
    found = pictures(several("judges", {"j": one}))
    assert list(found) == ["Agreement with people", "Longer answers chosen", *(["Position"] if asked else [])]
    assert not asked or labels(found["Position"]) == ["the first one chosen", "the order decides"]


def test_resampling_shows_intervals_the_ceiling_and_the_best_number() -> None:
    problems = [
        Counts(8, correct, min(correct, 3), min(8 - correct, n % 2)) for n, correct in enumerate([0, 2, 5, 8, 3])
    ]
    models, _ = _measured(problems, list("abcde"), 8, Settings(costs=[1.0]))
    found = pictures(several("resampling", {"m": models}))
    assert list(found) == ["Right answers by samples", "Worth at cost 1"]
    right, worth = (picture.figure.axes[0] for picture in found.values())
    assert len(right.collections) == 2, "a band a curve"
    ceiling = right.lines[-1]
    assert set(ceiling.get_ydata()) == {models["metrics"]["ceiling"]["value"]}
    best = models["best"]["1"]
    ring = worth.lines[-1]
    assert (ring.get_fillstyle(), list(ring.get_xdata())) == ("none", [best["k"]["value"]])
    assert list(ring.get_ydata()) == pytest.approx([best["utility"]["value"]])
    assert f"m {best['k']['value']} (" in found["Worth at cost 1"].caption


def of_shares(suite: str, **columns: Sequence[float]) -> dict[str, Any]:
    return suite_result(suite, {name: share_interval(column) for name, column in columns.items()}, [], None)


def test_constrained() -> None:
    plain = of_shares("constrained", valid=[0, 1, 0])
    awrs = of_shares("constrained", valid=[1, 1, 1], log_normaliser=[0.5, 0.5, 0.25])
    found = pictures(several("constrained", {"m · plain": plain, "m · awrs": awrs}))
    assert list(found) == ["Valid answers", "Log-probability"]
    assert [text.get_text() for text in found["Log-probability"].figure.axes[0].get_yticklabels()] == ["m · awrs"]


def test_tasks() -> None:
    """Shares alone: perplexities are on scales of their own."""
    one = of_shares("lm-eval", **{"t.acc": [1, 0, 1], "u.acc": [1, 1, 1]})
    one["metrics"]["t.perplexity"] = {"value": 9.0, "low": 8.0, "high": 12.0, "n": 3}
    one["metrics"]["t.f1"] = {"value": 0.5, "low": None, "high": None, "n": 3}
    (picture,) = result_pictures(several("lm-eval", {"a": one, "b": one}))
    assert [text.get_text() for text in picture.figure.axes[0].get_yticklabels()] == ["t.acc", "u.acc"]
    one["metrics"] = {"t.perplexity": one["metrics"]["t.perplexity"]}
    assert result_pictures(several("lm-eval", {"a": one})) == []
