"""Every shipped recipe takes a step, with its own settings and dtype, on a tiny model and a few of its own rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import align.recipes
from align.config.load import load_recipe, shipped_recipes
from align.config.schema import Recipe
from align.run import train

FOLDER = Path(align.recipes.__file__).parent
HUB = {"trl-lib/ultrafeedback_binarized": "quickstart", "nvidia/HelpSteer2": "quickstart"}
"""Packaged rows that stand for those of the hub."""


def some_rows(source: str, folder: Path, attributes: list[str]) -> Path:
    """A few short rows of a source, since the tiny tokenizer makes a token of each byte; rated, if asked."""
    name, _, split = source.partition(":")
    data, split = (HUB[name], "train" if split == "train" else "heldout") if name in HUB else split.split("/")
    rows = [json.loads(line) for line in (FOLDER / "data" / f"{data}_{split}.jsonl").read_text("utf-8").splitlines()]
    if data == "cycles":
        rows = rows[:12]  # four circles of three
    else:
        rows = sorted(rows, key=lambda row: len(json.dumps(row, ensure_ascii=False)))[:40]
    if name in HUB:
        rows = [of_the_hub(row, attributes) for row in rows]
    path = folder / f"{data}_{split}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def of_the_hub(row: dict[str, Any], attributes: list[str]) -> dict[str, Any]:
    """As the hub's rows are: a prompt inside both answers, or one response with its ratings."""
    if attributes:
        return {"prompt": row["prompt"], "response": row["chosen"], **dict.fromkeys(attributes, 3)}
    return {side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")}


def overrides(recipe: Recipe, model: Path, folder: Path) -> list[str]:
    attributes = recipe.reward.attributes if recipe.reward else []
    found = [f"output={folder / 'run'}", f"model.name={model}"]
    for split, source in (("train", recipe.data.train), ("eval", str(recipe.data.eval))):
        found.append(f"data.{split}={some_rows(source, folder, attributes)}")
    found.append("data.max_length=512")
    if recipe.training:
        found.append("training.max_steps=1")
    if "gradient_accumulation_steps" in recipe.training and not recipe.grpo:
        found += ["training.gradient_accumulation_steps=1", "training.per_device_train_batch_size=2"]
    if recipe.grpo:
        found.append("grpo.max_completion_length=4")
    if recipe.online:
        found += ["online.max_new_tokens=4", "online.eval_prompts=2"]
    if recipe.iterate:
        found += ["iterate.rounds=1", "iterate.prompts=4", "iterate.answers=2", "iterate.max_new_tokens=4"]
    if "generation" in recipe.evals:
        found += ["generation.prompts=4", "generation.max_new_tokens=4"]
    return found


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_takes_a_step(name: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    recipe = load_recipe(name)
    changed = overrides(recipe, tiny_model_dir, tmp_path)
    folder = train(load_recipe(name, changed), source=name, command=["align", "train", name, *changed])
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "finished"
    assert {path.stem for path in (folder / "eval").glob("*.json")} >= set(recipe.evals)
    assert (folder / "report.html").stat().st_size > 10_000
