"""What is wrong with a value, in words."""

from __future__ import annotations

import difflib
import enum
import json
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

Problem = tuple[str, str]
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a section of 'key: value' lines",
    type(None): "null",
}
RULES = {
    "greater_than": ("be over", "gt"),
    "greater_than_equal": ("be at least", "ge"),
    "less_than": ("be below", "lt"),
    "less_than_equal": ("be at most", "le"),
}


def nearest(word: str, known: Iterable[str], cutoff: float = 0.7) -> str | None:
    """The most similar of ``known``, if any is similar."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def said(value: object) -> str:
    """A value as YAML would write it, cut at 60 characters."""
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def describe(annotation: Any) -> str:
    """A type in words: ``int | None`` is 'a whole number'."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(arguments[0])
    if origin is Literal:
        return _one_of([said(a).strip("'") for a in arguments])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in arguments if a is not type(None))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _one_of([str(member.value) for member in annotation])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return NAMES[dict]
    plain = origin or annotation
    return NAMES.get(plain, str(getattr(plain, "__name__", plain)))


def type_problem(value: object, annotation: Any) -> str | None:
    """Why ``value`` does not fit ``annotation`` (a type, with pydantic's constraints where it has some), or None."""
    try:
        TypeAdapter(annotation, config=STRICT).validate_python(value)
    except ValidationError as error:
        return _sentence(value, annotation, error.errors()[0])
    return None


def unknown_key(key: str, siblings: Mapping[str, str], elsewhere: Mapping[str, str]) -> str:
    """What to say of an unknown key. Both mappings lead from a key to its full, dotted name."""
    if near := nearest(key, siblings):
        return f"unknown key; did you mean {siblings[near]}?"
    if near := nearest(key, elsewhere, cutoff=0.85):
        return f"unknown key; did you mean {elsewhere[near]}?"
    known = ", ".join(sorted(siblings))
    return f"unknown key; known here: {known}" if siblings and len(known) < 160 else "unknown key"


def unknown_name(name: object, known: Iterable[str], kind: str, listing: str) -> str:
    """What to say of a name that is in no list; ``listing`` is the command that prints the list."""
    near = nearest(str(name), known, cutoff=0.6)
    hint = f"did you mean {near}?" if near else f"see `{listing}`"
    return f"{said(name)} is not a known {kind}; {hint}"


def model_problems(
    error: ValidationError, model: type[BaseModel], data: Mapping[str, Any], elsewhere: Mapping[str, str]
) -> list[Problem]:
    """The problems of a recipe that pydantic found, one per key; ``elsewhere``: see ``unknown_key``."""
    found: dict[str, str] = {}
    for detail in error.errors():
        if detail["type"] == "default_factory_not_called":  # it waits for another key, which is named itself
            continue
        keys, annotation, value = _locate(detail["loc"], model, data)
        where = ".".join(keys)
        if detail["type"] == "extra_forbidden":
            parent = _locate(detail["loc"][:-1], model, data)[1]
            prefix = [*keys[:-1]]
            siblings = {name: ".".join([*prefix, name]) for name in _section(parent).model_fields}
            found.setdefault(where, unknown_key(keys[-1], siblings, elsewhere))
        elif detail["type"] == "missing":
            found.setdefault(where, "is missing")
        else:
            found.setdefault(where, _sentence(value, annotation, detail))
    return list(found.items())


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every key below ``model`` that is no section, with its dotted name."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        named_by_user = any(get_origin(member) is dict for member in _members(field.annotation))
        if section is BaseModel or named_by_user:
            found.setdefault(name, f"{prefix}{name}")
        else:
            found.update({k: v for k, v in leaves(section, f"{prefix}{name}.").items() if k not in found})
    return found


def _one_of(choices: list[str]) -> str:
    return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]


def _sentence(value: object, annotation: Any, detail: Mapping[str, Any]) -> str:
    if detail["type"] in RULES:
        words, bound = RULES[detail["type"]]
        return f"is {said(value)}; it must {words} {detail['ctx'][bound]:g}"
    if detail["type"] in ("string_too_short", "too_short"):
        return "is empty"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if detail["type"] == "finite_number":
        return f"is {value}; it must be finite"
    if detail["type"] == "string_pattern_mismatch":
        return f"{said(value)} is not of the form module:function"
    if isinstance(value, float) and value.is_integer() and describe(annotation) == NAMES[int]:
        return f"{value} is not written as a whole number; write {int(value)}"
    expected = describe(annotation)
    choices = expected.removeprefix("one of ").split(", ")
    if isinstance(value, str) and (near := nearest(value, choices)):
        return f"{said(value)} is not a known value; did you mean {near}?"
    return f"{said(value)} is not {expected}"


def _section(annotation: Any) -> type[BaseModel]:
    """The model inside ``Model | None`` or ``list[Model]``; BaseModel itself, without fields, for anything else."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [_section(argument) for argument in get_args(annotation)]
    return next((section for section in inner if section is not BaseModel), BaseModel)


def _locate(
    loc: Iterable[int | str], model: type[BaseModel], data: Mapping[str, Any]
) -> tuple[list[str], Any, object]:
    """Keys, annotation and value at a pydantic location, leaving out the names of union members that it adds."""
    keys: list[str] = []
    annotation: Any = model
    value: Any = data
    for part in loc:
        if isinstance(part, int):
            if not isinstance(value, list):
                break
            annotation = next((get_args(a)[0] for a in _members(annotation) if get_origin(a) is list), annotation)
            value = value[part]
        else:
            fields = _section(annotation).model_fields
            if part not in fields and not (isinstance(value, dict) and part in value):
                break
            annotation = fields[part].annotation if part in fields else annotation
            value = value.get(part) if isinstance(value, dict) else None
        keys.append(str(part))
    return keys, annotation, value


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
