"""The JSON Schema of recipes, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from .explain import STRICT
from .schema import Recipe
from .training import training_fields

NUMBER = {"type": "number"}


def recipe_schema() -> dict[str, Any]:
    """Every key of a recipe, with the settings of all losses and TRL's training fields. Imports TRL: seconds."""
    from align.losses import LOSSES

    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    properties, sections = schema["properties"], schema["$defs"]
    settings = {key: NUMBER for info in LOSSES.values() for key in info.parameters}
    properties["base"] = {"type": "string", "description": "Recipe that gives every key that this one does not set."}
    properties["method"] = {"enum": [*LOSSES, "sft"], "description": properties["method"]["description"]}
    properties["model"] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/ModelSpec"}]}
    properties["loss"] |= {"properties": settings, "additionalProperties": False}
    sections["LossTerm"]["properties"] |= settings
    sections["LossTerm"]["properties"]["name"]["enum"] = list(LOSSES)
    sections["LossTerm"]["additionalProperties"] = False
    properties["training"] |= {"properties": _training(), "additionalProperties": False}
    schema["required"] = []  # a base may give any key
    return schema


def _training() -> dict[str, Any]:
    fields = {**training_fields("kto"), **training_fields("sft"), **training_fields("dpo")}
    return {name: TypeAdapter(hint, config=STRICT).json_schema() for name, hint in sorted(fields.items())}
