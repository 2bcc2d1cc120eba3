"""``metrics.jsonl``: one JSON object per logged step, whole lines only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.errors import AlignError

from .files import write_text


def metrics_line(step: int, seconds: float, values: Mapping[str, Any]) -> str:
    """One line, newline included.

    Args:
        step: optimiser steps done.
        seconds: since the start of training.
        values: names as logged; NaN and infinity are written as null and their names listed under ``nonfinite``.
    """
    row: dict[str, Any] = {"step": step, "seconds": round(seconds, 3)}
    lost = []
    for name, value in values.items():
        value = value.item() if hasattr(value, "item") else value  # numpy and torch scalars
        if isinstance(value, float) and not math.isfinite(value):
            lost.append(name)
            row[name] = None
        else:
            row[name] = value
    if lost:
        row["nonfinite"] = lost
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows in file order; a last line without its newline was torn by a kill and is left out.

    Raises:
        AlignError: a line in the middle is not a JSON object.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise AlignError(f"{path}: line {number} is not JSON ({error.msg}); remove the line and go on") from None
        if not isinstance(row, dict) or "step" not in row:
            raise AlignError(f"{path}: line {number} has no step; remove the line and go on")
        rows.append(row)
    return rows


def truncate_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the rows after ``step`` and a torn last line, in one step; returns the rows that stay.

    A run that goes on from the checkpoint of ``step`` logs those steps again: without this they would stand twice.
    """
    if not path.exists():
        return []
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return kept


def _whole_lines(path: Path) -> list[str]:
    """The lines that end in a newline."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
