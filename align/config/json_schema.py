"""The JSON Schema of recipes, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from align.losses.catalogue import LossInfo
from align.losses.checks import setting_hints

from .explain import STRICT
from .kinds import WITHOUT_LOSSES, reward_kind
from .schema import Recipe
from .training import training_fields


def recipe_schema() -> dict[str, Any]:
    """Every key of a recipe, with the settings of all losses and TRL's training fields. Imports TRL: seconds."""
    from align.losses import LOSSES

    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    properties, sections = schema["properties"], schema["$defs"]
    trained = {name: info for name, info in LOSSES.items() if info.kind in ("pair", "thumbs") or reward_kind(name)}
    settings = {key: kind for info in trained.values() for key, kind in _settings(info).items()}
    properties["base"] = {"type": "string", "description": "Recipe that gives every key that this one does not set."}
    properties["method"] = {"enum": [*trained, *WITHOUT_LOSSES], "description": properties["method"]["description"]}
    properties["model"] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/ModelSpec"}]}
    properties["loss"] |= {"properties": settings, "additionalProperties": False}
    sections["LossTerm"]["properties"] |= settings
    pairs = [name for name, info in trained.items() if info.kind == "pair"]
    sections["LossTerm"]["properties"]["name"]["enum"] = pairs
    sections["LossTerm"]["additionalProperties"] = False
    properties["training"] |= {"properties": _training(), "additionalProperties": False}
    schema["required"] = []  # a base may give any key
    return schema


def _settings(info: LossInfo) -> dict[str, Any]:
    hints = setting_hints(info.function)
    return {key: TypeAdapter(hints[key], config=STRICT).json_schema() for key in info.parameters}


def _training() -> dict[str, Any]:
    methods = ("grpo", "bradley_terry", "kto", "sft", "dpo")
    fields = {name: hint for method in methods for name, hint in training_fields(method).items()}
    fields |= training_fields(None, gives=True)
    return {name: TypeAdapter(hint, config=STRICT).json_schema() for name, hint in sorted(fields.items())}
