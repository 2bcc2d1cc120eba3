"""A recipe of two pairs, to be bent by the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

Write = Callable[..., str]


@pytest.fixture
def held_out(tmp_path: Path) -> dict[str, str]:
    """A ``data`` section with a file to train on and another to evaluate on."""
    found = {key: str(tmp_path / f"{key}.jsonl") for key in ("train", "eval")}
    for path in found.values():
        Path(path).write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return found


@pytest.fixture
def write_recipe(tmp_path: Path) -> Write:
    """``write_recipe(**keys)`` writes a sound recipe with these top-level keys changed (None: left out)."""
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')

    def write(name: str = "mine.yaml", **keys: object) -> str:
        sound = {
            "method": "ln_dpo",
            "model": "some/model",
            "data": {"train": str(data)},
            "output": str(tmp_path / "run"),
        }
        recipe = {key: value for key, value in {**sound, **keys}.items() if value is not None}
        (tmp_path / name).write_text(yaml.safe_dump(recipe))
        return str(tmp_path / name)

    return write
