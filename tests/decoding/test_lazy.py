"""Drawing without replacement, and the uniforms that depend on (seed, position) alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from align.decoding.lazy import Draws, Live, ask


def uniforms(draws: Draws, count: int) -> list[float]:
    return [draws.uniform() for _ in range(count)]


def test_uniforms_are_a_function_of_seed_stream_and_position() -> None:
    assert uniforms(Draws(3, 5, 1), 20) == uniforms(Draws(3, 5, 1), 20)
    others = [Draws(3, 5, 1), Draws(4, 5, 1), Draws(3, 6, 1), Draws(3, 5, 2), Draws(-3, 5, 1), Draws(35, 1, 1)]
    first = [tuple(uniforms(draws, 20)) for draws in others]
    assert len({value for row in first for value in row}) == 20 * len(others)


def test_uniforms_do_not_change_from_release_to_release() -> None:
    """Seeds that people wrote down must give what they gave: `printf 7/0/0/0 | b2sum`, the last words first."""
    assert uniforms(Draws(7, 0), 2) == [0.6425928503334092, 0.6354446530746934]


def test_uniforms_are_uniform_within_and_across_positions() -> None:
    within, across = uniforms(Draws(0, 0), 20_000), [Draws(1, position).uniform() for position in range(20_000)]
    for values in (within, across):
        assert stats.kstest(values, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 4 / math.sqrt(len(values))
        assert 0 < min(values) < max(values) < 1


def test_failures_are_geometric() -> None:
    """Mean (1 - s)/s; s = 1 never fails; a share of 1e-30 is a number, and so is one that float64 hardly knows."""
    found = [Draws(2, position).failures(0.3) for position in range(20_000)]
    assert np.mean(found) == pytest.approx(7 / 3, abs=4 * math.sqrt(0.7) / 0.3 / math.sqrt(20_000))
    assert np.mean(np.equal(found, 0)) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 20_000))
    assert Draws(0, 0).failures(1.0) == 0
    assert Draws(0, 0).failures(1e-30) > 1e25
    for share in (1e-312, 5e-324, 0.0):
        assert math.log(Draws(0, 0).failures(share)) == pytest.approx(300 * math.log(10))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 1500), st.integers(0, 10**6))
def test_a_token_has_the_cell_of_its_probability(size: int, seed: int) -> None:
    """The token of u is that of the plain inverse CDF, before and after removals."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(size, 0.1)) * (rng.random(size) < 0.8)
    with np.errstate(divide="ignore"):
        live = Live(np.log(p))
    while p.sum() > 0:
        assert live.mass == pytest.approx(p.sum(), rel=1e-12)
        assert live.largest == pytest.approx(p.max(), rel=1e-12)
        upto = np.cumsum(p)
        for u in rng.random(5):
            token = live.draw(u)
            assert p[token] > 0
            assert upto[token] - p[token] - 1e-12 <= u * upto[-1] <= upto[token] + 1e-12
        assert live.remove(token) == pytest.approx(p[token], rel=1e-12)
        p[token] = 0
        if rng.random() < 0.5:  # not all one by one
            rest = np.flatnonzero(p)
            for token in rest[: len(rest) // 2]:
                live.remove(int(token))
                p[token] = 0
    assert live.mass == 0


def test_the_ends_of_the_unit_interval_hit_a_token() -> None:
    """The smallest and the largest uniform there are, with tokens of probability 0 at both ends."""
    p = np.array([0.0, *([1e-3] * 1000), 0.0])
    with np.errstate(divide="ignore"):
        live = Live(np.log(p))
    assert live.draw(2.0**-53) == 1
    assert live.draw(1 - 2.0**-53) == 1000


def test_what_is_left_is_not_a_difference() -> None:
    """After a token of nearly all mass the other keeps all digits of its 1e-30."""
    live = Live(np.array([0.0, math.log(1e-30)]))
    assert live.remove(live.draw(0.5)) == 1.0
    assert live.mass == pytest.approx(1e-30, rel=1e-12)
    assert live.draw(0.5) == 1


def test_rows_that_are_no_log_probabilities() -> None:
    with pytest.raises(ValueError, match=r"logq\[1\] is nan"):
        Live(np.array([0.0, math.nan]))
    with pytest.raises(ValueError, match=r"logq\[0\] is inf"):
        Live(np.array([math.inf, 0.0]))
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        Live(np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        Live(np.zeros(0))


def test_a_constraint_that_raises_names_its_token() -> None:
    def broken(token: int) -> bool:
        raise RuntimeError("cannot say")

    with pytest.raises(RuntimeError, match="cannot say") as caught:
        ask(broken, 17)
    assert caught.value.__notes__ == ["the constraint was asked about token 17"]


def test_a_verdict_is_true_or_false() -> None:
    assert ask(lambda token: np.True_, 1) is True
    with pytest.raises(ValueError, match=r"verdict on token 4 is 0.5"):
        ask(lambda token: 0.5, 4)  # type: ignore[arg-type,return-value]


def test_from_probabilities_is_as_from_their_logarithms() -> None:
    p = np.array([0.5, 0.0, 0.25, 0.25], dtype=np.float32)
    one, other = Live.of(p.copy()), Live(np.log(p, where=p > 0, out=np.full(4, -math.inf)).astype(np.float64))
    assert list(one.left) == list(other.left) == [0, 2, 3]
    for uniform in (0.01, 0.49, 0.51, 0.74, 0.76, 0.99):
        assert one.draw(uniform) == other.draw(uniform)
    assert (one.remove(0), other.remove(0)) == pytest.approx((0.5, 0.5))
    assert (one.mass, other.mass) == pytest.approx((0.5, 0.5))
    with pytest.raises(ValueError, match="there is no law to draw from"):
        Live.of(np.array([0.5, math.nan], dtype=np.float32))


def test_only_leaves_the_others_out_of_the_measure_and_the_row_as_it_was() -> None:
    live = Live(np.log([0.4, 0.3, 0.2, 0.1]))
    live.remove(0)
    some = live.only(np.array([True, True, False, True]))
    assert list(some.left) == [1, 3]
    assert some.mass == pytest.approx(0.4)
    assert live.mass == pytest.approx(0.6)
    some.remove(1)
    assert list(live.left) == [1, 2, 3]
    assert not live.only(np.zeros(4, dtype=bool)).mass
    with pytest.raises(ValueError, match=r"allowed has shape \(3,\) and must have \(4,\)"):
        live.only(np.ones(3, dtype=bool))
