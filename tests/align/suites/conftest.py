"""The command line, called in this process, and models that suites compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from align.cli import app
from align.evals.difference import changes
from align.reports.results import read_result, shown_result
from align.rewards.models import RewardModel


@pytest.fixture
def align() -> Callable[..., Result]:
    """``align("eval", MODEL, "--suite", "preference")``."""
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def evaluated(align: Callable[..., Result], tmp_path: Path) -> Callable[..., tuple[dict[str, Any], str]]:
    """``evaluated(MODEL, "--suite", "preference")``: the result and what was printed.

    A page can show every one, none is worse than itself, and the texts of pairs are in it.
    """

    def run(*words: Any) -> tuple[dict[str, Any], str]:
        output = tmp_path / "result.json"
        result = align("eval", *words, "-o", output)
        assert result.exit_code == 0, result.output
        found = read_result(output)
        assert shown_result(found)["metrics"].lines
        if "pairs" in (found["data"] or {}):
            texts = {pair["row_id"] for pair in found["data"]["pairs"]}
            rows = [row for one in found["models"].values() for row in one["rows"]]
            assert {name for row in rows for name in row.get("row_ids", [row.get("row_id")])} <= texts
        assert {change.status for change in changes(found, found)} <= {"same", "told"}
        return found, result.stdout

    return run


@pytest.fixture
def refused(align: Callable[..., Result], tmp_path: Path) -> Callable[..., str]:
    """``refused(MODEL, "--suite", "preference")``: why, on one line."""

    def run(*words: Any) -> str:
        result = align("eval", *words, "-o", tmp_path / "refused.json")
        assert result.exit_code in (1, 2)
        assert not (tmp_path / "refused.json").exists()
        return " ".join(result.stderr.split())

    return run


@pytest.fixture(scope="session")
def reward_dirs(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    """Untrained reward models by kind: scalar, attributes, gpm."""
    kinds: dict[str, dict[str, Any]] = {
        "scalar": {},
        "attributes": {"attributes": ["good", "long"], "ranking": {"good": 2.0, "long": -1.0}},
        "gpm": {"dimension": 4},
    }
    folder = tmp_path_factory.mktemp("rewards")
    for kind, more in kinds.items():
        torch.manual_seed(0)
        RewardModel.create(tiny_model_dir, kind=kind, dtype=torch.float32, **more).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in kinds}


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """``jsonl(rows)`` writes them to a file."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
