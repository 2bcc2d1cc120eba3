"""vLLM's own structured outputs: what it would say of each is said elsewhere, and hostile ones never reach it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output import backend_guidance
from vllm.v1.structured_output.request import get_structured_output_key

from align.serve.checker import Checker
from align.serve.structured import checked, problem, read_no_more

SLOW = {"json": {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrst"]}}
TAG = {
    "triggers": ["<f"],
    "structures": [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}],
}
ASKED: list[tuple[dict[str, Any], bool]] = [
    ({"json": {"type": "object", "properties": {"a": {"type": "string"}}}}, True),
    ({"json": '{"type": "integer"}'}, True),
    ({"json": {"type": "none"}}, False),
    ({"json": "{"}, False),
    ({"json_object": True}, True),
    ({"regex": "[a-c]{3}"}, True),
    ({"regex": "("}, False),
    ({"choice": ["yes", "no"]}, True),
    ({"grammar": 'start: "a"+'}, True),
    ({"grammar": 'root ::= "a" | "b" root'}, True),
    ({"grammar": "start: <|end|>"}, True),
    ({"grammar": "root ::= ("}, False),
    ({"structural_tag": json.dumps(TAG)}, True),
    ({"structural_tag": json.dumps({**TAG, "triggers": ["<g"]})}, False),
    ({"structural_tag": json.dumps({"type": "structural_tag", "format": {}})}, False),
]


@pytest.mark.parametrize(("given", "is_right"), ASKED, ids=lambda given: str(given)[:40])
def test_what_is_said_is_what_vllm_says(given: dict[str, Any], is_right: bool) -> None:
    asked = StructuredOutputsParams(**given)
    try:
        backend_guidance.validate_guidance_grammar(SamplingParams(structured_outputs=asked))
        theirs = ""
    except (VLLMValidationError, AssertionError) as error:
        theirs = str(error)
    kind, spec = get_structured_output_key(asked)
    ours = problem(kind.name, spec)
    assert (ours == "", theirs == "") == (is_right, is_right)
    if "structural_tag" not in given:
        assert ours == theirs


class Outputs:
    """What an engine would give, and how far it came."""

    def __init__(self) -> None:
        self.begun = self.ended = False

    async def __call__(self) -> AsyncGenerator[int, None]:
        self.begun = True
        try:
            for number in range(3):
                yield number
        finally:
            self.ended = True


def test_hostile_ones_and_wrong_ones_do_not_reach_the_engine() -> None:
    async def main() -> None:
        checker = Checker(0.5)
        try:
            for given, said in [(SLOW, "takes over 0.5 s to compile"), ({"regex": "("}, "unclosed group")]:
                outputs = Outputs()
                with pytest.raises(VLLMValidationError, match=said):
                    [one async for one in checked(outputs(), StructuredOutputsParams(**given), checker)]
                assert not outputs.begun
            checker.lanes[0].most = 0
            with pytest.raises(GracefulHTTPError, match="too many new constraints") as busy:
                [one async for one in checked(Outputs()(), StructuredOutputsParams(regex="b"), checker)]
            assert busy.value.http_status == 429
            checker.lanes[0].most = 1
            outputs, asked = Outputs(), StructuredOutputsParams(regex="[0-9]")
            assert [one async for one in checked(outputs(), asked, checker)] == [0, 1, 2]
            assert outputs.ended
            outputs = Outputs()
            stream = checked(outputs(), asked, checker)
            assert await anext(stream) == 0
            await stream.aclose()
            assert outputs.ended
        finally:
            await checker.close()

    asyncio.run(main())


def test_vllm_reads_it_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its look at a grammar is a name of that module, found when it is needed."""
    monkeypatch.setattr(backend_guidance, "validate_guidance_grammar", backend_guidance.validate_guidance_grammar)
    read_no_more()
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))
    backend_guidance.validate_guidance_grammar(params, tokenizer=None)
