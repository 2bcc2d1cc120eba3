"""Word lists, AND and OR, the memo, and constraints from text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.decoding.constraints import (
    AllOf,
    AnyOf,
    Compiled,
    Constraint,
    ConstraintError,
    Memo,
    PythonPredicate,
    Sql,
    Vocabulary,
    Words,
    parse,
    regex,
)


def answers(constraint: Constraint, vocabulary: Vocabulary, length: int) -> set[bytes]:
    """Every text of at most ``length`` tokens that may end, by following all that is allowed."""
    found, states = set[bytes](), [(constraint.start(), b"")]
    for _ in range(length + 1):
        found |= {said for state, said in states if constraint.may_end(state)}
        states = [
            (after, said + (vocabulary.tokens[token] or b""))
            for state, said in states
            for token in vocabulary.usable.tolist()
            if (after := constraint.advance(state, token)) is not None
        ]
    assert not states
    return found


@pytest.fixture
def pairs() -> Vocabulary:
    """No single b: words with an odd one cannot be spelled."""
    return Vocabulary([b"a", b"bb", b"ab", None], frozenset({3}))


def test_words_are_the_list(letters: Vocabulary) -> None:
    words = ["the", "then", "in", "日"]
    constraint = Words(words, letters)
    assert answers(constraint, letters, 5) == {word.encode() for word in words}
    masked = np.flatnonzero(constraint.allowed(constraint.start()))
    assert {letters.tokens[token] for token in masked} == {b"t", b"the", b"i", b"in", b"\xe6", b"\xe6\x97"}
    assert len(masked) == 7  # "in" is two tokens


def test_words_that_no_tokens_spell_lead_nowhere(pairs: Vocabulary) -> None:
    """The word abb is ab+b and a+bb: the first b has no token, and so ab is not begun; bab has no first token."""
    constraint = Words(["abb", "bab"], pairs)
    assert constraint.advance(constraint.start(), 2) is None
    assert answers(constraint, pairs, 3) == {b"abb"}
    with pytest.raises(ConstraintError, match="can spell none of the 1: nothing satisfies it"):
        Words(["b"], pairs)


def test_empty_lists_and_words(letters: Vocabulary) -> None:
    with pytest.raises(ConstraintError, match="the list is empty"):
        Words([], letters)
    with pytest.raises(ConstraintError, match=r"words: the 2\. is empty"):
        Words(["a", ""], letters)
    with pytest.raises(ConstraintError, match="words: 'abc' is one text; give a list of them"):
        Words("abc", letters)


def test_and_or_are_those_of_sets(letters: Vocabulary) -> None:
    left, right = {"the", "then", "inn"}, {"then", "inn", "her"}
    both, either = (join(Words(left, letters), Words(right, letters)) for join in (AllOf, AnyOf))
    assert answers(both, letters, 5) == {word.encode() for word in left & right}
    assert answers(either, letters, 5) == {word.encode() for word in left | right}
    with pytest.raises(ConstraintError, match="AllOf: no constraints"):
        AllOf()


def test_and_keeps_texts_that_no_one_completes(letters: Vocabulary) -> None:
    """Both know words that begin with "th", and none in common: an end that never comes, and no false answer."""
    constraint = AllOf(Words(["the"], letters), Words(["thy"], letters))
    assert answers(constraint, letters, 4) == set()
    assert constraint.advance(constraint.start(), ord("t")) is not None


class Counted(Words):
    """Words that count what they are asked."""

    asked = 0

    def advance(self, state: Any, token: int) -> Any:
        self.asked += 1
        return super().advance(state, token)

    def may_end(self, state: Any) -> bool:
        self.asked += 1
        return super().may_end(state)


def test_memo_asks_once_for_each_prefix(letters: Vocabulary) -> None:
    inner = Counted(["the", "then", "in"], letters)
    memo = Memo(inner)
    once = answers(memo, letters, 5)
    asked = inner.asked
    assert memo.evaluations == asked > 1000
    assert answers(memo, letters, 5) == once == {b"the", b"then", b"in"}
    assert memo.evaluations == inner.asked == asked


def test_memo_over_capacity_starts_anew_and_agrees(letters: Vocabulary) -> None:
    memo = Memo(Words(["the", "then", "in"], letters), capacity=10)
    state = memo.advance(memo.start(), ord("t"))
    assert state is not None
    for _ in itertools.repeat(None, 3):
        assert answers(memo, letters, 5) == {b"the", b"then", b"in"}
    assert memo.advance(state, ord("x")) is None


def test_memo_counts_states_and_verdicts(letters: Vocabulary) -> None:
    """Two states, or 20 verdicts: a new answer starts anew, which asks again."""
    inner = Counted(["the", "then", "in"], letters)
    for asked, fresh in (((b"t",), False), ((b"t", b"i"), True), (range(19), False), (range(20), True)):
        memo = Memo(inner, capacity=2)
        root = memo.start()
        for said in asked:
            memo.advance(root, letters.tokens.index(said) if isinstance(said, bytes) else said)
        assert (memo.start() is not root) == fresh


def test_memo_takes_bools_alone(letters: Vocabulary) -> None:
    class Odd(Words):
        def may_end(self, state: Any) -> bool:
            return "x"  # type: ignore[return-value]

        def allowed(self, state: Any) -> np.ndarray:
            return np.ones(self.vocabulary.size)

    memo = Memo(Odd(["the"], letters))
    with pytest.raises(ConstraintError, match="Odd: may_end gave 'x', which is no bool"):
        memo.may_end(memo.start())
    with pytest.raises(ConstraintError, match="Odd: allowed gave float64; it must give bools"):
        memo.allowed(memo.start())


def test_masks_of_joins_and_of_the_memo(letters: Vocabulary) -> None:
    words, digits = Words(["the", "12"], letters), regex("[0-9]+|her", letters)
    plain = PythonPredicate(lambda text, complete: True, letters)

    def masked(constraint: Constraint) -> list[bytes | None] | None:
        mask = constraint.allowed(constraint.start())  # type: ignore[attr-defined]
        return None if mask is None else [letters.tokens[token] for token in np.flatnonzero(mask)]

    assert masked(Memo(AllOf(words, digits))) == [b"1", b"12"]
    assert masked(AnyOf(words, digits)) == [*(b"%d" % digit for digit in range(10)), b"h", b"t", b"the", b"he", b"12"]
    assert masked(AllOf(words, plain)) is None
    assert masked(Memo(plain)) is None


def test_memo_keeps_the_newest_masks(letters: Vocabulary) -> None:
    """Nine states of "abcdefgh", asked in turn: the first is forgotten, the second is still known."""

    class Masked(Words):
        asked = 0

        def allowed(self, state: Any) -> np.ndarray:
            self.asked += 1
            return super().allowed(state)

    inner = Masked(["abcdefgh"], letters)
    memo = Memo(inner)
    states = [memo.start()]
    for letter in b"abcdefgh":
        after = memo.advance(states[-1], letter)
        assert after is not None
        states.append(after)
    masks = [memo.allowed(state) for state in states for _ in range(2)]
    assert inner.asked == 9
    masks[2][:] = True  # type: ignore[index]
    assert np.array_equal(memo.allowed(states[1]), masks[3])  # type: ignore[arg-type]
    assert inner.asked == 9, "a mask belongs to its caller, and the memo's stays as it was"
    assert np.array_equal(memo.allowed(states[0]), masks[0])  # type: ignore[arg-type]
    assert inner.asked == 10


def test_specs(letters: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.json").write_text('{"enum": ["the"]}')
    (tmp_path / "g.lark").write_text('start: "the"')
    (tmp_path / "w.txt").write_text("the\n\nthen\n", encoding="utf-8-sig")
    (tmp_path / "t.json").write_text('{"singer": ["name"]}')
    rows = [
        {"db_id": name, "table_names_original": ["t"], "column_names_original": [[-1, "*"], [0, "c"]]} for name in "xy"
    ]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text("def f(text, complete):\n    return True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    kinds = {
        "regex:a:b": Compiled,
        "json:s.json": Compiled,
        "grammar:g.lark": Compiled,
        "words:w.txt": Words,
        "sql:t.json": Sql,
        "sql:many.jsonl#y": Sql,
        "python:mine:f": PythonPredicate,
    }
    for spec, kind in kinds.items():
        assert isinstance(parse(spec, letters), kind)
    assert isinstance(parse("python:mine:f", letters, timeout=30.0), PythonPredicate)
    assert answers(parse("words:w.txt", letters), letters, 5) == {b"the", b"then"}, "the file's mark is no part of it"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a+", "'a+' is no constraint; write one of json:schema.json, regex:PATTERN"),
        ("regex:a\udcff", r"'regex:a\udcff': not UTF-8"),
        ("regexp:a+", "'regexp' is no kind of constraint; write one of"),
        ("json:absent.json", "json:absent.json: cannot read absent.json: No such file or directory"),
        ("json:bad.json", "json:bad.json: JSON schema: at #: Invalid type: x"),
        ("grammar:bad.lark", "grammar:bad.lark: line 2 column 8: unknown name"),
        ("words:latin.txt", "words:latin.txt: latin.txt is not UTF-8, at byte 1"),
        ("sql:absent.json", "sql: absent.json: No such file or directory"),
        ("sql:bad.json", "sql: bad.json: schema 1: not a schema"),
        ("sql:t.json#no", "sql:t.json#no: no schema 'no' in t.json"),
        ("python:f", "python:f: not of the form python:module:function"),
        ("python:absent_module:f", "python:absent_module:f: there is no module 'absent_module'; install it"),
    ],
)
def test_bad_specs(
    spec: str, message: str, letters: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.json").write_text('{"type": "x"}')
    (tmp_path / "t.json").write_text('{"singer": ["name"]}')
    (tmp_path / "bad.lark").write_text("// mine\nstart: foo\n")
    (tmp_path / "latin.txt").write_bytes("cé".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConstraintError) as caught:
        parse(spec, letters)
    assert message in str(caught.value)


def test_a_timeout_is_for_python_alone(letters: Vocabulary) -> None:
    with pytest.raises(ConstraintError, match="a timeout is for python:module:function alone"):
        parse("regex:a", letters, timeout=1.0)
