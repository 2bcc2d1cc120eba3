"""Whole runs of reward models: the shipped recipes on a tiny model, what they leave, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from align.config.load import load_recipe
from align.data.splits import read_split
from align.errors import AlignError
from align.rewards.models import RewardModel
from align.run import train

KINDS = {"reward_bt": "scalar", "reward_scaled_bt": "scalar", "reward_regression": "attributes", "reward_gpm": "gpm"}


def run(source: str | Path, *overrides: str) -> Path:
    recipe = load_recipe(str(source), list(overrides))
    return train(recipe, source=str(source), command=["align", "train", str(source), *overrides])


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def suite(folder: Path) -> dict:
    return json.loads((folder / "eval" / "reward.json").read_text())


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory, pairs_file: Path, heldout_file: Path) -> tuple[Path, Path]:
    """The pairs with a judge's scores of both answers; the rejected answer ends in "no"."""
    folder, found = tmp_path_factory.mktemp("scored"), []
    for path in (pairs_file, heldout_file):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for number, row in enumerate(rows):
            row |= {"chosen_reward": 1 + number % 3, "rejected_reward": 0.5}
        found.append(folder / f"{path.stem}.jsonl")
        found[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found[0], found[1]


def tiny(tiny_model_dir: Path, scored: tuple[Path, Path], output: Path, steps: int = 40) -> list[str]:
    return [
        f"model.name={tiny_model_dir}",
        "model.dtype=float32",
        "model.lora.r=4",
        f"data.train={scored[0]}",
        f"data.eval={scored[1]}",
        f"output={output}",
        "training.learning_rate=5e-3",
        f"training.max_steps={steps}",
        "training.logging_steps=1",
    ]


@pytest.mark.parametrize("name", KINDS)
def test_the_shipped_recipe_learns_and_leaves_everything(name, tmp_path, tiny_model_dir, scored):
    """That "no" is bad is heard in some held-out answers after forty steps on 24 pairs."""
    folder = run(name, *tiny(tiny_model_dir, scored, tmp_path / "run"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["model"]["reward"]) == ("finished", KINDS[name])
    assert manifest["model"]["trainable"] < manifest["model"]["parameters"]
    assert manifest["merged"]["mean_change"] < 1e-4
    found = suite(folder)["metrics"]
    assert found["accuracy"]["value"] > (0.5 if name == "reward_regression" else 0.65)
    assert found["accuracy"]["n"] == 24  # prompts
    if name == "reward_regression":
        assert found["rmse_reward"]["value"] < found["spread_reward"]["value"] * 1.1
    else:
        assert found["log_loss"]["value"] > 0
    model = RewardModel.from_pretrained(folder / "model")
    assert (model.config.kind, model.config.training, model.config.max_length) == (KINDS[name], "full", 256)
    page, card = (folder / "report.html").read_text(), (folder / "README.md").read_text()
    assert "Held-out pairs ranked right by the reward model" in page
    assert "RewardModel.from_pretrained" in card
    assert "--chat" not in card


def test_the_saved_model_scores_as_the_suite_did(tmp_path, tiny_model_dir, scored):
    folder = run("reward_bt", *tiny(tiny_model_dir, scored, tmp_path / "run", steps=3))
    rows = [json.loads(line) for line in scored[1].read_text().splitlines()]
    model = RewardModel.from_pretrained(folder / "model")
    scores = model.score_pairs(
        [row["prompt"] for row in rows], [row["chosen"] for row in rows], [row["rejected"] for row in rows]
    )
    assert scores.tolist() == pytest.approx([row["score"] for row in suite(folder)["rows"]], abs=1e-4)
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert plain.config.num_labels == 1


def test_the_saved_model_refuses_what_training_set_aside(tmp_path, tiny_model_dir, scored):
    """And its scores of pairs are what the suite tells, in log-odds: the same with a tau of .5."""
    options = [*tiny(tiny_model_dir, scored, tmp_path / "run", steps=1), "reward.over_long=set_aside", "loss.tau=0.5"]
    model = RewardModel.from_pretrained(run("reward_gpm", *options) / "model")
    limit = model.config.max_length
    assert model.config.over_long == "error"
    with pytest.raises(ValueError, match=rf"over max_length {limit:,}"):
        model.score(["say"], ["x" * limit])
    rows = [json.loads(line) for line in scored[1].read_text().splitlines()]
    found = model.score_pairs(*([row[name] for row in rows] for name in ("prompt", "chosen", "rejected")))
    told = [row["score"] for row in suite(tmp_path / "run")["rows"]]
    assert found.tolist() == pytest.approx(told, abs=1e-3)
    assert suite(tmp_path / "run")["settings"]["tau"] == 0.5


def test_a_preference_model_that_is_gone_on_from_keeps_its_tau(tmp_path, tiny_model_dir, scored, caplog):
    """Unless the recipe says another one, which is told."""
    first = run("reward_gpm", *tiny(tiny_model_dir, scored, tmp_path / "first", steps=1), "loss.tau=0.5")
    for said, tau in (([], 0.5), (["loss.tau=0.2"], 0.2)):
        caplog.clear()
        second = run("reward_gpm", *tiny(first / "model", scored, tmp_path / f"to-{tau}", steps=1), *said)
        assert json.loads((second / "model" / "reward.json").read_text())["tau"] == tau
        assert json.loads((second / "manifest.json").read_text())["model"]["tau"] == tau
        assert ("its tau goes from 0.5 to 0.2" in caplog.text) is bool(said)


def test_cycles_that_are_not_there_are_told_before_training(tmp_path, tiny_model_dir, scored):
    with pytest.raises(AlignError, match="no pairs run in a circle"):
        run("reward_gpm", *tiny(tiny_model_dir, scored, tmp_path / "run", steps=1), "evals=[cycles]")
    assert not (tmp_path / "run" / "model").exists()


def test_the_report_says_what_one_score_an_answer_can_have_at_most(tmp_path, tiny_model_dir):
    """Four answers in a circle and three: at most (3 + 2) / 7 of the pairs, whatever the reward."""
    circles = {"Say one": "abcd", "Say two": "xyz"}
    rows = [
        {"prompt": prompt, "chosen": f" {one}", "rejected": f" {other}"}
        for prompt, answers in circles.items()
        for one, other in zip(answers, answers[1:] + answers[:1], strict=True)
    ]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.{name}={tmp_path / name}.jsonl" for name in ("train", "eval")]
    options = [*tiny(tiny_model_dir, (tmp_path, tmp_path), tmp_path / "run", steps=1), *data, "evals=[reward,cycles]"]
    folder = run("reward_bt", *options)
    found = json.loads((folder / "eval" / "cycles.json").read_text())
    assert found["metrics"]["ceiling"]["value"] == pytest.approx(5 / 7)
    assert found["metrics"]["accuracy"]["value"] <= 5 / 7 + 1e-12
    assert found["metrics"]["whole"]["value"] == 0
    assert [len(row["scores"]) for row in found["rows"]] == [4, 3]
    page = (folder / "report.html").read_text()
    assert "Held-out cycles: the most that any one score an answer can rank right" in page
    assert "Held-out cycles of 3: pairs ranked right" in page


def test_scaled_bradley_terry_goes_on_from_a_regression(tmp_path, tiny_model_dir, scored):
    """Its first scores rank held-out answers as the regression's ratings did."""
    first = run("reward_regression", *tiny(tiny_model_dir, scored, tmp_path / "first"))
    options = tiny(first / "model", scored, tmp_path / "second", steps=1)
    second = run("reward_scaled_bt", *options, "training.learning_rate=0.0")
    assert suite(second)["metrics"]["accuracy"]["value"] == suite(first)["metrics"]["accuracy"]["value"]
    with pytest.raises(AlignError, match="a reward model of kind attributes, and method gpm trains one of gpm"):
        run("reward_gpm", *tiny(first / "model", scored, tmp_path / "third", steps=1))


def test_interrupted_and_gone_on_equals_uninterrupted(tmp_path, tiny_model_dir, scored, monkeypatch):
    from align.trainers.reward import RewardTrainer

    whole = run("reward_bt", *tiny(tiny_model_dir, scored, tmp_path / "whole", 6), "training.save_steps=2")
    options = [*tiny(tiny_model_dir, scored, tmp_path / "broken", 6), "training.save_steps=2"]
    step = RewardTrainer.training_step

    def breaking(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RewardTrainer, "training_step", breaking)
        with pytest.raises(KeyboardInterrupt):
            run("reward_bt", *options)
    broken = run("reward_bt", *options)
    assert json.loads((broken / "manifest.json").read_text())["resumed"]
    assert [row["loss"] for row in metrics(whole)] == [row["loss"] for row in metrics(broken)]
    for name in ("model.safetensors", "reward.safetensors"):
        one, other = (load_file(folder / "model" / name) for folder in (whole, broken))
        for key, tensor in one.items():
            assert torch.equal(tensor, other[key]), key
    assert suite(whole) == suite(broken)


def test_over_long_rows_are_counted_in_the_manifest(tmp_path, tiny_model_dir, tiny_tokenizer, scored):
    rows = read_split(str(scored[0]), tiny_tokenizer, None, kind="pairs").tokenized.rows
    longest = max(len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids)) for row in rows)
    options = [*tiny(tiny_model_dir, scored, tmp_path / "run", steps=1), f"data.max_length={longest - 1}"]
    facts = json.loads((run("reward_bt", *options) / "manifest.json").read_text())["data"]["train"]
    assert facts["over_long"] > 0
    assert facts["truncated_chosen"] + facts["truncated_rejected"] >= facts["over_long"]
    aside = [*options, "reward.over_long=set_aside", "data.max_bad_fraction=1.0", f"output={tmp_path / 'aside'}"]
    other = json.loads((run("reward_bt", *aside) / "manifest.json").read_text())["data"]["train"]
    assert other["set_aside"] >= facts["over_long"]
    assert other["pairs"] == facts["pairs"] - facts["over_long"]


def test_dry_run(tmp_path, tiny_model_dir, scored, capsys):
    recipe = load_recipe("reward_bt", tiny(tiny_model_dir, scored, tmp_path / "run"))
    train(recipe, source="r", command=[], dry_run=True)
    assert "24 rows · 40 steps of 8" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
