"""What online training keeps on disk: the answers of each step, and those of the step in hand with a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from align.tracking.files import write_text

from .grouped import Group

SAMPLES = "samples.jsonl"


def step_of(checkpoint: Path) -> int:
    """The optimiser step that a checkpoint is of.

    Raises:
        ValueError: the folder is no checkpoint.
    """
    path = checkpoint / "trainer_state.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"resume_from_checkpoint: {checkpoint} is no checkpoint: {path.name}: {error}") from error


def forget_after(path: Path, step: int) -> None:
    """Leave out the samples of steps after ``step``, which are drawn again, and a line that a kill has torn."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= step:
            kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))


def has_verdicts(path: Path) -> bool:
    """Whether a step of the samples has a verdict on any pair."""
    if not path.exists():
        return False
    tables = (json.loads(line)["preference"] for line in path.read_text(encoding="utf-8").split("\n") if line)
    pairs = (value for table in tables for row, values in enumerate(table or ()) for value in values[:row])
    return any(value is not None and not math.isnan(value) for value in pairs)


def written(group: Group) -> dict[str, Any]:
    """A group as JSON; NaN as Python writes it."""
    found = dict(vars(group))
    for name in ("preference", "scores", "win_rates"):
        found[name] = None if found[name] is None else found[name].tolist()
    return found


def read(found: dict[str, Any]) -> Group:
    """What ``written`` made."""
    for name in ("preference", "scores", "win_rates"):
        found[name] = None if found[name] is None else torch.tensor(found[name], dtype=torch.float64)
    return Group(**found)
