"""The lab's rows of Transfer-Q* pass, in both dtypes, and a decoder that is wrong misses them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from align.decoding import course
from align.decoding.values import Estimate, estimate
from align.evals.exact.rows import Stack
from align.evals.exact.transfer_targets import GUIDED, P, R, aligned, check_transfer_q, divergence
from align.evals.exact.verify import verify


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", GUIDED)
def test_every_comparison_passes(name: str, dtype: torch.dtype) -> None:
    rows = verify(name, Stack(dtype=dtype))
    assert {row.status for row in rows} <= {"pass", "told"}
    assert all(len(row.quantity) <= 31 for row in rows)


def test_the_policy_and_the_aligned_law_have_the_published_reward_and_divergence() -> None:
    assert sum(P[answer] * R[answer] for answer in P) == pytest.approx(0.398)
    assert divergence(P) == 0
    law = aligned(R)
    assert sum(law[answer] * R[answer] for answer in P) == pytest.approx(0.6471790839, abs=1e-10)
    assert divergence(law) == pytest.approx(0.2573370300, abs=1e-10)
    assert law[0, 0] + law[0, 1] == pytest.approx(0.6533671798, abs=1e-10)


def test_values_of_another_kind_or_with_other_weights_miss(monkeypatch: Any) -> None:
    """The soft value where the mean was asked for, and weights of the wrong sign: each misses its own rows."""

    def soft(*rewards: Any, kind: str, beta: float) -> Estimate:
        return estimate(*rewards, kind="soft", beta=beta)

    def upside_down(rewards: Any, others: Any = None, **given: Any) -> Estimate:
        return estimate(rewards, [2 * r for r in rewards] if others is not None else None, **given)

    for wrong, missed in ((soft, "direct, E[Q] of two rollouts"), (upside_down, "Q*, E[r]")):
        with monkeypatch.context() as patch:
            patch.setattr(course, "estimate", wrong)
            assert {row.quantity for row in check_transfer_q(Stack()) if row.status == "miss"} >= {missed}


def test_a_draw_without_the_probability_misses(monkeypatch: Any) -> None:
    from align.evals.exact import transfer_targets

    def by_value(log_probs: Any, values: list[float], alpha: float, uniform: float) -> int:
        weights = [math.exp(value / alpha) for value in values]
        return int(uniform > weights[0] / sum(weights))

    monkeypatch.setattr(transfer_targets, "drawn", by_value)
    assert {row.quantity for row in check_transfer_q(Stack()) if row.status == "miss"} >= {"alpha to infinity: p"}
