"""Token masking and rejection: the conditional law of a token; what a mask saves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.decoding import masking, rejection
from align.decoding.lazy import Draw, Draws

Q = np.array([0.4, 0.3, 0.2, 0.1])


def test_masking_has_the_exact_mass() -> None:
    draw = masking.sample(np.log(Q), {1, 3}.__contains__, Draws(0, 0))
    assert draw.token in {1, 3}
    assert draw.log_weight == pytest.approx(math.log(0.4), abs=1e-14)
    assert draw.evaluations == 4


def test_a_mask_in_hand_asks_nothing() -> None:
    def asked(token: int) -> bool:
        raise AssertionError("the verdicts are known")

    mask = np.array([False, True, False, True])
    for seed in range(20):
        draw = masking.sample(np.log(Q), asked, Draws(seed, 0), allowed=mask)
        verdicts = masking.sample(np.log(Q), {1, 3}.__contains__, Draws(seed, 0))
        assert draw == Draw(verdicts.token, verdicts.log_weight, evaluations=0, masks=1)


def test_masking_does_not_ask_about_what_cannot_be_drawn() -> None:
    with np.errstate(divide="ignore"):
        draw = masking.sample(np.log([0.5, 0.0, 0.5]), lambda token: True, Draws(0, 0))
    assert draw.evaluations == 2


def test_rejection_stops_at_the_first_allowed_token() -> None:
    draws = [rejection.sample(np.log(Q), {1, 3}.__contains__, Draws(seed, 0)) for seed in range(200)]
    assert {draw.token for draw in draws} == {1, 3}
    assert {draw.evaluations for draw in draws} == {1, 2, 3}
    assert all(draw.log_weight == 0 for draw in draws)


def test_dead_ends() -> None:
    assert masking.sample(np.log(Q), lambda token: False, Draws(0, 0)) == Draw(None, -math.inf, 4)
    assert rejection.sample(np.log(Q), lambda token: False, Draws(0, 0)) == Draw(None, -math.inf, 4)
    assert rejection.sample(np.log(Q), lambda token: False, Draws(0, 0), max_draws=2) == Draw(None, -math.inf, 2)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"allowed has shape \(3,\) and must have \(4,\)"):
        masking.sample(np.log(Q), lambda token: True, Draws(0, 0), allowed=np.ones(3, dtype=bool))
    with pytest.raises(ValueError, match="max_draws is 0"):
        rejection.sample(np.log(Q), lambda token: True, Draws(0, 0), max_draws=0)
