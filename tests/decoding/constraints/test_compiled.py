"""What llguidance runs: answers and refusals, positions in errors, forced texts, limits, masks."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from align.decoding.constraints import (
    Compiled,
    Constraint,
    ConstraintError,
    Vocabulary,
    grammar,
    json_schema,
    regex,
)


def takes(constraint: Constraint, vocabulary: Vocabulary, text: str) -> bool:
    """Whether a text is an answer, byte after byte."""
    state: Any = constraint.start()
    for byte in text.encode():
        state = constraint.advance(state, vocabulary.tokens.index(bytes([byte])))
        if state is None:
            return False
    return constraint.may_end(state)


def test_regex_is_of_the_whole_answer(letters: Vocabulary) -> None:
    constraint = regex(r"[^x\n]+é日{2}|", letters)
    assert [takes(constraint, letters, text) for text in ("", "abé日日", "x", "aé日")] == [True, True, False, False]


def test_every_token_that_spells_a_forced_text_is_allowed(letters: Vocabulary) -> None:
    """After nothing, ``the`` is forced; t, th and the are all right, whichever the tokenizer would write."""
    constraint = regex("the inn", letters)
    said = {letters.tokens[token] for token in letters.usable if constraint.advance(constraint.start(), token)}
    assert said == {b"t", b"the"}
    assert {letters.tokens[token] for token in np.flatnonzero(constraint.allowed(constraint.start()))} == said


def test_a_pattern_may_end_in_a_backslash_of_its_own(letters: Vocabulary) -> None:
    assert takes(regex("a\\\\", letters), letters, "a\\")


def test_json_keys_come_in_order_and_unknown_keywords_are_ignored(letters: Vocabulary) -> None:
    schema = {"properties": {"a": {"type": "integer", "typ": 1}, "b": {"type": "null"}}, "required": ["a", "b"]}
    constraint = json_schema({"type": "object", **schema, "additionalProperties": False}, letters)
    assert takes(constraint, letters, '{"a": 3,\n "b":null}')
    assert not takes(constraint, letters, '{"b":null,"a":3}')
    assert not takes(constraint, letters, '{"a":03,"b":null}')


def test_states_are_values(letters: Vocabulary) -> None:
    """Two ends from one state, and the state itself still where it was."""
    constraint = regex("a[bc]d", letters)
    state = constraint.advance(constraint.start(), ord("a"))
    assert state is not None
    left, right = (constraint.advance(state, ord(letter)) for letter in "bc")
    assert left is not None
    assert right is not None
    assert constraint.advance(left, ord("b")) is None
    assert constraint.may_end(constraint.advance(right, ord("d")))  # type: ignore[arg-type]
    assert constraint.advance(state, ord("b")) is not None
    assert not constraint.may_end(left)
    assert constraint.text(right) == "ac"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a(b", "regex 'a(b': unclosed group, at character 2"),
        ("/a\n(b", "unclosed group, at character 4"),
        ("a[z-a]", "invalid character class range, the start must be <= the end, at character 3"),
        ("a(?=b)", "look-around, including look-ahead and look-behind, is not supported, at character 2"),
        (r"(a)\1", "backreferences are not supported, at character 4"),
        ("a\\", r"regex 'a\\': incomplete escape sequence, at character 2"),
        ("\\" * 3, "incomplete escape sequence, at character 3"),
        ("a$b", "regex 'a$b': ^, $ and word boundaries within a pattern are not supported"),
        (r"\bab\b", "word boundaries within a pattern are not supported"),
        (r"[^\s\S]", "nothing satisfies it, not even the empty text"),
    ],
)
def test_bad_regex(pattern: str, message: str, letters: Vocabulary) -> None:
    with pytest.raises(ConstraintError, match=re.escape(message)):
        regex(pattern, letters)


DEEP = {"type": "object", "properties": {"x": {"type": "array", "items": {"anyOf": [{"type": "strnig"}]}}}}
EMPTY = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 3, "maximum": 1}}, "required": ["x"]}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"type":\n }', "JSON schema: not JSON: Expecting value, at line 2 column 2"),
        (DEEP, "JSON schema: at #/properties/x/items/anyOf/0: Invalid type: strnig"),
        (EMPTY, "JSON schema: at #/properties/x: Unsatisfiable schema: minimum (3) is greater than maximum (1)"),
        ({"$ref": "#/$defs/y"}, "JSON schema: at #: Pointer '/$defs/y' does not exist"),
        ({"items": {"pattern": "a(b", "type": "string"}}, "JSON schema: at #/items: regex parse error"),
        ({"type": "object", "properties": {"x": {"not": {}}}}, 'at #/properties/x: Unimplemented keys: ["not"]'),
        (False, "JSON schema: at #: Unsatisfiable schema: schema is false"),
        ('{"items":' * 20_000, "JSON schema: nested too deeply to be read"),
        ("[1]", "JSON schema: [1] is no schema: write an object, true or false"),
    ],
)
def test_bad_schema(schema: Any, message: str, letters: Vocabulary) -> None:
    with pytest.raises(ConstraintError, match=re.escape(message)):
        json_schema(schema, letters)


@pytest.mark.parametrize(
    ("lark", "message"),
    [
        ('start: "a" foo', 'mine.lark: line 1 column 8: unknown name: "foo"'),
        ('start: "a"\n\nbar: [[', "mine.lark: line 3 column 8: Expected token ']'"),
        ('foo: "a"', "mine.lark: no start rule found"),
        ('start: start "a"', "mine.lark: nothing satisfies it"),
    ],
)
def test_bad_grammar(lark: str, message: str, letters: Vocabulary) -> None:
    with pytest.raises(ConstraintError, match=re.escape(message)):
        grammar(lark, letters, name="mine.lark")


def follow(constraint: Compiled, text: str) -> Any:
    state: Any = constraint.start()
    for letter in text:
        state = constraint.advance(state, ord(letter))
        assert state is not None
    return state


def test_limits_stop_a_step_and_name_the_text(letters: Vocabulary) -> None:
    """An x more has ever more readings; a counted regex grows with every a: an error, and others live on."""
    ambiguous = grammar('start: a\na: a a a | a a | "x" |', letters, step_items=40)
    with pytest.raises(ConstraintError, match=r"grammar: .* stopped after 'x+': .* max is 40"):
        follow(ambiguous, "x" * 50)
    assert ambiguous.may_end(follow(ambiguous, "x"))
    growing = regex("(.{0,300}a.{0,300}){20}x", letters)
    with pytest.raises(ConstraintError, match=r"stopped after 'abab.*too many expressions"):
        follow(growing, "ab" * 200)


def test_a_grammar_without_end_goes_on_and_its_mask_comes_back(letters: Vocabulary) -> None:
    """The language of ``start: "a" start`` is empty, which no step can see: the length limit is the request's."""
    constraint = grammar('start: A B\nA: /a+/\nB: "a"', letters)
    state = follow(constraint, "a" * 300)
    assert not constraint.may_end(state)
    assert np.flatnonzero(constraint.allowed(state)).tolist() == [ord("a")]


def test_mask_says_what_advance_says_of_every_token(chat: Vocabulary) -> None:
    """All 49,152 of them, within a string, at a forced key and where a number may go on or end."""
    constraint = json_schema({"properties": {"k": {"type": ["string", "integer"]}}, "required": ["k"]}, chat)
    for text in ('{"', '{"k": "Hé', '{"k": 12'):
        state: Any = constraint.start()
        for byte in text.encode():
            state = constraint.advance(state, chat.tokens.index(bytes([byte])))
        mask = constraint.allowed(state)
        said = [constraint.advance(state, token) is not None for token in range(chat.size)]
        assert mask.tolist() == said
