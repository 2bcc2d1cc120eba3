"""vLLM's own structured outputs: what it would say of each is said elsewhere, and hostile ones never reach it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, grammar_from
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output import backend_guidance, backend_xgrammar
from vllm.v1.structured_output.request import get_structured_output_key

from align.serve.checker import Checker
from align.serve.errors import RefusedError
from align.serve.structured import checked, problem, read_no_more, tagged

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
]


@pytest.mark.parametrize(("given", "is_right"), ASKED, ids=lambda given: str(given)[:40])
def test_what_is_said_is_what_vllm_says(given: dict[str, Any], is_right: bool) -> None:
    asked = StructuredOutputsParams(**given)
    try:
        backend_guidance.validate_guidance_grammar(SamplingParams(structured_outputs=asked))
        theirs = ""
    except VLLMValidationError as error:
        theirs = str(error)
    kind, spec = get_structured_output_key(asked)
    ours = problem(kind.name, spec)
    assert (ours == "", ours) == (is_right, theirs)


CALL = {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False}
TOOL = {"triggers": ["<tool>"], "structures": [{"begin": "<tool>", "schema": CALL, "end": ""}]}
BOTH = {
    "triggers": ["<func", "<f"],
    "structures": [{"begin": begin, "schema": {"type": "integer"}, "end": "</f>"} for begin in ("<func=a>", "<f=b>")],
}
TEXTS: list[tuple[dict[str, Any], str, bool]] = [
    (TAG, "no tag", True),
    (TAG, "one <f=a>5</f>, two <f=a>17</f>.", True),
    (TAG, 'any JSON <f=a>"5"</f>', False),
    (TAG, "another tag <f=b>5</f>", False),
    (TAG, "no end <f=a>5", False),
    (TOOL, 'a <tool>{ "n" : 5 }', True),
    (TOOL, 'a <tool>{"m": 5}', False),
    (BOTH, "one <func=a>5</f>, two <f=b>17</f>.", True),
    (BOTH, "a third <f=c>5</f>", False),
]


@pytest.mark.parametrize(("given", "text", "is_right"), TEXTS)
def test_what_is_in_a_tag_is_of_its_schema(given: dict[str, Any], text: str, is_right: bool) -> None:
    grammar = tagged(json.dumps(given))
    assert problem("GRAMMAR", grammar) == ""
    matcher = LLMatcher(LLTokenizer("byte"), grammar_from("grammar", grammar), log_level=0)
    tokens = list(text.encode())
    assert (matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()) == is_right


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{", "structural_tag: not JSON"),
        ("[" * 100_000, "structural_tag: not JSON"),
        ("5", "structural_tag: it must be a JSON object"),
        ({"type": "structural_tag", "format": {}}, "the form with format is not drawn here"),
        ({**TAG, "triggers": ["<g"]}, "structural_tag.structures.0.begin: it begins with none of the triggers"),
        ({**TAG, "triggers": ["<f", "<g"]}, "structural_tag.triggers: none of the structures begins with '<g'"),
        ({**TAG, "triggers": [""]}, "structural_tag.triggers.0"),
        ({**TAG, "triggers": ["<f"] * 101}, "structural_tag.triggers: .* at most 100"),
        ({**TAG, "structures": []}, "structural_tag.structures"),
        ({**TAG, "structures": TAG["structures"] * 1001}, "structural_tag.structures: .* at most 1000"),
        ({**TAG, "structures": [{"begin": 5, "schema": {}, "end": ""}]}, "structural_tag.structures.0.begin"),
        ({**TAG, "structures": [{"begin": "<f", "schema": None, "end": ""}]}, "structural_tag.structures.0.schema"),
    ],
    ids=lambda given: str(given)[:40],
)
def test_what_is_wrong_with_a_tag_is_said(spec: Any, said: str) -> None:
    with pytest.raises(RefusedError, match=said) as refused:
        tagged(spec if isinstance(spec, str) else json.dumps(spec))
    assert refused.value.status == 400


def test_a_schema_in_a_tag_is_compiled_elsewhere_too() -> None:
    async def main() -> None:
        checker = Checker(0.5)
        hostile = {"begin": "<f", "schema": SLOW["json"], "end": ""}
        try:
            outputs, asked = Outputs(), StructuredOutputsParams(structural_tag=json.dumps(TAG))
            assert [one async for one in checked(outputs(), asked, checker)] == [0, 1, 2]
            assert asked.structural_tag is None
            assert asked.grammar == tagged(json.dumps(TAG))
            for structures, said in [([hostile], "takes over 0.5 s to compile"), ([], "structures")]:
                spec = json.dumps({**TAG, "structures": structures})
                outputs, asked = Outputs(), StructuredOutputsParams(structural_tag=spec)
                with pytest.raises(GracefulHTTPError, match=said) as refused:
                    [one async for one in checked(outputs(), asked, checker)]
                assert refused.value.http_status == 400
                assert not outputs.begun
        finally:
            await checker.close()

    asyncio.run(main())


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
            slow: tuple[dict[str, Any], type[Exception], str] = (
                SLOW,
                GracefulHTTPError,
                "takes over 0.5 s to compile",
            )
            for given, kind, said in [slow, ({"regex": "("}, VLLMValidationError, "unclosed group")]:
                outputs = Outputs()
                with pytest.raises(kind, match=said) as refused:
                    [one async for one in checked(outputs(), StructuredOutputsParams(**given), checker)]
                assert not outputs.begun
                if given is SLOW:
                    assert isinstance(refused.value.__cause__, RefusedError)
                    assert refused.value.__cause__.headers["Retry-After"] == "300"
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
    """Its looks at a grammar are names of these modules, found when they are needed."""
    for module, name in (
        (backend_guidance, "validate_guidance_grammar"),
        (backend_xgrammar, "validate_xgrammar_grammar"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    bad = {"type": "structural_tag", "triggers": ["<g"], "structures": TAG["structures"]}
    with pytest.raises(VLLMValidationError, match="structural_tag"):
        CompletionRequest.model_validate({"prompt": "a", "response_format": bad})
    read_no_more()
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))
    backend_guidance.validate_guidance_grammar(params, tokenizer=None)
    own = {"structured_outputs": {"structural_tag": json.dumps(bad)}}
    for asked in ({"response_format": bad}, own):
        CompletionRequest.model_validate({"prompt": "a", **asked})
        ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "a"}], **asked})
