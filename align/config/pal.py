"""Section ``pal`` and what it asks of the other sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .explain import Problem

TAKEN = ("seed",)


def check_pal(recipe: Mapping[str, Any]) -> list[Problem]:
    """Problems of a recipe with method pal, or with its section and another method."""
    if recipe.get("method") != "pal":
        return [("pal", "belongs to method: pal; remove it")] if recipe.get("pal") is not None else []
    problems = []
    model, training = recipe.get("model"), recipe.get("training")
    if isinstance(model, Mapping):
        what = "trains the backbone, and method pal reads a frozen one; merge an adapter and name the merged model"
        problems += [(f"model.{key}", what) for key in ("lora", "adapter") if model.get(key)]
    if isinstance(training, Mapping):
        what = "method pal is not trained by TRL; its settings are those of section pal"
        problems += [(f"training.{key}", what) for key in training if key not in TAKEN]
    return problems
