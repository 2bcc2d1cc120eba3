"""Sections ``groups`` and ``iterate``: training on whole groups of answers, and in rounds on those of the policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from .explain import Problem
from .kinds import group_column
from .online import annotator_problems
from .section import Section


class GroupsSpec(Section):
    """What is learnt of the answers to a prompt."""

    use: Literal["all", "best_and_worst"] = "all"
    """All answers, or the best and the worst of them; prompts where these are worth the same are then left out."""


class IterateSpec(Section):
    """Rounds: the policy answers all prompts, an annotator compares the answers, and method learns from them. What a
    round starts from is its reference.
    """

    annotator: str | dict[str, Any]
    """Who compares the answers, as in section online."""
    rounds: int = Field(default=3, ge=1)
    """How often; training.max_steps and the like are of one round."""
    prompts: int | None = Field(default=None, ge=1)
    """Prompts of a round: the next so many of the data in an order drawn by the seed, from its start again when it
    ends. All of them in every round when not given."""
    answers: int = Field(default=5, ge=2)
    """Answers to a prompt, drawn at temperature 1."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer, tokens."""
    annotator_seconds: float = Field(default=600.0, gt=0)
    """How long the annotator may take for the answers that it is asked about at once."""


def check_groups(recipe: Mapping[str, Any]) -> list[Problem]:
    """Problems of sections ``groups`` and ``iterate``, and of methods that learn from groups of answers."""
    from align.losses import LOSSES

    method, spec = recipe.get("method"), recipe.get("iterate")
    learns = isinstance(method, str) and group_column(method) is not None
    problems = []
    if not learns:
        fitting = ", ".join(name for name in LOSSES if group_column(name))
        for section in ("groups", "iterate"):
            if recipe.get(section) is not None:
                problems.append((section, f"belongs to methods that learn from groups of answers: {fitting}"))
        return problems
    if recipe.get("online") is not None:
        problems += [
            (section, "does not go with online: remove one of the two")
            for section in ("groups", "iterate")
            if recipe.get(section) is not None
        ]
        return problems
    training, data = recipe.get("training"), recipe.get("data")
    if isinstance(training, Mapping) and training.get("eval_strategy", "no") != "no":
        what = "groups have no held-out loss; evals: [generation] compares answers before and after"
        problems.append(("training.eval_strategy", what))
    if not isinstance(spec, Mapping):
        return problems
    problems += annotator_problems("iterate.annotator", spec.get("annotator"))
    if isinstance(data, Mapping) and data.get("filter"):
        problems.append(("data.filter", "filters rows that are learnt from, and iterate makes them itself; remove it"))
    return problems
