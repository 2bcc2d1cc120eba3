"""What the rows inside the engine may keep, and how long a constraint may hold them up."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.decoding.constraints import Memo, Vocabulary
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
    assert "took 10.0 s of computing for 1 tokens, more than the 0 s and 9000 ms a token" in record["error"]
    rows = Rows(vocabulary, None, (10.0, 11.0))
    quick = rows.open(settings(constraint={"regex": "[ab]*"}), ())
    said: list[int] = []
    for _ in range(3):
        token, weight = draw(rows, quick, said)
        assert weight > FAILED
        said.append(0)
