"""Regular expressions, JSON Schema and context-free grammars, compiled by llguidance.

The compiled automaton reads bytes, and a token is allowed when all its bytes are. llguidance's own way of reading
tokens allows one token alone where the text is forced, the one that its tokenizer would write; here every token that
spells an allowed text is allowed, so the model's law over tokens is conditioned and not replaced.

A check costs about a microsecond and so does a fork. Regular expressions are prefix-closed, and so is JSON Schema
where its references come to an end: an object that requires another of its own kind has no finite instance, and is
followed until a limit stops it. A Lark grammar is prefix-closed as far as its terminals are: they match greedily, as
Lark's lexer does, so ``start: /a+/ "a"`` matches nothing, and rules without an end (``start: "a" start``) are followed
too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark

from .protocol import ConstraintError, Vocabulary

SUBSCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
SUBSCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SUBSCHEMA_ONES = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")


@dataclass(slots=True, eq=False)
class _State:
    """Where the automaton is, or what it reads next to get here: it goes there when it is first asked.

    A token that is looked at and not taken costs no copy, and a memo may keep many.
    """

    matcher: LLMatcher
    unread: list[int] | None
    path: tuple[Any, int] | None  # the tokens that led here, newest first


class Compiled:
    """A constraint that llguidance runs. Build one with ``regex``, ``json_schema`` or ``grammar``.

    Args:
        name: what errors call it.
        program: llguidance's grammar, as ``LLMatcher.grammar_from_...`` writes it.
        vocabulary: the tokens that answers are made of.
        step_items: how many readings of the text the parser may keep at one byte before the request fails with an
            error; it bounds the time that an ambiguous grammar takes for a step, at 2,000 some 0.1 s. Regular
            expressions have llguidance's limit on how far they may grow.

    Raises:
        ConstraintError: the program does not compile (the message has the position), or nothing satisfies it.
    """

    def __init__(self, name: str, program: str, vocabulary: Vocabulary, *, step_items: int = 2000) -> None:
        self.name, self.vocabulary = name, vocabulary
        self._program = program
        self._limits = LLParserLimits(max_items_in_row=step_items, verbose_errors=False)
        self._root = LLMatcher(_byte_tokenizer(), program, log_level=0, limits=self._limits)
        if self._root.is_error():
            raise ConstraintError(f"{name}: {_said(self._root.get_error())}")
        if not self._root.is_accepting() and not any(self._first_bytes(self._root)):
            raise ConstraintError(f"{name}: nothing satisfies it, not even the empty text; nothing can be generated")

    def start(self) -> _State:
        return _State(self._root, None, None)

    def advance(self, state: _State, token: int) -> _State | None:
        said = self.vocabulary.tokens[token]
        if said is None:
            return None
        matcher, unread = self._at(state), list(said)
        if matcher.validate_tokens(unread) < len(unread):
            self._raise_on_error(matcher, state)
            return None
        return _State(matcher, unread, (state.path, token))

    def may_end(self, state: _State) -> bool:
        return bool(self._at(state).is_accepting())

    def text(self, state: _State) -> str:
        """What has been said so far."""
        return self.vocabulary.text(list(_tokens(state.path))[::-1])

    def next_bytes(self, state: _State, after: bytes = b"") -> set[int]:
        """The bytes that may follow, after some more; none where these may not."""
        matcher = self._at(state)
        if after:
            matcher = matcher.deep_copy()
            if matcher.try_consume_tokens(list(after)) < len(after):
                return set()
        return {byte for byte, possible in enumerate(self._first_bytes(matcher)) if possible}

    def allowed(self, state: _State) -> np.ndarray:
        """The mask of llguidance where the next byte is open; where it is forced, its tokens are asked one by one."""
        here, first = self._at(state), sorted(self.next_bytes(state))
        if len(first) > 1:
            matcher = self._masker.deep_copy()
            path = list(_tokens(state.path))[::-1]
            if matcher.try_consume_tokens(path) == len(path):
                bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
                self._raise_on_error(matcher, state)
                mask = bits[: self.vocabulary.size].astype(bool)
                mask[_silent(self.vocabulary)] = False
                return mask
        mask = np.zeros(self.vocabulary.size, dtype=bool)
        for byte in first:
            for token in _starting_with(self.vocabulary)[byte]:
                said = list(self.vocabulary.tokens[token] or b"")
                mask[token] = here.validate_tokens(said) == len(said)
        self._raise_on_error(here, state)
        return mask

    def _at(self, state: _State) -> LLMatcher:
        if state.unread is not None:
            matcher = state.matcher.deep_copy()
            matcher.consume_tokens(state.unread)
            self._raise_on_error(matcher, state)
            state.matcher, state.unread = matcher, None
        return state.matcher

    @cached_property
    def _masker(self) -> LLMatcher:
        return LLMatcher(_token_tokenizer(self.vocabulary), self._program, log_level=0, limits=self._limits)

    def _first_bytes(self, matcher: LLMatcher) -> list[bool]:
        # Not compute_bitmask: it follows forced bytes to their end, and a grammar without an end has none.
        return [matcher.validate_tokens([byte]) == 1 for byte in range(256)]

    def _raise_on_error(self, matcher: LLMatcher, state: _State) -> None:
        if matcher.is_error():
            raise ConstraintError(
                f"{self.name}: the automaton stopped after {self.text(state)!r}: {_said(matcher.get_error())}; "
                "a simpler constraint or more `step_items` may help"
            )


def regex(pattern: str, vocabulary: Vocabulary, **limits: int) -> Compiled:
    r"""The whole answer matches ``pattern``: Rust's syntax, without look-around and back-references.

    ``\d``, ``\w`` and ``\s`` are Unicode's, and ``.`` is any character but a line break (``(?s)`` changes that).
    """
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise ConstraintError(f"regex {pattern!r}: incomplete escape sequence, at character {len(pattern)}")
    try:
        return Compiled(f"regex {pattern!r}", LLMatcher.grammar_from_regex(pattern), vocabulary, **limits)
    except ConstraintError as error:
        if "lookarounds not supported" in str(error):
            raise ConstraintError(
                f"regex {pattern!r}: ^, $ and word boundaries within a pattern are not supported; "
                "the whole answer matches it anyway"
            ) from None
        found = re.search(r"regex parse error:\n {4}(.*)\n {4}( *)\^.*\nerror: (.*)", str(error))
        if found is None:
            raise
        # The message shows the pattern as llguidance wrote it, with / and line breaks escaped.
        place = next((n for n in range(len(pattern)) if len(regex_to_lark(pattern[:n], "")) >= len(found[2])), 0)
        raise ConstraintError(f"regex {pattern!r}: {found[3]}, at character {place + 1}") from None


def json_schema(schema: str | bool | Mapping[str, Any], vocabulary: Vocabulary, **limits: int) -> Compiled:
    """The answer is JSON that ``schema`` describes; an object's known keys come in the order of ``properties``.

    White space between the parts is free, as JSON has it, and can be long: ``"x-guidance": {"whitespace_flexible":
    false}`` in the schema forbids it. Keywords that llguidance cannot enforce are errors; unknown ones are ignored, as
    JSON Schema asks. ``format`` is enforced where llguidance knows it.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ConstraintError(
                f"JSON schema: not JSON: {error.msg}, at line {error.lineno} column {error.colno}"
            ) from None
        except RecursionError:
            raise ConstraintError("JSON schema: nested too deeply to be read") from None
    if not isinstance(schema, bool | Mapping):
        raise ConstraintError(f"JSON schema: {json.dumps(schema)[:60]} is no schema: write an object, true or false")
    try:
        return Compiled("JSON schema", _json_program(schema), vocabulary, **limits)
    except ConstraintError as error:
        places = ((place, _json_error(part, schema)) for place, part in _subschemas(schema, "#"))
        place, reason = next(((place, reason) for place, reason in places if reason), ("#", str(error)))
        raise ConstraintError(f"JSON schema: at {place}: {reason}") from None


def grammar(lark: str, vocabulary: Vocabulary, *, name: str = "grammar", **limits: int) -> Compiled:
    """The answer derives from the rule ``start`` of a grammar in Lark's syntax, with llguidance's extensions.

    White space is what the grammar says it is (``%ignore`` is known). Errors have line and column.
    """
    return Compiled(name, LLMatcher.grammar_from_lark(lark), vocabulary, **limits)


def _json_program(schema: Any) -> str:
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema)))


def _json_error(part: Any, root: Any) -> str:
    """What is wrong with a part of a schema by itself, with the definitions of the whole at hand; "" if nothing is."""
    if isinstance(part, Mapping) and isinstance(root, Mapping):
        part = {**{key: root[key] for key in ("$defs", "definitions") if key in root}, **part}
    return _said(LLMatcher(_byte_tokenizer(), _json_program(part), log_level=0).get_error())


def _subschemas(schema: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The parts of a schema that are schemas, with their JSON pointers, the innermost first."""
    if not isinstance(schema, Mapping):
        yield place, schema
        return
    for key in SUBSCHEMAS:
        if isinstance(schema.get(key), Mapping):
            for name, part in schema[key].items():
                yield from _subschemas(part, f"{place}/{key}/{name}")
    for key in SUBSCHEMA_LISTS:
        for index, part in enumerate(schema[key] if isinstance(schema.get(key), list) else []):
            yield from _subschemas(part, f"{place}/{key}/{index}")
    for key in SUBSCHEMA_ONES:
        if isinstance(schema.get(key), Mapping):
            yield from _subschemas(schema[key], f"{place}/{key}")
    yield place, schema


def _said(error: str) -> str:
    """The message of llguidance without its dump of the parser's state; ``at 2(4)`` is line and column."""
    message = re.split(r"\n<[a-z-]+/?>", error)[0].strip()
    return re.sub(r"^(?:at )?(\d+)\((\d+)\):", r"line \1 column \2:", message)


def _tokens(path: tuple[Any, int] | None) -> Iterator[int]:
    while path is not None:
        path, token = path
        yield token


class _Words:
    """What llguidance wants to know of a tokenizer. It never gets to write text: it would force its own spelling."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes | None], end: int, spell: bool) -> None:
        self.eos_token_id = end
        self.tokens = [b"\xff<%d>" % index if token is None else token for index, token in enumerate(tokens)]
        self.special_token_ids = [index for index, token in enumerate(tokens) if token is None]
        self._spell = spell

    def __call__(self, text: bytes) -> list[int]:
        return list(text) if self._spell else []


@lru_cache(maxsize=1)
def _byte_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Words([*(bytes([byte]) for byte in range(256)), None], 256, True)), slices=[])


@lru_cache(maxsize=4)
def _token_tokenizer(vocabulary: Vocabulary) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Words(list(vocabulary.tokens), min(vocabulary.ends), False)))


@lru_cache(maxsize=4)
def _starting_with(vocabulary: Vocabulary) -> list[list[int]]:
    """Tokens by their first byte."""
    groups: list[list[int]] = [[] for _ in range(256)]
    for token in vocabulary.usable.tolist():
        groups[(vocabulary.tokens[token] or b"")[0]].append(token)
    return groups


@lru_cache(maxsize=4)
def _silent(vocabulary: Vocabulary) -> np.ndarray:
    """Ids that stand for nothing."""
    return np.setdiff1d(np.arange(vocabulary.size), vocabulary.usable)
