"""What the rows inside the engine may keep, and how long a constraint may hold them up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.decoding.constraints import Memo, Vocabulary, wire
from align.decoding.constraints.worker import shared
from align.decoding.vllm import rows as module
from align.decoding.vllm.rows import Row, Rows
from align.decoding.vllm.settings import FAILED, KEY, read


def settings(**own: Any) -> Any:
    given = {KEY: {"seed": 1, "law": {}, "max_new_tokens": 50, **own}}
    return read(SimpleNamespace(extra_args=given, seed=None, max_tokens=50, temperature=0.0))  # type: ignore[arg-type]


def draw(rows: Rows, row: Row, tokens: list[int]) -> tuple[int, float]:
    logits = torch.tensor([[1.0, 0.5, 0.2, -9.0, 0.1]])
    rows.draw(logits, {0: (row, tokens)})
    token = int(logits[0].argmax())
    return token, float(logits[0, token])


def test_states_of_all_constraints_together_are_bounded(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest go first, and the one in use stays, however much it has."""
    monkeypatch.setattr(module, "STATES", 30)
    rows = Rows(vocabulary, None)
    for number in range(12):
        row = rows.open(settings(constraint={"regex": f"[ab]{{{20 + number}}}"}), ())
        tokens: list[int] = []
        for _ in range(8):
            tokens.append(draw(rows, row, tokens)[0])
    kept = [memo for memo in rows._constraints.values() if isinstance(memo, Memo)]
    assert 1 <= len(kept) <= 4
    assert sum(memo.states for memo in kept[:-1]) <= 30
    assert '{"regex": "[ab]{31}"}' in rows._constraints


def test_a_constraint_that_computes_too_long_ends_its_own_row(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds of the thread's time between two looks at the clock: over what two tokens may take, not over ten."""
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(time, "thread_time", lambda: float(next(clock)))
    rows = Rows(vocabulary, None, (0.0, 9.0))
    slow = rows.open(settings(constraint={"regex": "[ab]*"}, name="slow"), ())
    token, weight = draw(rows, slow, [])
    assert weight == FAILED
    assert token in vocabulary.ends
    (record,) = rows.pop(["slow"])
    assert record is not None
    assert record["fault"] == ""
    assert (
        "took 10.0 s, waits for its functions counted, for 1 tokens, more than the 0 s and 9000 ms a token"
        in record["error"]
    )
    rows = Rows(vocabulary, None, (10.0, 11.0))
    quick = rows.open(settings(constraint={"regex": "[ab]*"}), ())
    said: list[int] = []
    for _ in range(3):
        token, weight = draw(rows, quick, said)
        assert weight > FAILED
        said.append(0)


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules, and no process of one that lives on."""
    monkeypatch.syspath_prepend(str(tmp_path))
    shared.cache_clear()
    yield tmp_path
    shared.cache_clear()


SLOW = """
import time
from pathlib import Path

been = Path(__file__).with_suffix(".been")
time.sleep(2 * been.exists())
been.touch()

def hangs(text, complete):
    time.sleep(60 * ("b" in text))
    return True

def naps(text, complete):
    time.sleep(0.1 * bool(text))
    return True
"""


def calling(function: str, pattern: str) -> dict[str, Any]:
    return {"constraint": {"all_of": [{"regex": pattern}, {"python": f"slow_rules:{function}"}]}}


def test_a_call_that_does_not_come_back_is_waited_for_once(
    processes: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By eight particles together and one that comes later; and nobody waits until the module is imported anew.

    Without that it were nine times 0.4 s, and nine imports of 2 s.
    """
    (processes / "slow_rules.py").write_text(SLOW)
    monkeypatch.setattr(wire, "SECONDS", 0.4)
    rows = Rows(vocabulary, ["slow_rules:hangs"])
    one = {place: rows.open(settings(**calling("hangs", "b*"), name=f"one-{place}"), ()) for place in range(8)}
    other = rows.open(settings(constraint={"regex": "a*"}, name="other-0"), ())
    logits = torch.tensor([[-9.0, 5.0, -9.0, -9.0, -9.0]] * 8 + [[5.0, -9.0, -9.0, -9.0, -9.0]])
    began = time.monotonic()
    rows.draw(logits, {**{place: (row, []) for place, row in one.items()}, 8: (other, [])})
    late = rows.open(settings(**calling("hangs", "b*"), name="one-8"), ())
    assert draw(rows, late, [])[1] == FAILED
    assert time.monotonic() - began < 2
    assert logits[:8].max(dim=1).values.tolist() == [FAILED] * 8
    assert logits[8].argmax() == 0
    found = rows.pop([f"one-{place}" for place in range(9)])
    assert all(record and "slow_rules:hangs: took over 0.4 s on 'b'" in record["error"] for record in found)
    assert all(record and record["fault"] == "function" for record in found)

    for number in range(2):  # a known constraint and a new one, and neither is refused for good
        own = calling("hangs", "a*" * (number + 1))
        assert draw(rows, rows.open(settings(**own, name=f"early {number}-0"), ()), [])[1] == FAILED
    (record,) = rows.pop(["early 0-0"])
    assert record is not None
    assert "is starting again; try again" in record["error"]
    assert record["fault"] == "later"
    for number in range(2):
        own = calling("hangs", "a*" * (number + 1))
        while draw(rows, rows.open(settings(**own), ()), [])[1] == FAILED:
            assert time.monotonic() - began < 20


def test_waiting_for_a_function_counts_and_particles_have_one_account(processes: Path, vocabulary: Vocabulary) -> None:
    """Ten naps of a tenth of a second, by ten particles that have said different things; a half is allowed."""
    (processes / "slow_rules.py").write_text(SLOW)
    rows = Rows(vocabulary, ["slow_rules:naps"], (0.5, 0.0))
    begun = [rows.open(settings(**calling("naps", ".*"), name=f"one-{place}"), ()) for place in range(10)]
    weights = []
    for place, row in enumerate(begun):
        row.settings = replace(row.settings, prefix=place)
        row.said = (0,) * place
        weights.append(draw(rows, row, [])[1])
    failed = [weight == FAILED for weight in weights]
    assert failed == sorted(failed)
    assert 1 <= failed.index(True) <= 5
    record = rows.pop(["one-9"])[0]
    assert record is not None
    assert "s, waits for its functions counted, for" in record["error"]
