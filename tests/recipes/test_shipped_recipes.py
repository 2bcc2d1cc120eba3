"""Every shipped recipe takes a step, with its own settings and dtype, on a tiny model and a few of its own rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import align.recipes
from align.config.load import load_recipe
from align.run import train

FOLDER = Path(align.recipes.__file__).parent
RECIPES = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))}


def some_rows(source: str, folder: Path) -> Path:
    """The shortest of the packaged rows, since the tiny tokenizer makes a token of each byte."""
    data, split = source.removeprefix("align:").split("/")
    lines = (FOLDER / "data" / f"{data}_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    path = folder / f"{data}_{split}.jsonl"
    path.write_text("\n".join(sorted(lines, key=len)[:40]) + "\n", encoding="utf-8")
    return path


def overrides(recipe: dict[str, Any], model: Path, folder: Path) -> list[str]:
    found = [f"output={folder / 'run'}"]
    found.append(f"model={model}" if isinstance(recipe["model"], str) else f"model.name={model}")
    found += [f"data.{split}={some_rows(recipe['data'][split], folder)}" for split in ("train", "eval")]
    found.append("data.max_length=512")
    if "training" in recipe:
        found.append("training.max_steps=1")
    if "grpo" in recipe:
        found.append("grpo.max_completion_length=4")
    if "generation" in recipe:
        found += ["generation.prompts=4", "generation.max_new_tokens=4"]
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_takes_a_step(name: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    changed = overrides(RECIPES[name], tiny_model_dir, tmp_path)
    folder = train(load_recipe(name, changed), source=name, command=["align", "train", name, *changed])
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "finished"
    assert {path.stem for path in (folder / "eval").glob("*.json")} >= set(RECIPES[name].get("evals", ()))
    assert (folder / "report.html").stat().st_size > 10_000
