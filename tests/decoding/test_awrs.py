"""AWRS: proper weights, the conditional law, budgets, dead ends. The paper's vectors are in tests/evals/exact."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from align.decoding.awrs import sample
from align.decoding.lazy import Accepts, Draw, Draws

Estimator = Literal["recursive", "geometric"]
ESTIMATORS: list[Estimator] = ["recursive", "geometric"]
SEEDS = 20_000
TINY = math.log(1e-30)


def law(size: int, seed: int = 0, scale: float = 1.0) -> NDArray[np.float64]:
    logits = scale * np.random.default_rng(seed).standard_normal(size)
    return np.asarray(logits - np.logaddexp.reduce(logits))


def never(token: int) -> bool:
    return False


def always(token: int) -> bool:
    return True


def check_unbiased(draws: list[Draw], logq: NDArray[np.float64], allowed: set[int]) -> None:
    """Within 4 standard errors, in all and for each of the likeliest allowed tokens."""
    weights = np.exp([draw.log_weight for draw in draws])
    tokens = np.array([-1 if draw.dead else draw.token for draw in draws])
    some = sorted(allowed, key=lambda token: -logq[token])[:3]
    for hits, exact in [
        (tokens >= 0, np.exp(logq[list(allowed)]).sum()),
        *((tokens == t, np.exp(logq[t])) for t in some),
    ]:
        values = weights * hits
        assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(len(values))


def p_value(tokens: list[int | None], logq: NDArray[np.float64], allowed: set[int]) -> float:
    """Of a chi-square test that the tokens follow ``q(. | allowed)``; tokens that are rare are put together."""
    order = sorted(allowed, key=lambda token: -logq[token])
    q = np.exp(logq[order])
    expected = len(tokens) * q / q.sum()
    observed = np.array([tokens.count(token) for token in order])
    assert observed.sum() == len(tokens)
    common = expected >= 10
    f_exp, f_obs = ([*values[common], values[~common].sum()] for values in (expected, observed))
    keep = np.array(f_exp) > 0
    return float(stats.chisquare(np.array(f_obs)[keep], np.array(f_exp)[keep]).pvalue)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_unbiased_and_conditional_over_many_seeds(estimator: Estimator) -> None:
    """600 tokens, three blocks of the CDF; a third of them allowed."""
    logq, allowed = law(600, scale=2), set(range(0, 600, 3))
    draws = [sample(logq, allowed.__contains__, Draws(seed, 3), estimator=estimator) for seed in range(SEEDS)]
    check_unbiased(draws, logq, allowed)
    assert p_value([draw.token for draw in draws], logq, allowed) > 1e-3


def test_unbiased_where_the_likeliest_token_is_refused() -> None:
    """Masses (.7, .2, .1), allowed {2}: after .7 of the mass a few runs with replacement are long."""
    logq, allowed = np.log([0.7, 0.2, 0.1]), {2}
    draws = [sample(logq, allowed.__contains__, Draws(seed, 0), estimator="geometric") for seed in range(SEEDS)]
    check_unbiased(draws, logq, allowed)
    assert len({draw.log_weight for draw in draws}) > 10


def test_after_sixteen_refusals_in_a_row_the_mask_decides() -> None:
    """600 tokens, one in sixty allowed: the weight is then Z itself, and all is as unbiased as before."""
    logq, allowed = law(600, scale=2), set(range(0, 600, 60))
    mask = np.isin(np.arange(600), list(allowed))
    draws = [sample(logq, allowed.__contains__, Draws(seed, 0), mask=lambda: mask) for seed in range(4000)]
    check_unbiased(draws, logq, allowed)
    assert p_value([draw.token for draw in draws], logq, allowed) > 1e-3
    decided = [draw for draw in draws if draw.masks]
    assert len(decided) > 1000
    assert {draw.evaluations for draw in decided} == {16}
    assert max(draw.evaluations for draw in draws) <= 17
    assert [draw.log_weight for draw in decided] == pytest.approx([math.log(np.exp(logq)[mask].sum())] * len(decided))


def test_a_mask_ends_a_dead_end_and_one_that_is_not_known_is_none() -> None:
    nothing = np.zeros(1000, dtype=bool)
    assert sample(law(1000), never, Draws(0, 0), mask=lambda: nothing) == Draw(None, -math.inf, 16, masks=1)
    assert sample(law(1000), never, Draws(0, 0), mask=lambda: None) == Draw(None, -math.inf, 1000)
    assert sample(law(1000), never, Draws(0, 0), mask=lambda: nothing, max_draws=16) == Draw(None, -math.inf, 16)
    with pytest.raises(ValueError, match="mask: the geometric estimator"):
        sample(law(4), never, Draws(0, 0), mask=lambda: nothing, estimator="geometric")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("budget", [1, 4])
def test_a_budget_costs_no_exactness(estimator: Estimator, budget: int) -> None:
    logq, allowed = law(40, seed=1), set(range(0, 40, 5))
    draws = [
        sample(logq, allowed.__contains__, Draws(seed, 0), estimator=estimator, max_draws=budget)
        for seed in range(SEEDS)
    ]
    assert max(draw.evaluations for draw in draws) <= budget
    assert any(draw.dead for draw in draws)
    check_unbiased(draws, logq, allowed)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 700), st.integers(0, 10**6), st.sampled_from(ESTIMATORS), st.sampled_from([None, 1, 2, 5]))
def test_everything_allowed_weighs_one(size: int, seed: int, estimator: Estimator, budget: int | None) -> None:
    draw = sample(law(size, seed), always, Draws(seed, 0), estimator=estimator, max_draws=budget)
    assert draw.log_weight == pytest.approx(0, abs=1e-12)
    assert draw.evaluations <= 2
    if estimator == "recursive":
        assert draw.evaluations == min(2, size, budget or 2)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.integers(0, 10**6), st.sampled_from(ESTIMATORS))
def test_scale_and_questions(size: int, seed: int, estimator: Estimator) -> None:
    """Tripled masses triple the weight; no token is asked about twice, none of probability 0; and a position that is
    drawn again gives the same.
    """
    rng = np.random.default_rng(seed)
    logq = np.where(rng.random(size) < 0.8, law(size, seed), -math.inf)
    allowed = set(np.flatnonzero(rng.random(size) < 0.3).tolist())
    asked: list[int] = []

    def listening(token: int) -> bool:
        asked.append(token)
        return token in allowed

    draw = sample(logq, listening, Draws(seed, 1), estimator=estimator)
    assert len(asked) == len(set(asked)) == draw.evaluations
    assert all(logq[token] > -math.inf for token in asked)
    assert draw == sample(logq, allowed.__contains__, Draws(seed, 1), estimator=estimator)
    assert draw.dead == (not any(logq[token] > -math.inf for token in allowed))
    if not draw.dead:
        assert draw.token in allowed
        tripled = sample(logq + math.log(3), allowed.__contains__, Draws(seed, 1), estimator=estimator)
        assert tripled.token == draw.token
        assert tripled.log_weight == pytest.approx(draw.log_weight + math.log(3), abs=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_dead_end_asks_about_every_token_once(estimator: Estimator) -> None:
    draw = sample(law(1000), never, Draws(0, 0), estimator=estimator)
    assert draw == Draw(None, -math.inf, 1000)
    assert draw.dead
    assert sample(np.full(5, -math.inf), always, Draws(0, 0), estimator=estimator) == Draw(None, -math.inf, 0)


def test_a_dead_end_within_a_budget() -> None:
    assert sample(law(1000), never, Draws(0, 0), max_draws=7) == Draw(None, -math.inf, 7)
    geometric = sample(law(1000), never, Draws(0, 0), max_draws=7, estimator="geometric")
    assert geometric.dead
    assert geometric.evaluations <= 7


def test_the_one_allowed_token_may_be_as_rare_as_1e_30() -> None:
    logq = np.array([-1e-30, TINY])
    recursive = sample(logq, {1}.__contains__, Draws(0, 0), estimator="recursive")
    assert recursive.token == 1
    assert recursive.log_weight == pytest.approx(TINY, abs=1e-12)
    geometric = sample(logq, {1}.__contains__, Draws(0, 0), estimator="geometric")
    assert geometric.token == 1
    assert geometric.log_weight == pytest.approx(TINY, abs=10)  # w = 1 / (rejects + 1): a noisy one


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_allowed_mass_that_float64_hardly_knows_is_found(estimator: Estimator) -> None:
    """exp(-720) is 1e-313 of the whole: the token is found, and its weight is a finite, tiny number."""
    for seed in range(50):
        draw = sample(np.array([0.0, -720.0, -722.0]), {2}.__contains__, Draws(seed, 0), estimator=estimator)
        assert draw.token == 2
        assert -math.inf < draw.log_weight < -680


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_vocabulary_of_one(estimator: Estimator) -> None:
    assert sample(np.zeros(1), always, Draws(0, 0), estimator=estimator) == Draw(0, 0.0, 1)


def test_recursive_by_hand() -> None:
    """Masses (.4, .3, .2, .1), allowed {1, 3}; uniforms at the middle of the drawn tokens' cells.

    Visits 0, 1, 2: M = .6, the next token is refused, so w = q(1) = .3. Visits 0, 1, 3: it is allowed, so w = .6.
    Visits 0, 2, 1, 3: w = .4, what is left. With a budget of 2, visits 0, 1: w = .6 without a third question.
    """
    logq = np.log([0.4, 0.3, 0.2, 0.1])

    class Scripted:
        def __init__(self, *tokens: int) -> None:
            self.left, self.tokens = np.exp(logq), list(tokens)

        def uniform(self) -> float:
            token = self.tokens.pop(0)
            u = (self.left[:token].sum() + self.left[token] / 2) / self.left.sum()
            self.left[token] = 0
            return float(u)

        def failures(self, success: float) -> int:
            raise AssertionError("the recursive estimator draws no geometric variable")

    def weight(*tokens: int, budget: int | None = None) -> tuple[float, int]:
        draw = sample(logq, {1, 3}.__contains__, Scripted(*tokens), estimator="recursive", max_draws=budget)
        return math.exp(draw.log_weight), draw.evaluations

    assert weight(0, 1, 2) == (pytest.approx(0.3), 3)
    assert weight(0, 1, 3) == (pytest.approx(0.6), 3)
    assert weight(0, 2, 1, 3) == (pytest.approx(0.4), 4)
    assert weight(0, 1, budget=2) == (pytest.approx(0.6), 2)


def test_bad_arguments() -> None:
    def run(accepts: Accepts = always, **settings: object) -> Draw:
        return sample(law(4), accepts, Draws(0, 0), **settings)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="max_draws is 0"):
        run(max_draws=0)
    with pytest.raises(ValueError, match="estimator is 'best'"):
        run(estimator="best")
    with pytest.raises(ValueError, match="must be True or False"):
        run(accepts=lambda token: None)  # type: ignore[arg-type,return-value]
