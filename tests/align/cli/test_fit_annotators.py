"""``align models fit-annotators`` and the annotators that ``align score`` then knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from align.cli import app

CLI = CliRunner()


@pytest.fixture
def run(pal_dir: Path, tmp_path: Path) -> Path:
    """A run whose two groups want opposite things, of which each test has its own copy."""
    shutil.copytree(pal_dir, tmp_path / "run" / "model")
    return tmp_path / "run"


def judged(path: Path, annotators: dict[str, bool], count: int = 4) -> Path:
    rows = [
        {
            "prompt": "Say:",
            "chosen": " yes yes" if likes_yes else " no",
            "rejected": " no" if likes_yes else " yes yes",
            "annotator": name,
        }
        for name, likes_yes in annotators.items()
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_new_annotators_are_fitted_and_known_from_then_on(run: Path, tmp_path: Path):
    data = judged(tmp_path / "new.jsonl", {"ann": True, "eve": True, "mallory": False})
    done = CLI.invoke(app, ["models", "fit-annotators", str(run), str(data)])
    assert done.exit_code == 0, done.output
    assert "eve" in done.output
    assert "100% now" in done.output
    assert "4 judgements of annotators whom the model was trained on: left out" in done.output
    fitted = json.loads((run / "model" / "annotators.json").read_text(encoding="utf-8"))
    assert fitted.keys() == {"eve", "mallory"}
    assert fitted["eve"][0] > 0.6
    assert fitted["mallory"][1] > 0.6
    specs = f"{run}@annotator:eve,{run}@annotator:mallory,both={run}@mean,{run}@group:1"
    done = CLI.invoke(
        app, ["score", str(data), "--with", specs, "-o", str(tmp_path / "out.jsonl"), "--dtype", "float32"]
    )
    assert done.exit_code == 0, done.output
    row = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["run_eve_chosen"] > row["run_eve_rejected"]
    assert row["run_mallory_chosen"] < row["run_mallory_rejected"]
    assert row["run_group_1_chosen"] == pytest.approx(-2.0, abs=1e-3)  # |1 - 3|
    assert row["both_chosen"] == pytest.approx(-1.0, abs=1e-2)  # prototypes cancel: |1 - 0|
    again = CLI.invoke(app, ["models", "fit-annotators", str(run), str(judged(data, {"eve": False}))])
    assert again.exit_code == 0, again.output
    later = json.loads((run / "model" / "annotators.json").read_text(encoding="utf-8"))
    assert later["eve"][1] > 0.6
    assert later["mallory"] == fitted["mallory"]


def test_ties_are_counted_and_their_annotators_left_out(run: Path, tmp_path: Path):
    data = judged(tmp_path / "new.jsonl", {"eve": True})
    tie = {"prompt": "Say:", "chosen": " no", "rejected": " yes yes", "annotator": "zoe", "preference": 0.5}
    data.write_text(data.read_text() + json.dumps(tie) + "\n", encoding="utf-8")
    done = CLI.invoke(app, ["models", "fit-annotators", str(run), str(data)])
    assert done.exit_code == 0, done.output
    assert "1 tie: left out, and annotators who have no other judgements with them" in done.output
    assert "zoe" not in done.output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["models", "fit-annotators", "{run}", "{known}"], "are of annotators of the model's training"),
        (["models", "fit-annotators", "{model}", "{known}"], "no pal.json in this folder"),
        (["score", "{known}", "--with", "{run}", "-o", "{out}"], "@WHO, and WHO is annotator:NAME, mean"),
        (["score", "{known}", "--with", "{run}@annotator:zoe", "-o", "{out}"], "annotator 'zoe' is unknown"),
        (["score", "{known}", "--with", "{run}@mix:0.5:0.5", "-o", "{out}"], "write NAME="),
    ],
)
def test_what_is_refused(run: Path, tmp_path: Path, tiny_model_dir: Path, command: list[str], message: str):
    known = judged(tmp_path / "known.jsonl", {"ann": True, "bob": False})
    places = {"run": run, "known": known, "model": tiny_model_dir, "out": tmp_path / "out.jsonl"}
    done = CLI.invoke(app, [part.format(**places) for part in command])
    assert done.exit_code in (1, 2)
    assert message in " ".join(done.output.split())
