"""``align eval --suite exact`` says what ``align verify`` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from align.cli import app
from align.evals.exact.verify import make_stack, verify
from align.losses import LOSSES


def evaluate(output: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["eval", "--suite", "exact", "-o", str(output), *words])


def test_comparisons_of_two_losses(tmp_path: Path) -> None:
    done = evaluate(tmp_path / "e.json", "only=[regression, sft]", "dtype=float32", "seed=1")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads((tmp_path / "e.json").read_text())
    assert list(found["models"]) == ["sft", "regression"]
    assert found["settings"]["seed"] == 1
    for name, method in found["models"].items():
        rows = verify(name, make_stack("cpu", "float32", 1))
        assert method["n"] == len(rows)
        assert method["metrics"]["passed"]["value"] == sum(row.status == "pass" for row in rows)
        assert [(row["row_id"], row["ours"]) for row in method["rows"]] == [(row.quantity, row.ours) for row in rows]
    assert found["n"] == sum(method["n"] for method in found["models"].values())
    assert f"2 methods, float32 on cpu: {found['n']} comparisons, 0 missed" in done.stdout


def test_a_miss_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss without a target: its distance is no number, which JSON cannot hold."""
    monkeypatch.setitem(LOSSES, "untold", LOSSES["sft"])
    done = evaluate(tmp_path / "e.json", "only=[untold]")
    assert done.exit_code == 0, done.stderr
    method = json.loads((tmp_path / "e.json").read_text())["models"]["untold"]
    assert (method["metrics"]["missed"]["value"], method["rows"][0]["distance"], method["kind"]) == (1, None, None)
    assert "untold, no target" in done.stdout
    assert "1 missed" in done.stdout


def test_what_is_not_there(tmp_path: Path) -> None:
    for words, said in (
        (["only=[dpoo]"], "did you mean 'dpo'"),
        (["dtype=bfloat16"], "dtype"),
        (["some-model"], "is not asked by --suite exact, which reads worlds of its own"),
    ):
        done = evaluate(tmp_path / "e.json", *words)
        assert done.exit_code == 2
        assert said in " ".join(done.stderr.split())
