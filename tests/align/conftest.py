"""Small runs: a tiny model, a few pairs, a recipe."""

from __future__ import annotations

import json
import random
import struct
import time
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


@pytest.fixture(scope="session")
def wandb_records() -> Callable[[Path], list[Any]]:
    """``wandb_records(file)``: the records of a ``.wandb`` file, by W&B's own protobuf classes."""
    return ended_records_of


def ended_records_of(path: Path) -> list[Any]:
    """``records_of`` a run that has ended: on a busy machine W&B's own process writes on after ``finish``."""
    until = time.monotonic() + 30
    while True:
        records = records_of(path)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < until, f"{path}: no end of the run"
        time.sleep(0.1)


def records_of(path: Path) -> list[Any]:
    """The records of a ``.wandb`` file: a 7-byte header, then LevelDB log blocks of 32 KiB.

    A fragment is crc32 (4 bytes), length (2), type (1: full, 2: first, 3: middle, 4: last), data.
    """
    from wandb.proto import wandb_internal_pb2

    data, offset, parts, records = path.read_bytes(), 7, b"", []
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


@pytest.fixture(scope="session")
def pal_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Two groups that want opposite things: ann likes `` yes yes`` as an answer to ``Say:``, bob `` no``."""
    import torch

    from align.rewards.pal import PalA
    from align.rewards.pal_model import PalRewardModel

    torch.manual_seed(0)
    model = PalRewardModel.create(tiny_model_dir, kind="pal", frozen=True, dtype=torch.float32)
    pal = PalA(model.hidden_size, ["ann", "bob"], groups=2, dimension=1, depth=0)
    yes, no = (model.embed(["Say:"], [end])[0][0] for end in (" yes yes", " no"))
    with torch.no_grad():
        pal.projector.enter.weight.copy_((2 * (yes - no) / (yes - no).norm() ** 2)[None])
        pal.projector.enter.bias.copy_(-1 - pal.projector.enter.weight @ no)  # no lies at -1, and yes at 1
        pal.prototypes.copy_(torch.tensor([[3.0], [-3.0]]))
        pal.logits.weight.copy_(torch.tensor([[2.0, -2.0], [-2.0, 2.0]]))
    folder = tmp_path_factory.mktemp("pal") / "two"
    model.attach(pal).save_pretrained(folder)
    return folder
