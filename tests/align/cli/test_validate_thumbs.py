"""``align validate`` on answers with thumbs, alone and in a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import Result

Align = Callable[..., Result]


@pytest.fixture
def thumbs(tmp_path: Path) -> Path:
    """Twenty answers, one of them with a label that is none: 5 % bad, just allowed."""
    rows = [{"prompt": f"Question {n}?", "completion": f" Yes, {n}.", "label": n % 3 == 0} for n in range(20)]
    rows[16]["label"] = 5
    path = tmp_path / "thumbs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_data_alone(align: Align, thumbs: Path, tiny_model_dir: Path) -> None:
    for more in ((), ("--model", tiny_model_dir)):
        result = align("validate", thumbs, *more)
        assert result.exit_code == 0, result.stderr
        assert "20 rows, 19 completions" in result.stdout
        assert "7 up · 12 down · 0 answers with both" in result.stdout
        assert "row 17  label  5 is not true or 1 (thumb up), false or 0 (thumb down)" in result.stdout


@pytest.mark.parametrize("method", ["bco", "kto"])
def test_a_recipe_with_its_data(align: Align, thumbs: Path, tiny_model_dir: Path, tmp_path: Path, method: str) -> None:
    recipe = tmp_path / "mine.yaml"
    data = {"train": str(thumbs), "max_length": 64}
    recipe.write_text(yaml.safe_dump({"method": method, "model": str(tiny_model_dir), "data": data, "output": "run"}))
    result = align("validate", recipe)
    assert result.exit_code == 0, result.stderr
    assert "no problems in the recipe" in result.stdout
    assert "7 up · 12 down" in result.stdout


def test_a_thumb_that_is_missing_ends_with_1(align: Align, thumbs: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    thumbs.write_text("".join(line + "\n" for line in thumbs.read_text().splitlines() if "false" in line))
    recipe = tmp_path / "mine.yaml"
    data = {"train": str(thumbs)}
    recipe.write_text(yaml.safe_dump({"method": "bco", "model": str(tiny_model_dir), "data": data, "output": "run"}))
    result = align("validate", recipe)
    assert result.exit_code == 1
    assert "no thumb up among 12 thumbs down" in result.stderr
