"""vLLM's own structured outputs, compiled first in a process that can be killed, as constraints of ours are.

vLLM reads what a plain request asks for in the server's loop, and compiles it in the engine. With xgrammar, its first
choice, a schema of 4 kB took half a minute there, in which the server answered nobody; so ``launch`` has it use
llguidance. What passes here is not read in the loop again.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from llguidance import LLMatcher, StructTag, grammar_from

from align.decoding.constraints import ConstraintError

from .checker import Checker
from .errors import RefusedError

BACKEND = "guidance"
"""vLLM's name of llguidance."""


async def checked(outputs: Any, asked: Any, checker: Checker) -> AsyncGenerator[Any, None]:
    """The outputs of a request of vLLM's, once what it asks for is known to be harmless.

    Args:
        outputs: the generator of vLLM's engine, not begun.
        asked: vLLM's ``StructuredOutputsParams``.
        checker: where it is compiled.

    Raises:
        VLLMValidationError: it is no grammar, or takes too long; vLLM makes it 400.
        GracefulHTTPError: too many wait (429), or what compiles has ended (500).
    """
    from vllm.exceptions import GracefulHTTPError, VLLMValidationError
    from vllm.v1.structured_output.request import get_structured_output_key

    kind, spec = get_structured_output_key(asked)
    try:
        await checker.check([kind.name, spec])
    except ConstraintError as error:
        raise VLLMValidationError(str(error)) from None
    except RefusedError as refused:
        if refused.status == HTTPStatus.BAD_REQUEST:
            raise VLLMValidationError(refused.message) from None
        raise GracefulHTTPError(refused.message, HTTPStatus(refused.status)) from None
    async with aclosing(outputs):
        async for output in outputs:
            yield output


def read_no_more() -> None:
    """Have vLLM in this process take grammars as they are: it would compile each once more, in the loop."""
    from vllm.v1.structured_output import backend_guidance

    backend_guidance.validate_guidance_grammar = lambda sampling_params, tokenizer=None: None


def problem(kind: str, spec: Any) -> str:
    """What is wrong with a grammar, or nothing: what vLLM's own look at it would say.

    Args:
        kind: name of one of vLLM's ``StructuredOutputOptions``.
        spec: its text.
    """
    try:
        said = LLMatcher.validate_grammar(_program(kind, spec), None)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        return f"Invalid grammar specification: {error}"
    return f"Grammar error: {said}" if said else ""


def _program(kind: str, spec: Any) -> str:
    """What vLLM gives llguidance."""
    match kind:
        case "JSON":
            return _json(spec)
        case "JSON_OBJECT":
            return _json('{"type": "object"}')
        case "STRUCTURAL_TAG":
            given = json.loads(spec) if isinstance(spec, str) else spec
            tags = [
                StructTag(
                    trigger=next((trigger for trigger in given["triggers"] if one["begin"].startswith(trigger)), ""),
                    begin=one["begin"],
                    grammar=_json(one["schema"]),
                    end=one["end"],
                )
                for one in given["structures"]
            ]
            tagged: str = StructTag.to_grammar(tags)
            return tagged
    grammar: str = grammar_from(kind.lower(), spec)
    return grammar


def _json(schema: Any) -> str:
    grammar: str = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": True})
    return grammar
