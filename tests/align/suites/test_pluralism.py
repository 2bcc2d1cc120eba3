"""``align eval --suite pluralism``: rewards for all and a PAL model on judgements of people who disagree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Evaluated = Callable[..., tuple[dict[str, Any], str]]
SUITE = ("--suite", "pluralism")
YES, NO = " yes yes", " no"


def judgements(**likes: bool) -> list[dict[str, Any]]:
    """Six each, of one pair; the column camp is in the annotator's name."""
    return [
        {
            "prompt": "Say:",
            "chosen": YES if yes else NO,
            "rejected": NO if yes else YES,
            "annotator": name,
            "camp": "left" if yes else "right",
        }
        for name, yes in likes.items()
        for _ in range(6)
    ]


def test_pal_against_one_reward(evaluated: Evaluated, jsonl: Callable[..., Path], pal_dir: Path, users_rule: str):
    """Ann and bob want opposite things: each has their own weights; the rule of length serves ann alone.

    Eve, who is new, has the mean weights, which prefer neither answer; she likes yes. Heaviest prototypes: ann's 1,
    bob's 2; of the mean, with both as heavy, the first.
    """
    rows = judgements(ann=True, bob=False, eve=True)
    data = jsonl([*rows, rows[0] | {"preference": 0.5}])
    found, shown = evaluated(users_rule, pal_dir, *SUITE, "--data", data)
    rule, mean, pal = found["models"].values()
    assert list(found["models"])[1:] == [f"{pal_dir}@mean", str(pal_dir)]
    assert rule["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert (rule["metrics"]["worst_annotator"]["value"], rule["worst"]["annotator"]) == (0, "bob")
    assert pal["metrics"]["accuracy/known"]["value"] == 1
    assert {row["right"] for row in pal["rows"] if row["annotator"] != "eve"} == {1}
    of_eve = [{row["right"] for row in one["rows"] if row["annotator"] == "eve"} for one in (mean, pal)]
    assert of_eve[0] == of_eve[1]
    assert found["groups"] == {"ann": "prototype 1", "bob": "prototype 2", "eve": found["groups"]["eve"]}
    prototypes = found["prototypes"][str(pal_dir)]
    assert prototypes["mean"] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert (prototypes["annotators"], prototypes["known"]) == (3, 2)
    assert prototypes["weights"]["ann"][0] > 0.9
    against = [(one["model"], one["against"]) for one in found["comparisons"]]
    assert against == [
        (f"{pal_dir}@mean", users_rule),
        (str(pal_dir), users_rule),
        (str(pal_dir), f"{pal_dir}@mean"),
    ]
    assert "18 judgements of 3 annotators" in shown
    assert "ties left out, which decide nothing: 1\n" in shown
    assert "least served: bob 0% of 6" in shown
    assert "2 of 3 annotators are known" in shown


def test_fitted_annotators_and_a_groups_column(
    evaluated: Evaluated, refused: Callable[..., str], jsonl: Callable[..., Path], pal_dir: Path, tmp_path: Path
) -> None:
    """Weights that were fitted later count; groups of the data come before prototypes, one an annotator."""
    folder = tmp_path / "fitted"
    shutil.copytree(pal_dir, folder)
    (folder / "annotators.json").write_text(json.dumps({"eve": [0.02, 0.98]}))
    rows = judgements(bob=False, eve=False)
    found, _ = evaluated(folder, "by=camp", "least=6", *SUITE, "--data", jsonl(rows))
    _, pal = found["models"].values()
    assert pal["metrics"]["accuracy"]["value"] == 1
    assert pal["metrics"]["worst_group"]["value"] == 1 == pal["metrics"]["accuracy/right"]["value"]
    assert "accuracy/new" not in pal["metrics"]
    assert [(one["model"], one["against"]) for one in found["comparisons"]] == [(str(folder), f"{folder}@mean")]
    assert "has no column cmp; did you mean camp" in refused(folder, "by=cmp", *SUITE, "--data", jsonl(rows))
    rows[0]["camp"] = "left"
    assert "annotator bob has camp left in one row" in refused(folder, "by=camp", *SUITE, "--data", jsonl(rows))
    pairs = jsonl([{"prompt": "Say:", "chosen": YES, "rejected": NO}])
    assert "no pair can be used" in refused(folder, *SUITE, "--data", pairs)
