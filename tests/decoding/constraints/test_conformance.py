"""Every constraint of ours obeys the laws, on bytes, on a real vocabulary; each broken one is caught by its law."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from align.decoding.constraints import (
    AllOf,
    AnyOf,
    Constraint,
    ConstraintError,
    Memo,
    PythonPredicate,
    Sql,
    Vocabulary,
    Words,
    grammar,
    json_schema,
    regex,
)
from align.decoding.constraints.conformance import check

PATTERN = r'\{"name": "[A-Z][a-zé]{1,10}", "age": [1-9][0-9]?\}'
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["é", "the"]}},
    "required": ["a"],
    "additionalProperties": False,
}
TABLES = {"singer": ["name", "age", "order"], "stadium": ["id", "name"]}
QUERY = 'select T1.name, max(age) from singer as T1 join stadium as t2 on t1.name = T2.Name where "order" like "%x"'


def is_json(text: str) -> bool:
    """Whether ``text`` is of SCHEMA, by Python: keys once and in order, nothing around it, characters as they are."""
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except ValueError:
        return False
    if not (text.startswith("{") and text.endswith("}")) or "\\" in text:
        return False
    read = dict(pairs)
    keys = [key for key, _ in pairs]
    return keys in (["a"], ["a", "b"]) and type(read["a"]) is int and read.get("b", "é") in ("é", "the")


def short(text: str, complete: bool) -> bool:
    """At most 12 characters, and a full stop at the end."""
    return len(text) <= 12 and "." not in text[:-1] and (not complete or text.endswith("."))


OURS: dict[str, tuple[Callable[[Vocabulary], Constraint], dict[str, Any]]] = {
    "regex": (
        lambda v: regex(PATTERN, v),
        {"texts": ['{"name": "Anée", "age": 7}'], "complete": lambda text: bool(re.fullmatch(PATTERN, text))},
    ),
    "json": (lambda v: json_schema(SCHEMA, v), {"texts": ['{"a":1}', '{ "a" : -12 , "b":"é"}'], "complete": is_json}),
    "grammar": (
        lambda v: grammar('start: e\ne: e "+" t | t\nt: /[0-9]{1,3}/ | "(" e ")"', v),
        {"texts": ["1+(2+333)"]},
    ),
    "words": (
        lambda v: Words(["the", "then", "inner", "日本", "日曜"], v),
        {"texts": ["then", "日曜"], "complete": {"the", "then", "inner", "日本", "日曜"}.__contains__},
    ),
    "sql": (lambda v: Sql(TABLES, v), {"texts": ["SELECT count(*) FROM singer", QUERY], "dead_ends": True}),
    "predicate": (
        lambda v: PythonPredicate(short, v),
        {"texts": ["Hé 日."], "complete": lambda text: short(text, True), "dead_ends": True, "walks": 2},
    ),
    "all of": (
        lambda v: AllOf(regex("[a-z]{3,}", v), PythonPredicate(lambda text, complete: "e" not in text, v)),
        {"texts": ["ban"], "complete": lambda text: bool(re.fullmatch("[a-df-z]{3,}", text))},
    ),
    "any of": (
        lambda v: Memo(AnyOf(regex("[a-c]{3}", v), Words(["the", "cab", "cabin"], v))),
        {"texts": ["the", "cabin", "aaa"], "complete": lambda text: bool(re.fullmatch("[a-c]{3}|the|cabin", text))},
    ),
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("tokens", ["letters", "tiny"])
def test_ours_conform(name: str, tokens: str, request: pytest.FixtureRequest) -> None:
    vocabulary = request.getfixturevalue(tokens)
    make, known = OURS[name]
    tried = check(make(vocabulary), vocabulary, **{"walks": 6, **known})
    assert tried.verdicts > 1000


@pytest.mark.parametrize("name", OURS)
def test_ours_conform_on_a_real_vocabulary(name: str, chat: Vocabulary) -> None:
    make, known = OURS[name]
    check(make(chat), chat, **{**known, "walks": 2, "length": 8, "tokens": 64})


class Text:
    """A constraint to break: texts over a and b of at most four letters; the state is the text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def start(self) -> Any:
        return b""

    def advance(self, state: Any, token: int) -> Any | None:
        said = self.vocabulary.tokens[token]
        return state + said if said and re.fullmatch(b"[ab]{0,4}", state + said) else None

    def may_end(self, state: Any) -> bool:
        return len(state) > 1


class WholeWordsOnly(Text):
    """Takes 'ab' as one token and not as two."""

    def advance(self, state: Any, token: int) -> Any | None:
        said = self.vocabulary.tokens[token]
        return state + said if said == b"ab" and len(state) < 4 else None


class Remembers(Text):
    """Judges by what was asked last."""

    last = b""

    def advance(self, state: Any, token: int) -> Any | None:
        after = super().advance(self.last, token)
        self.last = b"" if after is None else after
        return after


class Mutates(Text):
    """One list for all particles."""

    def start(self) -> Any:
        return []

    def advance(self, state: Any, token: int) -> Any | None:
        after = super().advance(b"".join(state), token)
        if after is None:
            return None
        state.append(self.vocabulary.tokens[token])
        return state

    def may_end(self, state: Any) -> bool:
        return len(state) > 1


class CountsTokens(Text):
    """The end depends on how the text was cut into tokens."""

    def start(self) -> Any:
        return (b"", 0)

    def advance(self, state: Any, token: int) -> Any | None:
        after = super().advance(state[0], token)
        return None if after is None else (after, state[1] + 1)

    def may_end(self, state: Any) -> bool:
        return bool(state[1] % 2)


class NeverEnds(Text):
    def may_end(self, state: Any) -> bool:
        return False


class NeverStops(NeverEnds):
    """Has no end and no dead end either."""

    def advance(self, state: Any, token: int) -> Any | None:
        return state if self.vocabulary.tokens[token] in (b"a", b"b", b"ab", b"abb") else None


class Nothing(NeverEnds):
    def advance(self, state: Any, token: int) -> Any | None:
        return None


class LosesTexts(Text):
    """Refuses every text that begins with b."""

    def advance(self, state: Any, token: int) -> Any | None:
        after = super().advance(state, token)
        return None if after is not None and after.startswith(b"b") else after


class AlwaysEnds(Text):
    def may_end(self, state: Any) -> bool:
        return True


class EndsByNumber(Text):
    def may_end(self, state: Any) -> bool:
        return len(state)  # type: ignore[return-value]


class TakesSpecials(Text):
    def advance(self, state: Any, token: int) -> Any | None:
        return super().advance(state, token) if self.vocabulary.tokens[token] else state


class Raises(Text):
    def advance(self, state: Any, token: int) -> Any | None:
        return super().advance(state, token) if len(state) < 2 else 1 // 0


class WrongMask(Text):
    def allowed(self, state: Any) -> np.ndarray:
        return np.ones(self.vocabulary.size, dtype=bool)


class HalfCharacters(Text):
    def advance(self, state: Any, token: int) -> Any | None:
        said = self.vocabulary.tokens[token]
        return state + said if said and "é日".encode().startswith(state + said) else None


@pytest.fixture
def small() -> Vocabulary:
    return Vocabulary([b"a", b"b", b"ab", b"abb", b"\xc3", b"\xa9", b"\xe6", b"\x97\xa5", None, None], frozenset({9}))


def test_the_one_to_break_is_whole(small: Vocabulary) -> None:
    tried = check(
        Text(small), small, texts=["abab", "ab"], complete=lambda text: bool(re.fullmatch("[ab]{2,4}", text))
    )
    assert tried.ends > 10
    assert tried.dead_ends == 0


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (WholeWordsOnly, r"prefix-closed: text 'a' .* is refused, and 'ab' is not"),
        (Remembers, r"forks: .* after other states were used|forks: .* refused when asked again"),
        (Mutates, r"forks: .* refused when asked again"),
        (CountsTokens, r"one text: .* may_end says (True, and False|False, and True) as "),
        (NeverEnds, r"prefix-closed: text '[ab]{4}' .* is a dead end"),
        (AlwaysEnds, r"ends: text '' .* may_end says True, complete says False"),
        (EndsByNumber, r"ends: text '' .* may_end gives 0, which is no bool"),
        (TakesSpecials, r"special tokens: .* token 8 stands for nothing and is allowed"),
        (Raises, r"advance: raises ZeroDivisionError: .*; text 'ab"),
        (WrongMask, r"mask: text '' .* allowed says True of token 4, advance does not"),
        (HalfCharacters, r"ends: text 'é.*xe6' .* may end within a character"),
    ],
)
def test_broken_ones_are_caught(broken: type[Text], law: str, small: Vocabulary) -> None:
    def complete(text: str) -> bool:
        return bool(re.fullmatch("[ab]{2,4}", text))

    with pytest.raises(ConstraintError, match=law) as caught:
        check(broken(small), small, complete=complete if broken is AlwaysEnds else None)
    assert str(caught.value).startswith(f"{broken.__name__} does not conform:")


def test_texts_that_are_wanted_must_be_allowed(small: Vocabulary) -> None:
    with pytest.raises(ConstraintError, match=r"text 'ababa' .* is refused, and yet begins a text that is wanted"):
        check(Text(small), small, texts=["ababa"])
    with pytest.raises(ConstraintError, match=r"text 'a' .* may not end, and yet is a text that is wanted"):
        check(Text(small), small, texts=["a"])


def test_a_refusal_of_what_is_wanted_is_seen_where_complete_says_what_is(small: Vocabulary) -> None:
    wanted = re.compile("[ab]{2,4}").fullmatch
    assert check(LosesTexts(small), small).ends > 0, "nothing else shows it"
    message = r"prefix-closed: text 'b+' .* is refused, and yet begins 'b[ab]+', which is wanted"
    with pytest.raises(ConstraintError, match=message):
        check(LosesTexts(small), small, complete=lambda text: bool(wanted(text)))


def test_texts_that_no_tokens_spell_are_said_to_be_none(small: Vocabulary) -> None:
    with pytest.raises(ConstraintError, match="texts: no tokens of the vocabulary spell 'zzz'"):
        check(Text(small), small, texts=["ab", "zzz"])


@pytest.mark.parametrize("broken", [NeverStops, Nothing])
def test_without_any_end_nothing_was_shown(broken: type[Text], small: Vocabulary) -> None:
    with pytest.raises(ConstraintError, match="ends: no text that may end was met in 12 walks of 24 tokens"):
        check(broken(small), small, dead_ends=True)


class EndsAtTwo(Text):
    """Goes on after its only end, to nothing."""

    def may_end(self, state: Any) -> bool:
        return len(state) == 2


def test_dead_ends_are_counted_where_they_are_declared(small: Vocabulary) -> None:
    assert check(EndsAtTwo(small), small, dead_ends=True).dead_ends > 0
