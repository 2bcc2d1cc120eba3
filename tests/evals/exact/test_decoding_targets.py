"""Samplers under a constraint, over everything that they can do: the vectors of arXiv:2504.05410's small example.

Four tokens of probability (.4, .3, .2, .1), of which 1 and 3 are allowed: Z = .4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import permutations, product

import numpy as np
import pytest

from align.decoding import awrs, masking, rejection
from align.decoding.lazy import Draws
from align.evals.exact import decoding_targets
from align.evals.exact.chances import Chances, every_run
from align.evals.exact.decoding_targets import (
    PAPER,
    PEAKED,
    THREE_STEPS,
    TWO_STEPS,
    A,
    B,
    Language,
    Sampler,
    moments,
    sequence_means,
    with_mask,
)
from align.evals.exact.rows import Row
from align.evals.exact.weighted import negative_binomial, two_loops, with_replacement

Q, ALLOWED = PAPER
LOGQ = np.log(Q)
EXACT = [0.0, 0.3, 0.0, 0.1]
recursive: Sampler = partial(awrs.sample, estimator="recursive")
geometric: Sampler = partial(awrs.sample, estimator="geometric")


def test_published_form() -> None:
    found = moments(two_loops, LOGQ, ALLOWED)
    assert found.probability == pytest.approx(1, abs=1e-12)
    assert found.mean.tolist() == pytest.approx(EXACT, abs=1e-12)
    assert found.variance == pytest.approx(0.0822962963, abs=1e-10)
    assert found.evaluations == pytest.approx(2.6805555556, abs=1e-10)


def test_recursive_form() -> None:
    found = moments(recursive, LOGQ, ALLOWED, keeps=False)
    assert found.probability == pytest.approx(1, abs=1e-12)
    assert found.mean.tolist() == pytest.approx(EXACT, abs=1e-12)
    assert found.variance == pytest.approx(0.05, abs=1e-12)
    assert found.evaluations == pytest.approx(2.8333333333, abs=1e-10)


def test_recursive_form_that_ends_with_a_mask() -> None:
    """After one refusal, w = Z = .4. Else x = 1 (.3) is followed by 3 (1/7, w = 1) or not (w = .3), and x = 3 (.1) by
    1 (1/3, w = 1) or not (w = .1): E w^2 = .6 .16 + .3 (1/7 + 6/7 .09) + .1 (1/3 + 2/3 .01) = .196, variance .036.
    """
    found = moments(partial(with_mask, patience=1), LOGQ, ALLOWED, keeps=False)
    assert found.variance == pytest.approx(0.036, abs=1e-12)
    assert found.evaluations == pytest.approx(0.4 * 2 + 0.6, abs=1e-12)
    for patience, allowed in product((1, 2, 3), map(frozenset, ({0}, {3}, {1, 3}, {0, 1, 2}, set()))):
        found = moments(partial(with_mask, patience=patience), LOGQ, allowed, keeps=False)
        assert found.probability == pytest.approx(1, abs=1e-12)
        assert found.mean.tolist() == pytest.approx([q * (t in allowed) for t, q in enumerate(Q)], abs=1e-12)


def test_recursive_form_against_the_geometric_one_on_peaked_laws() -> None:
    """Variance of w times questions, the first at most the second's; which is why no other rule chooses."""
    for most, allowed in product((0.7, 0.9, 0.97), map(frozenset, ({0}, {0, 1}, {0, 2, 4}, {1}, {1, 3}, {4, 5}))):
        q = np.array([most, *((1 - most) * np.array([0.4, 0.27, 0.17, 0.1, 0.06]))])
        z = float(q[list(allowed)].sum())
        one = moments(recursive, np.log(q), allowed, keeps=False)
        draws = [geometric(np.log(q), allowed.__contains__, Draws(seed, 0)) for seed in range(200)]  # type: ignore[arg-type]
        questions = float(np.mean([draw.evaluations for draw in draws]))
        assert one.variance * one.evaluations < 0.8 * negative_binomial(z, 2, most=20_000)[1] * questions


@pytest.mark.parametrize(
    ("wanted", "variance", "draws"), [(2, 0.0843441952, 5), (3, 0.0475410731, 7.5), (5, 0.0244809539, 12.5)]
)
def test_with_replacement(wanted: int, variance: float, draws: float) -> None:
    """By the sum over N, and what the sampler gives over 2e4 seeds within 4 sigma: mean of w, its variance, N;
    for one loop, the draws up to the first accept, 1 / Z = 2.5.
    """
    assert negative_binomial(0.4, wanted) == pytest.approx((0.4, variance, draws), abs=1e-10)
    verdicts: list[list[bool]] = []

    def accepts(token: int) -> bool:
        verdicts[-1].append(token in ALLOWED)
        return token in ALLOWED

    def run(seed: int) -> tuple[float, int]:
        verdicts.append([])
        draw = with_replacement(LOGQ, accepts, Draws(seed, 0), wanted=wanted)
        return math.exp(draw.log_weight), draw.evaluations

    weights, asked = np.array([run(seed) for seed in range(20_000)]).T
    once = [1 + run.index(True) for run in verdicts]
    for values, exact in ((weights, 0.4), ((weights - 0.4) ** 2, variance), (asked, draws), (once, 2.5)):
        assert np.mean(values) == pytest.approx(exact, abs=4 * np.std(values) / math.sqrt(len(weights)))


@pytest.mark.parametrize("budget", range(1, 7))
def test_geometric_form_under_a_budget(budget: int) -> None:
    """Two accepts or R rejects, R = 4 in the paper's vector. That is a run of at most R draws: the one after an accept
    and R - 1 rejects cannot change the weight 1/R.
    """
    found = moments(partial(geometric, max_draws=budget), LOGQ, ALLOWED, failures=budget)
    assert found.probability == pytest.approx(1, abs=1e-12)
    assert found.mean.tolist() == pytest.approx(EXACT, abs=1e-12)


def test_geometric_form_reconstructs_draws_with_replacement() -> None:
    """Without a budget its weights are those of draws with replacement: their variance, over 2e4 seeds."""
    draws = [geometric(LOGQ, ALLOWED.__contains__, Draws(seed, 1)) for seed in range(20_000)]
    weights = np.exp([draw.log_weight for draw in draws])
    squares = (weights - 0.4) ** 2
    assert weights.mean() == pytest.approx(0.4, abs=4 * weights.std() / math.sqrt(20_000))
    assert squares.mean() == pytest.approx(0.0843441952, abs=4 * squares.std() / math.sqrt(20_000))


def test_one_loop() -> None:
    """Questions until the first accept, without replacement and by masking."""
    assert moments(rejection.sample, LOGQ, ALLOWED).evaluations == pytest.approx(1.8333333333, abs=1e-10)
    assert moments(masking.sample, LOGQ, ALLOWED).evaluations == pytest.approx(4, abs=1e-12)


@pytest.mark.parametrize(
    ("sampler", "keeps"), [(recursive, False), (two_loops, True), (rejection.sample, True), (masking.sample, True)]
)
@pytest.mark.parametrize("world", [PAPER, PEAKED])
def test_the_token_follows_the_conditional_law(
    sampler: Sampler, keeps: bool, world: tuple[np.ndarray, frozenset[int]]
) -> None:
    q, allowed = world
    exact = np.array([mass if token in allowed else 0 for token, mass in enumerate(q)])
    found = moments(sampler, np.log(q), allowed, keeps=keeps)
    assert found.law.tolist() == pytest.approx((exact / exact.sum()).tolist(), abs=1e-12)


def test_everything_allowed() -> None:
    """Z = 1: the weight is 1. Two questions, fewer in the published form, where the first token may come again."""
    everything = frozenset(range(4))
    found = moments(recursive, LOGQ, everything, keeps=False)
    assert (found.variance, found.evaluations) == (pytest.approx(0, abs=1e-12), pytest.approx(2, abs=1e-12))
    found = moments(two_loops, LOGQ, everything)
    assert found.variance == pytest.approx(0, abs=1e-12)
    assert found.evaluations == pytest.approx(2 - float(Q @ Q), abs=1e-12)


@pytest.mark.parametrize("budget", [None, 1, 2, 3])
def test_the_order_of_the_vocabulary_does_not_matter(budget: int | None) -> None:
    """And every set of allowed tokens has its exact mean, the empty one too."""
    sampler: Sampler = partial(recursive, max_draws=budget)
    for allowed in map(frozenset, ({0}, {1, 3}, {0, 1, 2}, set())):
        first = moments(sampler, LOGQ, allowed, keeps=False)
        assert first.mean.tolist() == pytest.approx([q * (t in allowed) for t, q in enumerate(Q)], abs=1e-12)
        for order in list(permutations(range(4)))[1::5]:
            moved = moments(
                sampler, LOGQ[list(order)], frozenset(order.index(token) for token in allowed), keeps=False
            )
            assert moved.mean.tolist() == pytest.approx(first.mean[list(order)].tolist(), abs=1e-12)
            assert moved.variance == pytest.approx(first.variance, abs=1e-12)
            assert moved.evaluations == pytest.approx(first.evaluations, abs=1e-12)


def test_masking_s_distortion() -> None:
    """Posterior (9, 5, 5)/19, Z = .19. Masking (.9, .05, .05), with step weights (.1, 1, 1) of ESS 2.19."""
    masses = TWO_STEPS.masses()
    assert list(masses) == [(A, A), (B, A), (B, B)]
    assert sum(masses.values()) == pytest.approx(0.19, abs=1e-12)
    posterior = np.array(list(masses.values())) / 0.19
    assert posterior.tolist() == pytest.approx([0.47368421, 0.26315789, 0.26315789], abs=1e-8)
    without = sequence_means(TWO_STEPS, masking.sample, 1, weighed=False)
    assert list(without.values()) == pytest.approx([0.9, 0.05, 0.05], abs=1e-12)
    weights = np.array([0.1, 1, 1])
    assert list(masses.values()) == pytest.approx((weights * list(without.values())).tolist(), abs=1e-12)
    assert weights.sum() ** 2 / (weights**2).sum() == pytest.approx(2.1940298507, abs=1e-10)


@pytest.mark.parametrize(("threshold", "resampling"), [(0.0, "systematic"), (0.9, "systematic"), (1.0, "multinomial")])
def test_sequences_are_unbiased_and_unweighed_ones_are_not(threshold: float, resampling: str) -> None:
    """The same comparison passes for AWRS in SMC, and fails for tokens whose weights are left out."""

    def row(sampler: Sampler, keeps: bool, weighed: bool) -> Row:
        exact = THREE_STEPS.masses()
        found = sequence_means(
            THREE_STEPS, sampler, 2, keeps=keeps, weighed=weighed, threshold=threshold, resampling=resampling
        )
        scale = 1.0 if weighed else sum(exact.values()) / sum(found.values())  # its law, at the right total
        far = max(abs(found[text] * scale - mass) for text, mass in exact.items())
        return Row("smc", "", sum(exact.values()), sum(found.values()), far, 1e-12)

    assert row(recursive, False, True).status == "pass"
    assert row(masking.sample, True, True).status == "pass"
    assert row(masking.sample, True, False).status == "miss"
    assert row(rejection.sample, True, True).status == "miss"


@pytest.mark.parametrize("name", ["systematic", "multinomial"])
def test_a_wrong_resampling_misses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All places to the first ancestor: the mean is another."""
    right: Callable[..., list[int]] = getattr(decoding_targets, name)
    monkeypatch.setattr(decoding_targets, name, lambda weights, *given: right(weights, *given)[:1] * len(weights))
    found = sequence_means(THREE_STEPS, masking.sample, 3, threshold=1.0, resampling=name)
    assert max(abs(found[text] - mass) for text, mass in THREE_STEPS.masses().items()) > 1e-3


def test_particles_that_meet_dead_ends_are_unbiased() -> None:
    """Not prefix-closed: after b nothing is allowed, which is seen too late. Z = p(aa) = .09."""

    class Late(Language):
        def accepts(self, prefix: tuple[int, ...], token: int) -> bool:
            return not prefix or (*prefix, token) in self.texts

    found = sequence_means(Late(TWO_STEPS.law, frozenset({(A, A)})), recursive, 2, keeps=False, threshold=1.0)
    assert found[A, A] == pytest.approx(0.09, abs=1e-12)


def test_every_run_is_every_run() -> None:
    """Two coins, the second only after heads."""

    def run(chances: Chances) -> str:
        first = "ht"[chances.choose([0.25, 0.75])]
        return first + ("ht"[chances.choose([0.5, 0.5])] if first == "h" else "")

    assert list(every_run(run)) == [(0.125, "hh"), (0.125, "ht"), (0.75, "t")]
    assert len(list(every_run(lambda chances: [chances.choose([0.5, 0, 0.5]) for _ in range(4)]))) == 16
    assert list(every_run(lambda chances: 7)) == [(1.0, 7)]
    thrown = [out for _, out in every_run(lambda chances: (chances.choose([0.5, 0, 0.5]), chances.choose([1.0])))]
    assert thrown == list(product((0, 2), (0,)))
