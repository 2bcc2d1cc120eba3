"""The columns of the page of online training, with the soft win rate where there is one."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import yaml

made = runpy.run_path(str(Path(__file__).with_name("online_results.py")))
COLUMNS, row, soft_win_rate = made["COLUMNS"], made["row"], made["soft_win_rate"]
PAGE = Path(__file__).parents[2] / "docs" / "results" / "online.md"
RULE = "align.rewards.rules:everyday_answer"


def run(folder: Path, annotator: str) -> Path:
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 2}
    names = ["win_rate", "kl_to_reference"]
    names += [f"{name}_{side}" for name in ("reward", "length", "unfinished") for side in ("before", "after")]
    rewards = [(0.0, 0.1), (0.5, 0.5)]
    rows = [{"before": {"reward": low}, "after": {"reward": high}} for low, high in rewards]
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "generation.json").write_text(
        json.dumps({"metrics": dict.fromkeys(names, estimate), "rows": rows})
    )
    recipe = {"method": "ipo", "generation": {"reward": RULE}}
    recipe["online"] = {"annotator": {"reward": annotator, "temperature": 0.1}}
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "manifest.json").write_text(json.dumps({"timings": {"train_seconds": 10}}))
    return folder


def test_the_columns_are_those_of_the_page(tmp_path: Path) -> None:
    assert f"| {' | '.join(COLUMNS)} |" in PAGE.read_text(encoding="utf-8")
    cells = [cell.strip() for cell in row(run(tmp_path / "a", RULE)).strip("|").split("|")]
    assert len(cells) == len(COLUMNS)
    assert cells[:3] == ["a", "`ipo`", "50.0 (25.0 to 75.0)"]
    assert cells[3].startswith("61.6 (")  # the mean of sigmoid(1) = 73.1 % and of 50 %
    other = [cell.strip() for cell in row(run(tmp_path / "b", "runs/reward_bt")).strip("|").split("|")]
    assert other[3] == ""  # another annotator than the judge


def test_a_far_reward_is_sure() -> None:
    rows = [{"before": {"reward": 0.0}, "after": {"reward": change}} for change in (-1e4, 1e4)]
    assert soft_win_rate(rows, 0.1).value == pytest.approx(0.5)
