"""Small runs: a tiny model, a few pairs, a recipe."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

WORDS = ["the", "cat", "inner", "thing", "another", "garden", "apple", "hint", "then", "there", "think", "an", "ant"]


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs of chat messages; the rejected answer is the one that ends in "no"."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    write_pairs(path, seed=0)
    return path


@pytest.fixture(scope="session")
def heldout_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 other pairs of the same kind."""
    path = tmp_path_factory.mktemp("data") / "heldout.jsonl"
    write_pairs(path, seed=1)
    return path


def write_pairs(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    lines = []
    for number in range(24):
        chosen, rejected = (" ".join(rng.choices(WORDS, k=4)) for _ in range(2))
        row = {
            "prompt": [{"role": "user", "content": f"say {number} {rng.choice(WORDS)}"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": f"{rejected} no"}],
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


RULE = """
def longer(prompts, completions):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture(scope="session")
def users_rule(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A reward of the user's own, in a module on the path."""
    folder = tmp_path_factory.mktemp("rule")
    (folder / "users_rule.py").write_text(RULE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield "users_rule:longer"


@pytest.fixture(scope="session")
def recipe_in(tiny_model_dir: Path, pairs_file: Path, heldout_file: Path, users_rule: str) -> Callable[..., Path]:
    """``recipe_in(folder, loss={"beta": 1.0}, ...)`` writes a recipe of six steps on the tiny model; its path."""

    def write(folder: Path, name: str = "recipe.yaml", **changes: Any) -> Path:
        recipe: dict[str, Any] = {
            "method": "ln_dpo",
            "model": {"name": str(tiny_model_dir), "dtype": "float32", "lora": {"r": 4}},
            "data": {"train": str(pairs_file), "eval": str(heldout_file), "max_length": 128},
            "loss": {"beta": 5.0},
            "training": {"learning_rate": 5.0e-3, "max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2},
            "generation": {"reward": users_rule, "prompts": 8, "max_new_tokens": 12},
            "output": str(folder / "run"),
        }
        for key, value in changes.items():
            recipe[key] = (
                {**recipe[key], **value} if isinstance(value, dict) and isinstance(recipe.get(key), dict) else value
            )
        path = folder / name
        path.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_recipe(
    tmp_path: Path, recipe_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """``write_recipe(loss={"beta": 1.0}, ...)`` is ``recipe_in`` the test's own folder, which is on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    return partial(recipe_in, tmp_path)


@pytest.fixture(scope="session")
def judge() -> Callable[[Path, dict[str, bool], int, int], None]:
    """``judge(path, annotators, count, start)`` writes judgements of ``count`` questions.

    Annotators who are true like the answer that says yes; the others like the one that says no.
    """

    def write(path: Path, annotators: dict[str, bool], count: int, start: int) -> None:
        lines = []
        for number in range(start, start + count):
            first, second = WORDS[number % 8], WORDS[number // 8 % 8]
            yes, no = (f"{first} {second} {end}" for end in ("yes yes", "no"))
            for name, likes_yes in annotators.items():
                chosen, rejected = (yes, no) if likes_yes else (no, yes)
                prompt = f"Say {WORDS[number % 7]}:"
                lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected, "annotator": name}))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return write
