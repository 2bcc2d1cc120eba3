"""Constraints as JSON: what is one and what is not, what files come to, and what is asked of parts beforehand."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.decoding.constraints import AllOf, ConstraintError, Memo, Vocabulary, build, parse, wire, written
from align.decoding.constraints.wire import BYTES, DEPTH, KINDS, PARTS, check
from align.decoding.constraints.worker import prepare, shared
from align.decoding.request import satisfies

PREDICATE = {"python": "nowhere:function"}
PYTHON = {"python": "predicates:digits"}


@pytest.mark.parametrize(
    "spec", [PREDICATE, {"all_of": [{"regex": "[0-9]+"}, PREDICATE]}, {"any_of": [{"words": ["yes"]}, PREDICATE]}]
)
def test_a_function_that_may_be_called_is_not_loaded_and_rules_nothing_out(spec: dict[str, object]) -> None:
    check(spec, predicates=["nowhere:function"])


def test_a_function_that_may_not_be_called_is_refused() -> None:
    with pytest.raises(ConstraintError, match="may be called: none"):
        check(PREDICATE, predicates=[])


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    shared.cache_clear()
    yield
    shared.cache_clear()


@pytest.mark.usefixtures("processes")
def test_where_functions_are_named_a_constraint_calls_few(letters: Vocabulary) -> None:
    """Counted over all_of and any_of, alike where it is checked and where it is built, and not for one's own."""
    part = {"python": "predicates:digits", "timeout": 20}
    many: dict[str, Any] = {"all_of": [part] * (PARTS - 1) + [{"any_of": [part, part]}]}
    named = ["predicates:digits"]
    for refuse in (lambda: check(many, predicates=named), lambda: build(many, letters, predicates=named)):
        with pytest.raises(ConstraintError, match=f"in more than {PARTS} places"):
            refuse()
    check(many)
    check({"all_of": [part] * PARTS}, predicates=named)
    for timeout in (0, -1, float("nan")):
        with pytest.raises(ConstraintError, match="must be seconds above zero"):
            check({**part, "timeout": timeout}, predicates=named)


@pytest.mark.usefixtures("processes")
def test_constraints_of_requests_share_a_process_for_each_function(letters: Vocabulary) -> None:
    """Whatever their limits: four parts in two constraints, and one process, which takes turns."""
    named = ["predicates:digits"]
    parts = [{"python": "predicates:digits", "timeout": 20 + extra} for extra in range(PARTS)]
    built = [build({"any_of": parts}, letters, predicates=named), build(PYTHON, letters, predicates=named)]
    assert shared.cache_info().currsize == 1
    assert all(satisfies(one, [*b"12", min(letters.ends)], letters) for one in built)
    process = shared("predicates:digits")[0]._process
    assert process is not None
    build(PYTHON, letters)
    assert shared.cache_info().currsize == 1
    prepare([f"nowhere:{number}" for number in range(9)])
    assert shared.cache_info().currsize == 10
    assert all(shared(f"nowhere:{number}")[0]._process is not None for number in range(9))
    assert process.poll() is None  # however many functions were named


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("limit", [{}, {"timeout": 500}])
def test_a_call_of_a_request_ends_at_the_servers_limit(
    limit: dict[str, int], letters: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a timeout of its own, and with a longer one; the function goes on for others."""
    monkeypatch.setattr(wire, "SECONDS", 1.0)
    named = ["predicates:slow"]
    built = build({"python": "predicates:slow", **limit}, letters, predicates=named)
    began = time.monotonic()
    with pytest.raises(ConstraintError, match=r"predicates:slow: took over 1 s on 'x'"):
        built.advance(built.start(), ord("x"))
    assert time.monotonic() - began < 10
    monkeypatch.setattr(wire, "SECONDS", 20.0)
    assert build({"python": "predicates:slow"}, letters, predicates=named).advance(("", b""), ord("a"))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({}, "is none; write an object with one of regex, json, grammar"),
        ("regex:a", "is none; write an object"),
        ({"regex": "a", "words": ["a"]}, "is none; write an object"),
        ({"regex": "a", "timeout": 1}, "regex takes no timeout"),
        ({"regex": ""}, "regex is a text"),
        ({"regex": 3}, "regex is a text, not 3"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "\ud800"}, "half of a surrogate pair"),
        ({"any_of": [{"words": ["a\udc00"]}]}, "half of a surrogate pair"),
        ({"json": "{}"}, "json is a JSON Schema, not its text"),
        ({"json": {"type": "strnig"}}, "JSON schema: at #: Invalid type"),
        ({"grammar": "start: x"}, "grammar: "),
        ({"words": "yes"}, "words is a list of texts"),
        ({"words": [1]}, "words is a list of texts"),
        ({"words": []}, "the list is empty"),
        ({"sql": ["t"]}, 'sql is {"table"'),
        ({"sql": {"t": "c"}}, 'sql is {"table"'),
        ({"sql": {}}, "no tables"),
        ({"python": "os"}, "not of the form"),
        ({"python": "os:getcwd", "timeout": True}, "timeout is True: it must be seconds"),
        ({"python": "os:getcwd", "timeout": "1"}, "timeout is '1': it must be seconds"),
        ({"all_of": {"regex": "a"}}, "all_of is a list of constraints"),
        ({"any_of": []}, "any_of is a list of constraints"),
        ({"any_of": [{"all_of": [{"regex": "a"}, {"regex": "("}]}]}, "unclosed group"),
    ],
    ids=str,
)
def test_what_is_no_constraint(spec: Any, reason: str) -> None:
    with pytest.raises(ConstraintError) as raised:
        build(spec, BYTES)
    assert reason in str(raised.value)
    if "python" not in spec or "timeout" in spec:
        with pytest.raises(ConstraintError):
            check(spec)


def test_nesting_has_an_end() -> None:
    spec: dict[str, Any] = {"regex": "a"}
    for _ in range(DEPTH):
        spec = {"all_of": [spec]}
    check(spec)
    with pytest.raises(ConstraintError, match=f"nested more than {DEPTH} deep"):
        check({"any_of": [spec]})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*KINDS, "timeout"]), JSON, max_size=2) | JSON)
def test_any_json_is_a_constraint_or_an_error_of_ours(spec: Any) -> None:
    with contextlib.suppress(ConstraintError):
        check(spec, predicates=[])


def test_files_are_written_as_they_are_parsed(
    tmp_path: Path, letters: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "words.txt").write_text("yes\n\nno\n")
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    (tmp_path / "g.lark").write_text('start: "ab" | "cd"')
    for text, said, not_said in [
        ("regex:a+", b"aa", b"b"),
        (f"words:{tmp_path}/words.txt", b"no", b"n"),
        (f"json:{tmp_path}/schema.json", b"12", b"x"),
        (f"grammar:{tmp_path}/g.lark", b"cd", b"ad"),
        ("python:predicates:digits", b"12", b"a"),
    ]:
        spec = written(text)
        assert json.loads(json.dumps(spec)) == spec
        built = build(spec, letters)
        assert built.spec == spec
        end = min(letters.ends)
        for one in (built, parse(text, letters)):
            assert satisfies(one, [*said, end], letters)
            assert not satisfies(one, [*not_said, end], letters)
    query, end = b"SELECT id FROM table1", min(letters.ends)
    (tmp_path / "sql.json").write_text(json.dumps({"table1": ["id"]}))
    spec = written(f"sql:{tmp_path}/sql.json")
    assert spec == {"sql": {"table1": ["id"]}}
    assert satisfies(build(spec, letters), [*query, end], letters)
    assert written("python:predicates:digits", timeout=2.5) == {"python": "predicates:digits", "timeout": 2.5}
    for text, reason in [
        ("regex:", "is no constraint"),
        ("number:3", "is no kind of constraint"),
        (f"words:{tmp_path}/none.txt", "cannot read"),
        (f"json:{tmp_path}/g.lark", "not JSON"),
    ]:
        with pytest.raises(ConstraintError, match=reason):
            written(text)


class Asks:
    """Takes everything, without a mask."""

    def start(self) -> str:
        return ""

    def advance(self, state: str, token: int) -> str | None:
        return state + chr(token)

    def may_end(self, state: str) -> bool:
        return True


def test_a_prefilter_is_what_parts_with_masks_allow_where_others_have_none(letters: Vocabulary) -> None:
    both = AllOf(parse("regex:[a-c]+", letters), Asks(), parse("regex:[b-d]+", letters))
    found = both.prefilter(both.start())
    assert found is not None
    assert [chr(token) for token in np.flatnonzero(found[:256])] == ["b", "c"]
    assert both.allowed(both.start()) is None
    for whole in (AllOf(parse("regex:a", letters)), AllOf(Asks())):
        assert whole.prefilter(whole.start()) is None


def test_a_prefilter_has_the_masks_of_nested_parts_too(letters: Vocabulary) -> None:
    inner = AllOf(AllOf(parse("regex:[b-d]+", letters), Asks()), parse("regex:[c-e]+", letters))
    nested = AllOf(parse("regex:[a-d]+", letters), inner)
    found = nested.prefilter(nested.start())
    assert found is not None
    assert [chr(token) for token in np.flatnonzero(found[:256])] == ["c", "d"]


def test_a_memo_keeps_prefilters_and_masks_apart_and_gives_copies(letters: Vocabulary) -> None:
    calls: list[str] = []

    class Counted(AllOf):
        def prefilter(self, state: Any) -> Any:
            calls.append("prefilter")
            return super().prefilter(state)

        def allowed(self, state: Any) -> Any:
            calls.append("allowed")
            return super().allowed(state)

    memo = Memo(Counted(parse("regex:[a-c]+", letters), Asks()))
    state = memo.start()
    for _ in range(3):
        mask = memo.prefilter(state)
        assert mask is not None
        assert mask.sum() == 3
        mask[:] = False
        assert memo.allowed(state) is None
    assert calls == ["prefilter", "allowed"]
    assert Memo(Asks()).prefilter(Memo(Asks()).start()) is None
