"""``method: pal`` from recipe to report, on the tiny model and on the data of two opposed groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from align.config.load import load_recipe
from align.errors import AlignError
from align.rewards.pal import load_pal
from align.run import train


@pytest.fixture
def recipe_path(tmp_path: Path, tiny_model_dir: Path, judge) -> Path:
    known = {f"ann {number}": number < 4 for number in range(7)}
    new = {"eve": True, "mallory": False}
    judge(tmp_path / "train.jsonl", known, 16, 0)
    judge(tmp_path / "heldout.jsonl", {**known, **new}, 12, 30)
    recipe: dict[str, Any] = {
        "method": "pal",
        "model": {"name": str(tiny_model_dir), "dtype": "float32"},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "heldout.jsonl"), "max_length": 64},
        "pal": {
            "dimension": 8,
            "epochs": 40,
            "batch_size": 32,
            "learning_rate": 3e-3,
            "shots": [1, 4],
            "cache": str(tmp_path / "cache"),
        },
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def run(path: Path, *overrides: str) -> Path:
    return train(load_recipe(str(path), overrides), source=str(path), command=["align", "train", str(path)])


def test_data_that_would_leave_nothing_to_test_are_refused_before_training(recipe_path, tmp_path, judge):
    """Two new annotators of three judgements each, of whom up to four are to be fitted to."""
    judge(tmp_path / "heldout.jsonl", {"eve": True, "mallory": False}, 3, 30)
    with pytest.raises(AlignError, match=r"none of its 2 annotators is in .*, and none has more than 4 judgements"):
        run(recipe_path)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    folder = run(recipe_path, "pal.shots=[1, 2]")
    page = (folder / "report.html").read_text()
    assert "Held-out judgements that each model ranks as the annotator did" in page
    assert '<th scope="row">mallory</th><td class="num">new</td><td class="num">1</td>' in page


def test_training_data_of_ties_alone_are_refused(recipe_path, tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [json.loads(line) | {"preference": 0.5} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(AlignError, match=r"nothing to learn from: its 112 rows are ties or set aside"):
        run(recipe_path)


def test_two_opposed_groups_from_recipe_to_report(recipe_path: Path, tmp_path: Path):
    """Sure labels, 4 : 3: one reward for all is right in 4/7 at most, a reward an annotator nearly always."""
    folder = run(recipe_path)
    found = json.loads((folder / "eval" / "pal.json").read_text(encoding="utf-8"))
    values = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert values["seen/accuracy/PAL"] >= 0.98
    assert max(values["seen/accuracy/one group"], values["seen/accuracy/Bradley-Terry"]) <= 4 / 7 + 1e-9
    assert values["seen/gain/PAL/one group"] >= 0.4
    assert values["unseen/accuracy/PAL, 4 pairs"] >= 0.9
    assert values["unseen/accuracy/PAL, 0 pairs"] <= 0.6  # nothing is known of the two new ones, who are opposed
    assert values["unseen/gain/PAL, 4 pairs/PAL, 0 pairs"] >= 0.3
    assert found["metrics"]["unseen/accuracy/PAL, 4 pairs"]["n"] == 2
    groups = {name: int(torch.tensor(weights).argmax()) for name, weights in found["settings"]["weights"].items()}
    assert len({groups[f"ann {number}"] for number in range(4)}) == 1
    assert groups["ann 0"] != groups["ann 6"]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "finished"
    assert manifest["data"]["train"]["annotators"] == 7
    assert len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 40
    assert load_pal(folder / "model").groups == 2
    assert (folder / "report.html").is_file()
    assert (folder / "README.md").is_file()


def test_baselines_are_a_choice(recipe_path: Path):
    """Without them the model is judged alone, and the report shows it."""
    folder = run(recipe_path, "pal.epochs=2", "pal.baselines=false")
    found = json.loads((folder / "eval" / "pal.json").read_text(encoding="utf-8"))
    assert {name.split("/")[2].partition(",")[0] for name in found["metrics"]} == {"PAL"}
    assert "unseen/gain/PAL, 4 pairs/PAL, 0 pairs" in found["metrics"]
    assert "Known annotators: judgements ranked right, PAL" in (folder / "report.html").read_text(encoding="utf-8")


def test_embeddings_are_computed_once(recipe_path: Path, tmp_path: Path):
    facts = []
    for name in ("one", "two"):
        folder = run(recipe_path, f"output={tmp_path / name}", "pal.epochs=2", "evals=[]")
        facts.append(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["model"])
        assert not (folder / "eval").exists()
    assert facts[0]["embeddings_computed"] > 0
    assert facts[1]["embeddings_computed"] == 0
    weights = [load_pal(tmp_path / name / "model").state_dict() for name in ("one", "two")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_an_interrupted_run_begins_training_anew(recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped at epoch 3 and given again, it is the run that was never stopped, and no metric stands twice."""
    import align.run_pal

    whole = run(recipe_path, f"output={tmp_path / 'whole'}", "pal.epochs=6", "evals=[]")
    real = align.run_pal.trained

    def stopped(spec: Any, data: Any, groups: int, seed: int, log: Any = None) -> Any:
        def counted(epoch: int, values: dict[str, float]) -> None:
            log(epoch, values)
            if epoch == 3:
                raise KeyboardInterrupt

        return real(spec, data, groups, seed, counted)

    monkeypatch.setattr(align.run_pal, "trained", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(recipe_path, "pal.epochs=6", "evals=[]")
    monkeypatch.setattr(align.run_pal, "trained", real)
    folder = run(recipe_path, "pal.epochs=6", "evals=[]")
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    one, other = (load_pal(path / "model").state_dict() for path in (whole, folder))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_rows_without_a_name_are_set_aside(recipe_path: Path, tmp_path: Path):
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "Say:", "chosen": " a", "rejected": " b"}) + "\n")
    folder = run(recipe_path, "pal.epochs=1", "evals=[]")
    (fault,) = [json.loads(line) for line in (folder / "rejected_rows.jsonl").read_text().splitlines()]
    assert fault["field"] == "annotator"
    (tmp_path / "bare.jsonl").write_text(json.dumps({"prompt": "Say:", "chosen": " a", "rejected": " b"}) + "\n")
    with pytest.raises(AlignError, match="annotator"):
        run(recipe_path, f"data.train={tmp_path / 'bare.jsonl'}", f"output={tmp_path / 'none'}")


def test_a_dry_run_writes_nothing(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = load_recipe(str(recipe_path))
    train(recipe, source=str(recipe_path), command=[], dry_run=True)
    assert "112 judgements of 7 annotators" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_card_and_report_speak_of_annotators(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Not of an answering model: no chat, and the code that stands in the card runs as it is."""
    folder = run(recipe_path, "pal.epochs=4")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| Known annotators: judgements ranked right, PAL |" in card
    assert "| New annotators: share ranked right, PAL, 4 pairs less one group |" in card
    assert "2406.08469" in card
    assert "align generate" not in card
    assert "text-generation" not in card
    assert "Known annotators: judgements ranked right, PAL" in (folder / "report.html").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.startswith("tensor(")
