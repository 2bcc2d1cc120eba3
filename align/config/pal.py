"""Section ``pal`` and what it asks of the other sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .explain import Problem

TAKEN = ("seed",)


def is_frozen(recipe: Mapping[str, Any]) -> bool:
    """Whether method pal leaves the backbone as it is: what ``pal.frozen`` says, or else that no adapter is named."""
    model, spec = recipe.get("model"), recipe.get("pal")
    given = spec.get("frozen") if isinstance(spec, Mapping) else None
    return given if isinstance(given, bool) else not (isinstance(model, Mapping) and model.get("lora"))


def check_pal(recipe: Mapping[str, Any]) -> list[Problem]:
    """Problems of a recipe with method pal, or with its section and another method."""
    if recipe.get("method") != "pal":
        return [("pal", "belongs to method: pal; remove it")] if recipe.get("pal") is not None else []
    problems = []
    model, training, spec = recipe.get("model"), recipe.get("training"), recipe.get("pal")
    if isinstance(spec, Mapping) and (spec.get("variant"), spec.get("loss")) == ("b", "hinge"):
        problems.append(
            ("pal.loss", "hinge is of variant a; b has the cross-entropy of two answers, which is logistic")
        )
    if isinstance(model, Mapping) and model.get("adapter"):
        problems.append(("model.adapter", "method pal begins without one; merge it and name the merged model"))
    if is_frozen(recipe):
        if isinstance(model, Mapping) and model.get("lora"):
            problems.append(("pal.frozen", "model.lora trains the backbone, and frozen does not: give one"))
        what = "a frozen backbone is not trained by TRL; the settings are those of section pal"
        others = [key for key in training if key not in TAKEN] if isinstance(training, Mapping) else []
        tracking = recipe.get("tracking")
        if isinstance(tracking, Mapping) and tracking.get("integrations"):
            problems.append(("tracking.integrations", f"is of the trainer; {what}"))
        return problems + [(f"training.{key}", what) for key in others]
    return problems
