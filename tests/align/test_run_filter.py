"""``data.filter`` of a recipe: a run trains on what the filter keeps, says so, and does not score twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from align import run as runs
from align.cli import app
from align.config.load import load_recipe
from align.data.pairs import read_pairs
from align.errors import AlignError, ConfigError
from align.models.load import LoadedModel, load_model, load_tokenizer
from align.run import train
from align.score import training as module
from align.score.policy import PolicyScorer
from align.score.rows import ScoreRow
from align.score.scorers import Policy


def run(path: Path, *overrides: str, **options: Any) -> Path:
    return train(load_recipe(str(path), list(overrides)), source=str(path), command=["align", "train"], **options)


def run_to_evaluation(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is interrupted when its evaluation begins."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def scored_file(tmp_path: Path, pairs_file: Path) -> Path:
    """The pairs with columns of their own: quality 0 to 23, and two topics."""
    rows = [{**row, "quality": n, "topic": "ab"[n % 2]} for n, row in enumerate(read(pairs_file))]
    path = tmp_path / "with_columns.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs of every batch that a model scored."""
    seen: list[int] = []
    score = PolicyScorer.score

    def counting(self: PolicyScorer, rows: Any) -> Any:
        seen.append(len(rows))
        return score(self, rows)

    monkeypatch.setattr(PolicyScorer, "score", counting)
    return seen


def test_the_lowest_half_by_the_model_of_the_recipe(write_recipe, tiny_model_dir, pairs_file):
    """Of 24 pairs the 12 with the lowest ches_ln, scored here pair by pair, are trained on, as the data has them."""
    folder = run(write_recipe(data={"filter": {"ches_ln": {"keep": 0.5}}}, evals=[]))
    model, _ = load_model(str(tiny_model_dir), dtype="float32")
    policy = Policy.of("tiny", LoadedModel(model, load_tokenizer(str(tiny_model_dir)), ""), 128, 1)
    scorer = PolicyScorer({"ches_ln": "ches_ln"}, policy)
    rows = read_pairs(str(pairs_file)).rows
    each = [ScoreRow(r.row_id, r.prompt, {"chosen": [r.chosen], "rejected": [r.rejected]}, frozenset()) for r in rows]
    scores = {row.row_id: scorer.score([row]).columns[0]["ches_ln"] for row in each}
    lowest = set(sorted(scores, key=lambda name: scores[name])[:12])

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["filter"]["kept_ids"] == [row.row_id for row in rows if row.row_id in lowest]
    assert manifest["filter"]["rules"] == {"ches_ln": {"keep": 0.5}}
    assert manifest["filter"]["scored"] == ["ches_ln"]
    assert manifest["filter"]["counts"] == {"rows": 24, "kept": 12, "dropped": 12, "set_aside": 0}
    assert {key: manifest["data"]["train"][key] for key in ("pairs", "kept", "dropped")} == {
        "pairs": 24,
        "kept": 12,
        "dropped": 12,
    }
    dropped = read(folder / "filter" / "dropped.jsonl")
    assert {row["row_id"] for row in dropped} == scores.keys() - lowest
    assert all(row["ches_ln"] == pytest.approx(scores[row["row_id"]], rel=1e-4) for row in dropped)
    assert all("of 24; 1 to 12 stay" in row["reason"] for row in dropped)
    assert len(read(folder / "filter" / "reasons.jsonl")) == 24
    assert not (folder / "filter" / "kept.jsonl").exists()
    said = (
        "ches_ln: the lowest 50 % (ches_ln: scored with the model before training). 12 of 24 usable rows were trained"
    )
    for page in ("report.html", "README.md"):
        assert said in (folder / page).read_text(), page
    assert "Length of chosen" in (folder / "filter" / "report.html").read_text()


def test_training_sees_the_rows_that_stay_and_no_others(write_recipe, scored_file, monkeypatch):
    """Over 19 in quality: four rows; one step an epoch of four rows a batch."""
    seen: list[int] = []
    build = runs.build
    monkeypatch.setattr(runs, "build", lambda r, t, data, *more: seen.append(len(data)) or build(r, t, data, *more))
    folder = run(
        write_recipe(data={"train": str(scored_file), "filter": {"quality": {"above": 19}}}, evals=["preference"])
    )
    assert seen == [4]
    assert json.loads((folder / "manifest.json").read_text())["filter"]["counts"]["kept"] == 4
    assert json.loads((folder / "eval" / "preference.json").read_text())["metrics"]["accuracy"]["n"] == 24


def test_rules_go_together_and_groups_keep_their_shares(write_recipe, scored_file):
    """Of the even and the odd half the lowest 50 %, and of those what is over 3: 4, 6, 8, 10 and 5, 7, 9, 11."""
    rules = {"quality": {"keep": 0.5, "group": "topic"}, "again": {"above": 3}}
    lines = [{**row, "again": row["quality"]} for row in read(scored_file)]
    scored_file.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    folder = run(write_recipe(data={"train": str(scored_file), "filter": rules}, evals=[]))
    dropped = read(folder / "filter" / "dropped.jsonl")
    qualities = {row["row_id"]: n for n, row in enumerate(read_pairs(str(scored_file)).rows) for row in [vars(row)]}
    kept = json.loads((folder / "manifest.json").read_text())["filter"]["kept_ids"]
    assert [qualities[name] for name in kept] == list(range(4, 12))
    reasons = {qualities[row["row_id"]]: row["reason"] for row in dropped}
    assert reasons[2] == "again 2 is not above 3"
    assert reasons[23] == "quality 23 is number 12 of 12 of topic 'b'; 1 to 6 stay"


def test_single_answers_are_filtered_by_their_columns(write_recipe, tmp_path):
    path = tmp_path / "thumbs.jsonl"
    rows = [{"prompt": f"p {n}", "completion": f" a {n}", "label": n % 2 == 0, "judge": n} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"train": str(path), "eval": None, "filter": {"judge": {"window": [0.5, 1]}}}
    folder = run(write_recipe(method="bco", loss=None, data=data, evals=[]))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["data"]["train"]["kept"], manifest["filter"]["counts"]["kept"]) == (6, 6)
    last = write_recipe(method="bco", loss=None, data={**data, "filter": {"judge": {"above": 10.5}}}, evals=[])
    with pytest.raises(AlignError, match="no thumb up"):
        run(last, f"output={tmp_path / 'one'}")


def test_a_run_that_goes_on_does_not_score_again(write_recipe, tmp_path, counted, monkeypatch):
    """Stopped in training after scoring; the same command takes the scores that it has."""
    path = write_recipe(data={"filter": {"ches_ln": {"keep": 0.5}}}, evals=["preference"])
    run_to_evaluation(path, monkeypatch)
    assert sum(counted) == 24
    kept = json.loads((tmp_path / "run" / "manifest.json").read_text())["filter"]["kept_ids"]
    folder = run(path)
    assert sum(counted) == 24
    assert json.loads((folder / "manifest.json").read_text())["filter"]["kept_ids"] == kept
    run(path, "data.max_length=120", f"output={tmp_path / 'other'}")
    assert sum(counted) == 48


def test_scoring_that_was_killed_goes_on(write_recipe, counted, monkeypatch):
    """Shards of 10 of 24 pairs: the second shard fails, and the same command scores 14 more."""
    monkeypatch.setattr(module, "SHARD_ROWS", 10)
    path = write_recipe(data={"filter": {"ches_ln": {"keep": 0.5}}}, evals=[])
    score_rows = module.score_rows

    def once(scorers: Any, part: Any, *more: Any) -> Any:
        if part[0][0]:
            raise KeyboardInterrupt
        return score_rows(scorers, part, *more)

    with monkeypatch.context() as patch:
        patch.setattr(module, "score_rows", once)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    assert sum(counted) == 10
    run(path)
    assert sum(counted) == 24


def test_other_scores_are_not_mixed_into_a_run(write_recipe, scored_file, monkeypatch):
    """The pairs are the same, and their column is not."""
    path = write_recipe(data={"train": str(scored_file), "filter": {"quality": {"keep": 0.5}}}, evals=["preference"])
    run_to_evaluation(path, monkeypatch)
    lines = [{**row, "quality": -row["quality"]} for row in read(scored_file)]
    scored_file.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    with pytest.raises(AlignError, match=r"data\.filter keeps other rows"):
        run(path)


def test_repeated_pairs_are_judged_by_their_own_columns(write_recipe, scored_file):
    """The first pair again, with another quality: one of the two stays."""
    lines = read(scored_file)
    lines.append({**lines[0], "quality": 99})
    scored_file.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    rules = {"quality": {"above": 20}}
    folder = run(write_recipe(data={"train": str(scored_file), "filter": rules}, evals=[]))
    kept = json.loads((folder / "manifest.json").read_text())["filter"]["kept_ids"]
    ids = [row.row_id for row in read_pairs(str(scored_file)).rows]
    assert kept == [*ids[21:24], ids[0]]
    assert read(folder / "filter" / "reasons.jsonl")[24]["flags"] == ["repeats row 1"]


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ({"qualty": {"above": 3}}, "has no column qualty; did you mean quality?"),
        ({"ches_lm": {"keep": 0.5}}, "did you mean ches_ln?"),
        ({"logps": {"keep": 0.5}}, "it has chosen, prompt, quality, rejected, topic"),
        ({"quality": {"keep": 0.5, "group": "topik"}}, "did you mean topic?"),
    ],
)
def test_columns_that_are_not_there(write_recipe, scored_file, tmp_path, rules, problem):
    """Said by a dry run, which writes nothing."""
    path = write_recipe(data={"train": str(scored_file), "filter": rules})
    with pytest.raises(ConfigError, match=problem.replace("?", r"\?")):
        run(path, dry_run=True)
    assert not (tmp_path / "run").exists()


def test_similarity_is_scored_for_policies_alone(write_recipe):
    path = write_recipe(method="sft", loss=None, data={"filter": {"ches_ln": {"keep": 0.5}}}, evals=[])
    with pytest.raises(ConfigError, match="scored only where a policy learns from pairs"):
        run(path, dry_run=True)


def test_too_many_rows_without_a_score_stop_the_run(write_recipe, scored_file):
    lines = [{**row, "quality": None if row["quality"] < 4 else 1} for row in read(scored_file)]
    scored_file.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    data = {"train": str(scored_file), "filter": {"quality": {"below": 2}}}
    with pytest.raises(AlignError, match=r"16\.7 % of the rows is over data\.max_bad_fraction"):
        run(write_recipe(data=data, evals=[]))
    folder = run(write_recipe(data={**data, "max_bad_fraction": 0.2}, evals=[]))
    assert json.loads((folder / "manifest.json").read_text())["filter"]["counts"]["set_aside"] == 4
    assert len(read(folder / "filter" / "rejected_rows.jsonl")) == 4


def test_a_dry_run_knows_the_filter(write_recipe, scored_file, tmp_path, capsys):
    run(write_recipe(data={"filter": {"ches_ln": {"keep": 0.5}}}), dry_run=True)
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "before training" in shown
    assert "of 24 rows, 12 will be trained on" in shown
    assert "12 rows · 6 steps of 4 (2 epochs)" in shown
    run(write_recipe(data={"train": str(scored_file), "filter": {"quality": {"above": 19}}}), dry_run=True)
    shown = capsys.readouterr().out
    assert "kept 4 · dropped 20 · set aside 0 of 24 rows" in shown
    assert "4 rows · 6 steps of 4" in shown
    assert not (tmp_path / "run").exists()


def test_validate_knows_the_filter(write_recipe, scored_file):
    result = CliRunner().invoke(app, ["validate", str(write_recipe(data={"filter": {"ches_ln": {"keep": 0.5}}}))])
    assert result.exit_code == 0
    assert "before training\n  of 24 rows, 12 will be trained on" in result.stdout
    wrong = write_recipe(data={"train": str(scored_file), "filter": {"qualty": {"keep": 0.5}}})
    result = CliRunner().invoke(app, ["validate", str(wrong)])
    assert result.exit_code == 2
    assert "did you mean quality?" in result.stderr
