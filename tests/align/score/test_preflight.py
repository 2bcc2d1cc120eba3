"""align train --preflight: a sample is scored, the risk shown, and a filter recommended that the recipe takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import log
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import yaml
from typer.testing import Result

from align.config.load import load_recipe

Align = Callable[..., Result]


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Path]:
    """A recipe on pairs that are given, or on 40 of words."""

    def write(rows: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
        words = ["the cat", "inner thing", "another garden", "an apple", "hint then"]
        pairs = [
            {"prompt": f"say {n}", "chosen": f" {words[n % 5]} {n}", "rejected": f" {words[n % 3]} no"}
            for n in range(40)
        ]
        data = tmp_path / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows or pairs), encoding="utf-8")
        recipe = {
            "method": "dpo",
            "model": {"name": str(tiny_model_dir), "dtype": "float32"},
            "data": {"train": str(data), "max_length": 64, "max_bad_fraction": 0.5},
            "output": str(tmp_path / "run"),
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    return write


def test_what_is_said_and_the_filter_to_paste(align: Align, write_recipe, tmp_path: Path) -> None:
    path = write_recipe()
    before = sorted(tmp_path.iterdir())
    result = align("train", path, "--preflight", "--preflight-rows", 30)
    assert result.exit_code == 0, result.stderr
    assert "30 of 40 pairs of" in result.stdout
    counts = [int(count) for count in re.findall(r"^ +\S.*  █* (\d+)$", result.stdout, re.MULTILINE)]
    assert (len(counts), sum(counts)) == (10, 30)
    assert "one-token answers 0" in result.stdout
    assert "repeated pairs 0 · pairs of equal answers 0" in result.stdout
    assert sorted(tmp_path.iterdir()) == before

    pasted = yaml.safe_load("\n".join(re.findall(r"^  (data:|  filter: .*)$", result.stdout, re.MULTILINE)))
    share = pasted["data"]["filter"]["ches_ln"]["keep"]
    assert share == 0.9
    assert "it keeps 36 of 40 pairs" in result.stdout
    recipe = yaml.safe_load(path.read_text())
    recipe["data"] |= pasted["data"]
    path.write_text(yaml.safe_dump(recipe))
    assert load_recipe(str(path)).data.filter["ches_ln"].keep == share
    assert "the recipe filters already" in align("train", path, "--preflight").stdout


def test_the_sample_is_the_same_every_time(align: Align, write_recipe) -> None:
    path = write_recipe()
    said = {align("train", path, "--preflight", "--preflight-rows", 10).stdout for _ in range(2)}
    assert len(said) == 1


def test_repeats_equal_answers_and_short_ones_are_counted(align: Align, write_recipe) -> None:
    """Answers of one letter are one token: CHES says little of them, and no filter is recommended."""
    rows = [{"prompt": f"say {n}", "chosen": "abcdefgh"[n], "rejected": "z"} for n in range(8)]
    rows += [rows[0], {**rows[1], "chosen": "z"}, {"prompt": "say more", "chosen": "the cat", "rejected": "the ant"}]
    result = align("train", write_recipe(rows), "--preflight")
    assert result.exit_code == 0, result.stderr
    assert "10 of 10 pairs" in result.stdout
    assert "one-token answers 9" in result.stdout
    assert "repeated pairs 1 · pairs of equal answers 1" in result.stdout
    assert "no filter is recommended: most answers are single tokens" in result.stdout


def scored(scores: list[float], **columns: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"p {n}", "chosen": f"a {n}", "rejected": "b c", "ches_ln": score, **columns}
        for n, score in enumerate(scores)
    ]


def test_a_column_of_the_data_is_taken_as_it_is(align: Align, write_recipe) -> None:
    result = align("train", write_recipe(scored([n - 74.5 for n in range(100)])), "--preflight")
    assert "from its column ches_ln" in result.stdout
    # Over the median, -25, lie .5 to 49.5; the highest five are counted as the next, 44.5: 785 of 1,235 in the highest
    # fifth.
    assert "the highest fifth of the pairs has 64 %" in result.stdout
    # The quartile is -49.75; -25 + 2.4387 * 24.75 = 35.36 is over all.
    assert "no tail stands out" in result.stdout
    assert "over 35.36 lie 0 % of the pairs" in result.stdout


def test_answers_that_the_data_flags_are_counted(align: Align, write_recipe) -> None:
    """With CHES from the data, what it says of single tokens counts as well."""
    rows = [*scored([float(n) for n in range(3)], one_token=True), *scored([9.0, 8.0])[1:]]
    found = align("train", write_recipe(rows), "--preflight").stdout
    assert "one-token answers 3" in found
    assert "no filter is recommended: most answers are single tokens" in found
    assert "keep:" not in found


NORMAL = [NormalDist().inv_cdf((n + 0.5) / 99) for n in range(99)]
CHOICE = (
    "a choice and no recommendation, to paste in the recipe: without the highest 10 %|keep: 0.9}|it keeps 90 of 100"
)
NONE = f"no filter is recommended: no tail stands out|{CHOICE}"


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        # a clump, all under 0
        ([-9.0] * 50 + [-8.0] * 20 + [-1 - n / 100 for n in range(30)], "over -7.281 lie 30 %|keep: 0.7}|keeps 70 of"),
        ([-log(1 - (n + 0.5) / 100) for n in range(100)], "lie 19 %|keep: 0.81}"),  # over ln 2 + 2.44 ln 1.5
        ([*NORMAL, 1000.0], f"fifth of the pairs has 69 %|over 1.65 lie 6 %|{NONE}"),  # one far off
        ([3 * score - 1000 for score in [*NORMAL, 0.0]], f"fifth of the pairs has 69 %|lie 5 %|{NONE}"),
        ([log((n + 0.5) / 100) for n in range(100)], NONE),
        ([1.0, 2.0, 3.0] + [4.0] * 97, NONE),
        ([0.1] * 100, NONE),
        ([0.0] * 80 + [1.0] * 40, "over 0 lie 33 %|keep: 0.667}|it keeps 80 of 120"),  # 0.66 would keep one less
        (
            [0.0] * 60 + [1.0] * 39,
            "under 100 pairs, a tail that stands out is often chance\n|keep: 0.9}|keeps 89 of 99",
        ),
    ],
)
def test_the_recommendation_follows_the_spread(align: Align, write_recipe, scores: list[float], said: str) -> None:
    """A tail that is heavier than a normal one is left out; one pair, or where the scores lie, changes nothing."""
    found = align("train", write_recipe(scored(scores)), "--preflight").stdout
    for words in said.split("|"):
        assert words in found
    assert ("no filter is recommended" in found) is ("keep: 0.9}" in found)


def test_a_small_sample_of_large_data_can_be_larger(align: Align, write_recipe) -> None:
    found = align("train", write_recipe(scored([0.0] * 60 + [1.0] * 40)), "--preflight", "--preflight-rows", 50).stdout
    assert "is often chance; --preflight-rows scores more" in found


def test_what_it_is_not_for(align: Align, write_recipe) -> None:
    result = align("train", write_recipe(method="sft"), "--preflight")
    assert result.exit_code == 2
    assert "--preflight  scores pairs for a policy, and method: sft trains on something else" in result.stderr
    result = align("train", write_recipe(), "--preflight", "--dry-run")
    assert result.exit_code == 2
    assert "goes without --dry-run" in result.stderr
