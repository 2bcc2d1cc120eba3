"""``align verify``: the table and the exit code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import Result

from align.losses import LOSSES

Align = Callable[..., Result]


def test_one_loss(align: Align) -> None:
    done = align("verify", "--only", "regression", "--only", "centering", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert "mean rating" in done.stdout
    assert "Of a policy, exact and ours are mean rewards" in done.stdout
    assert "pass" in done.stdout
    assert "2 methods, float32 on cpu: 2 comparisons passed, 0 missed" in done.stdout
    assert "dpo" not in done.stdout


def test_a_miss_ends_with_1(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "untold", LOSSES["sft"])
    done = align("verify", "--only", "untold")
    assert done.exit_code == 1
    assert "no target" in done.stdout


def test_what_is_not_there_is_usage(align: Align) -> None:
    done = align("verify", "--only", "dpoo")
    assert done.exit_code == 2
    assert "did you mean 'dpo'" in done.stderr
    assert align("verify", "--dtype", "bfloat16").exit_code == 2
