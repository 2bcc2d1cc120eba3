"""``method: pal`` with a backbone that is trained: from recipe to report, resumed, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from align.config.load import load_recipe
from align.rewards.models import RewardModel
from align.rewards.pal_model import PalRewardModel
from align.run import train


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, judge) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    known = {f"ann-{number}": number < 4 for number in range(7)}
    judge(folder / "train.jsonl", known, 8, 0)
    judge(folder / "heldout.jsonl", {**known, "eve": True, "mallory": False}, 10, 30)
    recipe: dict[str, Any] = {
        "method": "pal",
        "model": {"name": str(tiny_model_dir), "dtype": "float32", "lora": {"r": 4}},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "heldout.jsonl"), "max_length": 64},
        "pal": {
            "dimension": 8,
            "epochs": 40,
            "batch_size": 32,
            "learning_rate": 3e-3,
            "shots": [1, 4],
            "cache": str(folder / "cache"),
        },
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": 14,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "save_total_limit": 3,
        },
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def run(path: Path, *overrides: str) -> Path:
    return train(load_recipe(str(path), overrides), source=str(path), command=["align", "train", str(path)])


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "eval" / "pal.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def whole(recipe_path: Path) -> Path:
    """A run that nobody stopped."""
    return run(recipe_path, f"output={recipe_path.parent / 'whole'}")


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_from_recipe_to_report(recipe_path: Path, whole: Path, tmp_path: Path, tiny_model_dir: Path, kind: str):
    """Opposed groups of 4 : 3, sure labels: one reward for all is right in 4/7 at most."""
    full = ["model.lora=null", "pal.frozen=false", "pal.baselines=false", f"output={tmp_path / 'run'}"]
    folder = whole if kind == "adapter" else run(recipe_path, *full)
    found = results(folder)
    values = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert values["seen/accuracy/PAL"] >= 0.9
    if kind == "adapter":
        assert max(values["seen/accuracy/one group"], values["seen/accuracy/Bradley-Terry"]) <= 4 / 7 + 1e-9
    else:
        assert not any("one group" in name or "Bradley-Terry" in name for name in values)
    assert values["seen/macro/PAL"] == pytest.approx(values["seen/accuracy/PAL"])
    assert "unseen/accuracy/PAL, 4 pairs" in values
    assert {row["annotator"] for row in found["rows"]} == {*(f"ann-{n}" for n in range(7)), "eve", "mallory"}
    assert ("each" in found["settings"]["backbone"]) is (kind == "adapter")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "finished"
    assert manifest["model"]["trainable"] > 0
    assert not (folder / "compared").exists()
    assert (folder / "report.html").is_file()

    model = PalRewardModel.from_pretrained(folder / "model").choose("annotator:ann-0")
    plain = RewardModel.create(tiny_model_dir)
    moved = [
        name
        for name, weight in model.carrier.model.state_dict().items()
        if not torch.equal(weight, plain.carrier.model.state_dict()[name])
    ]
    assert moved, "gradients reached the backbone"
    rows = [
        json.loads(line) for line in (recipe_path.parent / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    mine = [row for row in rows if row["annotator"] == "ann-0"]
    prompts = [row["prompt"] for row in mine]
    gap = model.rewards(prompts, [r["chosen"] for r in mine]) - model.rewards(prompts, [r["rejected"] for r in mine])
    (line,) = [row for row in found["rows"] if row["annotator"] == "ann-0"]
    assert float((gap > 0).float().mean()) == line["PAL"]


def test_an_interrupted_run_goes_on(recipe_path: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped in training, and again in the comparison: the numbers and the weights are those of one run."""
    import align.run_pal
    from align.trainers.pal_backbone import PalTrainer

    output = f"output={tmp_path / 'run'}"
    step = PalTrainer.training_step

    def stopping(self: PalTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        found: torch.Tensor = step(self, *args, **kwargs)
        return found

    monkeypatch.setattr(PalTrainer, "training_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(recipe_path, output)
    monkeypatch.setattr(PalTrainer, "training_step", step)
    real = align.run_pal.build_reward

    def stopped(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(align.run_pal, "build_reward", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(recipe_path, output)
    assert (tmp_path / "run" / "compared" / "one group" / "checkpoint-6").is_dir()
    monkeypatch.setattr(align.run_pal, "build_reward", real)
    folder = run(recipe_path, output)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    first, second = (PalRewardModel.from_pretrained(path / "model").state_dict() for path in (whole, folder))
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)
    assert results(folder)["metrics"].keys() == results(whole)["metrics"].keys()


def test_a_dry_run_shows_the_steps(recipe_path: Path, capsys: pytest.CaptureFixture[str]):
    train(load_recipe(str(recipe_path)), source="", command=[], dry_run=True)
    assert "6 steps of 14" in capsys.readouterr().out
    assert not (recipe_path.parent / "run").exists()
