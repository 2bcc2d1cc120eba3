"""``align eval --suite resampling`` on samples of two models and a verifier that lets mistakes through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from align.cli import app
from align.evals.resampling import ceilings, expected_outcomes

Align = Callable[..., Result]


@pytest.fixture(scope="module")
def align() -> Align:
    from typer.testing import CliRunner

    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def samples(model: str, ability: float, f: float, seed: int) -> list[dict[str, Any]]:
    """24 samples each of 50 problems, of which some are easy and some hard; t = 0.9."""
    rng, rows = np.random.default_rng(seed), []
    for problem, p in enumerate(np.linspace(0.02, 1, 50) ** (1 / ability)):
        for correct in rng.random(24) < p:
            passed = bool(rng.random() < (0.9 if correct else f))
            rows.append({"model": model, "problem": f"p{problem:02}", "passed": passed, "correct": bool(correct)})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluated(align: Align, data: Path, *words: str) -> tuple[dict[str, Any], str]:
    output = data.with_name("result.json")
    result = align("eval", "--suite", "resampling", "--data", data, "-o", output, *words)
    assert result.exit_code == 0, result.stderr
    return json.loads(output.read_text()), result.stdout


def test_two_models(align: Align, tmp_path: Path) -> None:
    """Curves cover the truth; the weak model, with more false positives, does not reach the strong one's first sample;
    mistakes that cost more make the best number of samples smaller. The order of the rows changes nothing.
    """
    rows = samples("strong", 4, 0.1, 0) + samples("weak", 0.3, 0.3, 1)
    found, shown = evaluated(align, write(tmp_path / "data.jsonl", rows), "costs=[0, 0.5, 4]")
    strong, weak = found["models"].values()
    assert (found["n"], found["data"]["samples"], found["settings"]["samples"]) == (50, 2400, 24)
    p = np.linspace(0.02, 1, 50) ** (1 / 0.3)
    truth = expected_outcomes(p, 0.9, 0.3, np.arange(25))
    for name in ("correct", "wrong", "samples"):
        curve, expected = weak["curves"][name], getattr(truth, name).mean(axis=0)
        width = np.array(curve["high"]) - np.array(curve["low"])
        assert (np.abs(np.array(curve["value"]) - expected) <= width + 1e-12).all()
        assert curve["low"][24] < curve["value"][24] < curve["high"][24]
    metrics = weak["metrics"]
    assert metrics["false_positives"]["low"] < 0.3 < metrics["false_positives"]["high"]
    assert metrics["completeness"]["low"] < 0.9 < metrics["completeness"]["high"]
    assert metrics["ceiling"]["value"] == pytest.approx(ceilings(p, 0.9, 0.3).mean(), abs=0.02)
    assert weak["curves"]["correct"]["value"][24] < strong["metrics"]["accuracy"]["value"]
    assert weak["curves"]["perfect"]["value"][24] > weak["metrics"]["ceiling"]["value"]
    best = [weak["best"][cost]["k"]["value"] for cost in ("0", "0.5", "4")]
    assert best[0] > best[1] > best[2] == 0
    compared = {one["metric"]: one for one in found["comparisons"]}
    assert (compared["accuracy"]["model"], compared["accuracy"]["against"]) == ("weak", "strong")
    assert compared["accuracy"]["clear"]
    assert compared["accuracy"]["value"] == pytest.approx(
        metrics["accuracy"]["value"] - strong["metrics"]["accuracy"]["value"]
    )
    assert found["warnings"] == []
    assert "2,400 samples of 50 problems" in shown

    again, _ = evaluated(
        align,
        write(tmp_path / "other.jsonl", rows[1200:] + rows[1199::-1]),
        "--reference",
        "strong",
        "costs=[0, 0.5, 4]",
    )
    assert again["models"]["weak"] == weak
    assert again["comparisons"] == found["comparisons"]
    assert again["data"]["sha256"] == found["data"]["sha256"]


def test_verifier_that_is_the_metric(align: Align, tmp_path: Path) -> None:
    rows = [{"problem": n % 5, "passed": n % 3 == 0, "correct": n % 3 == 0} for n in range(30)]
    found, shown = evaluated(align, write(tmp_path / "data.jsonl", rows), "samples=4", "costs=[2]", "price=0.01")
    assert found["models"]["samples"]["metrics"]["ceiling"]["value"] == 1
    assert found["settings"]["costs"] == [2]
    assert found["models"]["samples"]["best"]["2"]["at_edge"]
    assert "4 [4, 4] (all that there are): +" in shown
    assert found["comparisons"] == []
    assert "verifier and metric agree on every sample" in found["warnings"][0]
    assert "verifier and metric agree on every sample" in shown


def test_what_cannot_be_used(align: Align, tmp_path: Path) -> None:
    """Rows with faults are set aside and told; a CSV file's cells are read as what they say."""

    def refusal(rows: list[dict[str, Any]], *words: str) -> tuple[int, str]:
        data = write(tmp_path / "bad.jsonl", rows)
        result = align("eval", *words, "--suite", "resampling", "--data", data, "-o", tmp_path / "r.json")
        return result.exit_code, " ".join((result.stdout + result.stderr).split())

    row = {"problem": "a", "passed": True, "correct": False}
    table = tmp_path / "data.csv"
    table.write_text("problem,passed,correct\na,true,0\na,1,false\nb,yes,0\nb,0,1\n,1,1\n")
    found, shown = evaluated(align, table)
    assert (found["n"], found["data"]["set_aside"]) == (2, 2)
    assert "'yes' is not true or 1, false or 0" in shown
    assert found["models"]["samples"]["rows"][0]["ceiling"] == 0.0

    code, said = refusal([{"problem": "a", "passed": 2}])
    assert code == 1
    assert "missing: the row has problem, passed; wanted problem, passed, correct" in said
    assert "no row can be used" in said
    code, said = refusal([{**row, "model": "x"}, {**row, "model": "y", "problem": "b"}])
    assert (code, "problem 'a' has samples of x and none of y" in said) == (1, True)
    code, said = refusal([row], "samples=2")
    assert (code, "samples=2: problem 'a' of samples has 1 samples" in said) == (1, True)
    code, said = refusal([row], "costs=[-1]")
    assert (code, "costs" in said) == (2, True)
    code, said = refusal([row], "some-model")
    assert (code, "is not asked by --suite resampling" in said) == (2, True)
    code, said = refusal([row], "--reference", "z")
    assert (code, "'z' is none of samples" in said) == (2, True)
