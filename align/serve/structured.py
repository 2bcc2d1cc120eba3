"""vLLM's own structured outputs, compiled first in a process that can be killed, as constraints of ours are.

vLLM reads what a plain request asks for in the server's loop, and compiles it in the engine. With xgrammar, its first
choice, a schema of 4 kB took half a minute there, in which the server answered nobody; so ``launch`` has it use
llguidance. What passes here is not read in the loop again. Structural tags become grammars here: vLLM would hand their
schemas over to llguidance as what they are not, and any JSON would do.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Annotated, Any

from llguidance import LLMatcher, StructTag, grammar_from
from pydantic import BaseModel, ConfigDict, Field

from align.decoding.constraints import ConstraintError

from .checker import Checker
from .errors import RefusedError

BACKEND = "guidance"
"""vLLM's name of llguidance."""


async def checked(outputs: Any, asked: Any, checker: Checker) -> AsyncGenerator[Any, None]:
    """The outputs of a request of vLLM's, once what it asks for is known to be harmless.

    Args:
        outputs: the generator of vLLM's engine, not begun.
        asked: vLLM's ``StructuredOutputsParams``; a structural tag becomes the grammar that it is.
        checker: where it is compiled.

    Raises:
        VLLMValidationError: it is no grammar; vLLM makes it 400.
        GracefulHTTPError: from a ``RefusedError``: it takes too long (400), too many wait (429), or what compiles has
            ended (500).
    """
    from vllm.exceptions import GracefulHTTPError, VLLMValidationError
    from vllm.v1.structured_output.request import get_structured_output_key

    try:
        if asked.structural_tag is not None:
            asked.grammar, asked.structural_tag = tagged(asked.structural_tag), None
        kind, spec = get_structured_output_key(asked)
        await checker.check([kind.name, spec])
    except ConstraintError as error:
        raise VLLMValidationError(str(error)) from None
    except RefusedError as refused:
        raise GracefulHTTPError(refused.message, HTTPStatus(refused.status)) from refused
    async with aclosing(outputs):
        async for output in outputs:
            yield output


def read_no_more() -> None:
    """Have vLLM in this process take grammars as they are: it would compile each once more, in the loop.

    Structural tags it reads by xgrammar, whatever draws them, as soon as the body has come.
    """
    from vllm.v1.structured_output import backend_guidance, backend_xgrammar

    backend_guidance.validate_guidance_grammar = lambda sampling_params, tokenizer=None: None
    backend_xgrammar.validate_xgrammar_grammar = lambda sampling_params: None


class Tag(BaseModel):
    """A value in a text, of a JSON schema, between its ``begin`` and its ``end``."""

    model_config = ConfigDict(strict=True)

    begin: str
    content: Annotated[dict[str, Any], Field(alias="schema")]
    end: str


class Tags(BaseModel):
    """A structural tag: what begins with one of the triggers goes on as a tag that begins so.

    Each is compared with each in the loop, so that there may be so many and no more.
    """

    model_config = ConfigDict(strict=True)

    triggers: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=100)]
    structures: Annotated[list[Tag], Field(min_length=1, max_length=1000)]


def tagged(spec: str) -> str:
    """The grammar, in Lark's syntax, of a structural tag.

    Args:
        spec: its JSON.

    Raises:
        RefusedError: 400, it is none, or of the form that has a ``format``.
    """
    from .wire import read

    where = "structural_tag"
    try:
        given = json.loads(spec)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"{where}: not JSON: {error}") from None
    if isinstance(given, dict) and "format" in given:
        raise RefusedError(400, f"{where}: give triggers and structures; the form with format is not drawn here")
    asked = read(Tags, given, where)
    tags = []
    idle = dict.fromkeys(asked.triggers)
    for number, tag in enumerate(asked.structures):
        fitting = [one for one in asked.triggers if tag.begin.startswith(one)]
        if not fitting:
            raise RefusedError(400, f"{where}.structures.{number}.begin: it begins with none of the triggers")
        for one in fitting:
            idle.pop(one, None)
        trigger = min(fitting, key=len)  # text ends as soon as it has come to one
        schema = {"x-guidance": {"whitespace_flexible": True}, **tag.content}
        tags.append(StructTag(trigger=trigger, begin=tag.begin, grammar=schema, end=tag.end))
    if idle:
        raise RefusedError(400, f"{where}.triggers: none of the structures begins with {next(iter(idle))!r}")
    grammar: str = StructTag.to_grammar(tags, assume_special=False)  # <tool> is text, and no token of that name
    return grammar


def problem(kind: str, spec: Any) -> str:
    """What is wrong with a grammar, or nothing: what vLLM's own look at it would say.

    Args:
        kind: name of one of vLLM's ``StructuredOutputOptions``, but for structural tags, see ``tagged``.
        spec: its text.
    """
    try:
        said = LLMatcher.validate_grammar(_program(kind, spec), None)
    except (ValueError, TypeError) as error:
        return f"Invalid grammar specification: {error}"
    return f"Grammar error: {said}" if said else ""


def _program(kind: str, spec: Any) -> str:
    """What vLLM gives llguidance."""
    match kind:
        case "JSON":
            return _json(spec)
        case "JSON_OBJECT":
            return _json('{"type": "object"}')
    grammar: str = grammar_from(kind.lower(), spec)
    return grammar


def _json(schema: Any) -> str:
    grammar: str = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": True})
    return grammar
