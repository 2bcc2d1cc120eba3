"""Section ``reward`` and what training a reward model asks of the other sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from .explain import Problem
from .kinds import reward_kind
from .schema import RewardSpec

MARGIN_OR_STRENGTH = ("margin_bradley_terry", "scaled_bradley_terry")


def check_reward_model(recipe: Mapping[str, Any]) -> list[Problem]:
    """Problems of a recipe that trains a reward model, or that has its section and trains none."""
    method, given = recipe.get("method"), recipe.get("reward")
    problems = _terms(recipe.get("losses"))
    kind = reward_kind(method) if isinstance(method, str) else None
    if kind is None:
        if given is not None:
            what = "belongs to methods that train a reward model, such as bradley_terry; remove it"
            problems.append(("reward", what))
        return problems
    try:
        spec = RewardSpec.model_validate(given or {})
    except ValidationError:
        return problems  # told already, key by key
    model = recipe.get("model")
    if isinstance(model, Mapping):
        if model.get("adapter"):
            problems.append(("model.adapter", "a reward model is gone on from by its folder: give it as model.name"))
        if spec.frozen and model.get("lora"):
            problems.append(("reward.frozen", "model.lora trains the backbone, and frozen does not: give one"))
    if spec.centering and kind != "scalar":
        problems.append(("reward.centering", f"centres the scores of scalar models, and method {method} has none"))
    if spec.gap_of is not None and method not in MARGIN_OR_STRENGTH:
        what = f"gives margins and strengths, which method {method} does not read; it is for "
        problems.append(("reward.gap_of", what + " and ".join(MARGIN_OR_STRENGTH)))
    if kind == "attributes" and not spec.attributes:
        problems.append(("reward.attributes", "is missing: the columns of ratings, such as [helpfulness]"))
        return problems
    return problems + _unfit(kind, spec)


def _unfit(kind: str, spec: RewardSpec) -> list[Problem]:
    """What the model itself says of the settings."""
    from align.rewards.carrier import RewardConfig

    try:
        RewardConfig.of(
            kind=kind,
            eos_token_id=0,
            backbone="",
            dimension=spec.dimension,
            attributes=spec.attributes,
            ranking=spec.ranking,
            gate=spec.gate,
        )
    except ValueError as error:
        return [("reward", str(error))]
    return []


def _terms(terms: Any) -> list[Problem]:
    names = [(i, term.get("name")) for i, term in enumerate(terms or []) if isinstance(term, Mapping)]
    return [
        (f"losses.{index}.name", f"{name} trains a reward model and stands alone; write method: {name}")
        for index, name in names
        if isinstance(name, str) and reward_kind(name) is not None
    ]
