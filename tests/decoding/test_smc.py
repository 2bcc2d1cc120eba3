"""The SMC driver: one result in step and running free, unbiased, resampled by rule; dead populations said plainly."""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Literal

import numpy as np
import pytest
from scipy import stats

from align.decoding import awrs, masking
from align.decoding.lazy import Draw, Draws
from align.decoding.smc import (
    SMC,
    Action,
    Copy,
    Extend,
    Extended,
    Finished,
    Resampled,
    Result,
    Stop,
    multinomial,
    systematic,
)
from align.evals.exact.chances import Chances, TokenChances, every_run
from align.evals.exact.decoding_targets import TWO_STEPS, Language, follow

A, B, END = 0, 1, 2
SEEDS = 20_000
Prefix = tuple[int, ...]


def automaton(prefix: Prefix) -> np.ndarray:
    """The law of a, b and the end, which depends on the last token."""
    return np.array([0.5, 0.3, 0.2] if not prefix or prefix[-1] == A else [0.2, 0.4, 0.4])


def accepts(prefix: Prefix, token: int) -> bool:
    """At most four letters, no two a's in a row, a b at the end: what ends in a, and may not grow, is stuck."""
    if token == END:
        return bool(prefix) and prefix[-1] == B
    return len(prefix) < 4 and not (token == A and prefix[-1:] == (A,))


@cache
def masses(prefix: Prefix = ()) -> dict[Prefix, float]:
    """``p(x)`` of every accepted text."""
    found: dict[Prefix, float] = {}
    for token, p in enumerate(automaton(prefix)):
        if accepts(prefix, token):
            further = {(*prefix, END): 1.0} if token == END else masses((*prefix, token))
            found |= {text: p * mass for text, mass in further.items()}
    return found


Report = Callable[[int, int, Prefix], Extended]


def reports(seed: int) -> Report:
    """What the particles of this seed come to."""

    def report(particle: int, step: int, prefix: Prefix) -> Extended:
        draw = awrs.sample(np.log(automaton(prefix)), lambda t: accepts(prefix, t), Draws(seed, step, particle))
        return Extended(particle, step, draw.token, draw.log_weight, ended=draw.token == END)

    return report


@cache
def outcomes(last: Prefix, full: bool) -> tuple[list[Draw], list[float]]:
    """What AWRS can come to after a prefix that ends like this, and the running sum of the probabilities."""
    prefix = (B,) * (4 - len(last)) + last if full else last

    def run(chances: Chances) -> Draw:
        source = TokenChances(automaton(prefix), lambda t: accepts(prefix, t), chances, keeps=False)
        return awrs.sample(np.log(automaton(prefix)), source.accepts, source)

    chance, draws = zip(*every_run(run), strict=True)
    return list(draws), list(accumulate(chance))


def quick_reports(seed: int) -> Report:
    """The same law, from a table: for many seeds."""

    def report(particle: int, step: int, prefix: Prefix) -> Extended:
        draws, upto = outcomes(prefix[-1:], len(prefix) == 4)
        draw = draws[min(bisect(upto, Draws(seed, step, particle).uniform()), len(draws) - 1)]
        return Extended(particle, step, draw.token, draw.log_weight, ended=draw.token == END)

    return report


def run_free(driver: SMC, report: Report, rng: random.Random) -> Result:
    """An engine whose particles go on by themselves, report in any order, and are heard of after they were stopped."""
    prefixes: dict[int, Prefix] = {}
    steps: dict[int, int] = {}
    queue: list[Extended] = []  # made, not yet delivered; of each particle in order
    running: set[int] = set()
    cuts: dict[tuple[int, int], Prefix] = {}  # what a particle had said after a step

    def act(actions: list[Action]) -> Result | None:
        for action in actions:
            match action:
                case Extend(particle):
                    assert particle in prefixes or not queue
                    if particle not in prefixes:
                        prefixes[particle], steps[particle] = (), 0
                        running.add(particle)
                case Copy(source, target, step):
                    prefixes[target], steps[target] = cuts[source, step], step + 1
                    cuts[target, step] = cuts[source, step]
                    running.add(target)
                case Stop(particle):
                    running.discard(particle)
                case Finished(result):
                    return result
        return None

    result = act(driver.start())
    while result is None:
        if running and (not queue or rng.random() < 0.6):
            particle = rng.choice(sorted(running))
            event = report(particle, steps[particle], prefixes[particle])
            steps[particle] += 1
            if event.token is not None:
                prefixes[particle] += (event.token,)
            cuts[particle, event.step] = prefixes[particle]
            if event.ended or event.token is None:
                running.discard(particle)
            queue.append(event)
        else:
            first = {event.particle: event for event in reversed(queue)}
            event = rng.choice([first[particle] for particle in sorted(first)])
            queue.remove(event)
            result = act(driver.receive(event))
    for event in queue:
        assert driver.receive(event) == []
    return result


@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
def test_running_free_is_running_in_step(resampling: str) -> None:
    resamplings = 0
    for seed in range(80):
        drivers = [SMC(6, seed=seed, threshold=0.8, resampling=resampling) for _ in range(3)]  # type: ignore[arg-type]
        in_step = follow(drivers[0], reports(seed))
        assert run_free(drivers[1], reports(seed), random.Random(seed)) == in_step
        assert run_free(drivers[2], reports(seed), random.Random(-seed - 1)) == in_step
        resamplings += in_step.resamplings
    assert resamplings > 30


def test_unbiased_over_many_seeds() -> None:
    """AWRS and resampling, 2e4 seeds: the normaliser, and the mass of each of the likeliest texts, within 4 sigma."""
    exact = masses()
    found = [follow(SMC(3, seed=seed, threshold=0.7), quick_reports(seed)) for seed in range(SEEDS)]
    assert sum(result.resamplings for result in found) > SEEDS / 10
    assert any(result.dead_ends for result in found)
    check(np.exp([result.log_normaliser for result in found]), sum(exact.values()))
    for text in sorted(exact, key=exact.__getitem__)[-4:]:
        shares = [
            sum(math.exp(sample.log_weight) for sample in result.samples if sample.tokens == text) / 3
            for result in found
        ]
        check(np.array(shares), exact[text])


def offspring(driver: SMC, slots: list[int], step: int, weights: list[float]) -> list[int]:
    """Report a step of these weights; how many offspring each slot has. ``slots`` becomes the next population."""
    actions: list[Action] = []
    for slot, particle in enumerate(slots):
        actions = driver.receive(Extended(particle, step, slot, math.log(weights[slot])))
    stopped = [action.particle for action in actions if isinstance(action, Stop)]
    copies = [action for action in actions if isinstance(action, Copy)]
    sources = [slots.index(copy.source) for copy in copies]
    counts = [(particle not in stopped) + sources.count(slot) for slot, particle in enumerate(slots)]
    for particle, copy in zip(stopped, copies, strict=True):
        slots[slots.index(particle)] = copy.target
    return counts


@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
def test_offspring_over_many_seeds(resampling: Literal["systematic", "multinomial"]) -> None:
    """Weights (.62, .28, .1) at two steps: a particle has N w offspring on average, N = 3, and the draws of one step
    say nothing of the other's. Systematic counts are N w rounded up or down, multinomial ones vary by N w (1 - w).
    """
    weights, found = [0.62, 0.28, 0.1], list[list[list[int]]]()
    for seed in range(SEEDS // 4):
        driver, slots = SMC(3, seed=seed, threshold=1.0, resampling=resampling), [0, 1, 2]
        driver.start()
        found.append([offspring(driver, slots, step, weights) for step in range(2)])
    counts = np.array(found)
    for slot, weight in enumerate(weights):
        first, second = counts[:, 0, slot], counts[:, 1, slot]
        check(first, 3 * weight)
        check(second, 3 * weight)
        check((first - 3 * weight) * (second - 3 * weight), 0.0)
        if resampling == "systematic":
            assert set(first) <= {math.floor(3 * weight), math.ceil(3 * weight)}
        else:
            check((first - 3 * weight) ** 2, 3 * weight * (1 - weight))


def check(values: np.ndarray, exact: float) -> None:
    assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(len(values))


def posterior_p_value(texts: list[Prefix], language: Language) -> float:
    """Of a chi-square test that the texts follow the posterior."""
    exact, observed = language.masses(), Counter(texts)
    assert set(observed) <= set(exact)
    total = sum(exact.values())
    expected = [len(texts) * mass / total for mass in exact.values()]
    return float(stats.chisquare([observed[text] for text in exact], expected).pvalue)


def test_weights_give_the_posterior_and_masking_does_not() -> None:
    """Sequences of AWRS tokens, kept with the probability of their weight (at most 1), follow the posterior; sequences
    of masked tokens, weights left out, fail the same test.
    """
    texts: dict[str, list[Prefix]] = {"awrs": [], "masked": []}
    for seed in range(SEEDS // 4):
        for name, sampler in (("awrs", awrs.sample), ("masked", masking.sample)):
            prefix, log_weight = (), 0.0
            for step in range(2):
                logq = np.log(TWO_STEPS.law(prefix))
                draw = sampler(logq, lambda t, prefix=prefix: TWO_STEPS.accepts(prefix, t), Draws(seed, step))
                prefix, log_weight = (*prefix, draw.token), log_weight + draw.log_weight
            if name == "masked" or Draws(seed, 2).uniform() < math.exp(log_weight):
                texts[name].append(prefix)
    assert len(texts["awrs"]) > 500
    assert posterior_p_value(texts["awrs"], TWO_STEPS) > 1e-3
    assert posterior_p_value(texts["masked"], TWO_STEPS) < 1e-9


def of(driver: SMC, *events: Extended) -> list[Action]:
    """Start, and what follows on the last of the events."""
    actions = driver.start()
    for event in events:
        actions = driver.receive(event)
    return actions


def test_a_resampling_by_hand() -> None:
    """Weights (1, 0, 0, 1/1000): particle 0 takes all four places; 1 is dead, so 2 and 3 are stopped; mean 1001/4000.

    Particle 0 is a step ahead, which its copies do not get.
    """
    driver = SMC(4, seed=0)
    assert driver.start() == [Extend(0), Extend(1), Extend(2), Extend(3)]
    assert driver.receive(Extended(0, 0, 7, 0.0)) == []
    assert driver.receive(Extended(0, 1, 8, 0.0)) == []
    assert driver.receive(Extended(1, 0, None, -math.inf)) == []
    assert driver.receive(Extended(2, 0, 7, -800.0)) == []
    actions = driver.receive(Extended(3, 0, 9, math.log(1e-9)))
    assert actions == [
        *(Stop(1), Resampled(0, (0, 0, 0, 0), (0, 4, 5, 6)), Stop(2), Stop(3)),
        *(Copy(0, 4, 0), Copy(0, 5, 0), Copy(0, 6, 0)),
        *(Extend(4), Extend(5), Extend(6)),
    ]
    assert driver.receive(Extended(2, 1, 1, 0.0)) == []  # late
    assert driver.receive(Extended(0, 1, 8, 0.0)) == []  # said before
    for particle in (4, 5):
        assert driver.receive(Extended(particle, 1, 8, 0.0, ended=True)) == []
    assert driver.receive(Extended(6, 1, 3, 0.0, ended=True)) == [Stop(4), Stop(5), Stop(6), Extend(0)]
    stop, finished = driver.receive(Extended(0, 2, 2, 0.0, ended=True))
    assert stop == Stop(0)
    assert isinstance(finished, Finished)
    result = finished.result
    assert [sample.tokens for sample in result.samples] == [(7, 8, 2), (7, 8), (7, 8), (7, 3)]
    assert result.log_normaliser == pytest.approx(math.log((1 + 1e-9) / 4), abs=1e-12)
    assert (result.ess, result.resamplings, result.dead_ends, result.reason) == (4.0, 1, 1, "")
    assert result.best is not None
    assert result.best.tokens == (7, 8)
    assert driver.receive(Extended(0, 3, 2, 0.0)) == []  # after the end


def test_particles_that_have_ended_are_copied_without_the_engine() -> None:
    driver = SMC(2, seed=0, threshold=1.0)
    stop, resampled, other, finished = of(
        driver,
        *(Extended(0, 0, 5, 0.0), Extended(1, 0, 6, 0.0)),
        *(Extended(0, 1, 5, 0.0, ended=True), Extended(1, 1, 6, -50.0)),
    )
    assert (stop, other) == (Stop(0), Stop(1))
    assert resampled == Resampled(1, (0, 0), (0, 2))
    assert isinstance(finished, Finished)
    assert [sample.tokens for sample in finished.result.samples] == [(5, 5), (5, 5)]


def test_all_dead_is_a_result_that_says_so() -> None:
    driver = SMC(2, seed=0)
    actions = of(
        driver,
        *(Extended(0, 0, 5, -1.0), Extended(1, 0, None, -math.inf)),
        Extended(0, 1, None, -math.inf),
    )
    assert isinstance(actions[-1], Finished)
    result = actions[-1].result
    assert result.reason == "all 2 particles came to dead ends, the last at step 1"
    assert (result.log_normaliser, result.ess, result.dead_ends) == (-math.inf, 0.0, 2)
    assert result.best is None
    assert result.drawn is None
    assert all(sample.log_weight == -math.inf for sample in result.samples)


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, 0), (1.0, 2)])
def test_thresholds_of_never_and_always(threshold: float, expected: int) -> None:
    driver = SMC(3, seed=0, threshold=threshold)
    result = follow(
        driver,
        lambda particle, step, prefix: Extended(particle, step, particle, -0.1 * (particle % 3), ended=step == 2),
    )
    assert result.resamplings == expected


def test_equal_weights_are_never_resampled() -> None:
    driver = SMC(7, seed=0, threshold=1.0)
    result = follow(driver, lambda particle, step, prefix: Extended(particle, step, 1, -0.3, ended=step == 5))
    assert (result.resamplings, result.ess) == (0, pytest.approx(7.0, abs=1e-9))
    assert result.log_normaliser == pytest.approx(-1.8, abs=1e-12)


def test_the_weight_carries_the_latest_potential() -> None:
    """Twists 2, (none), 5, then a final weight of 3: the product is the final weight, times the tokens' weights."""
    potentials = [math.log(2), None, math.log(5), math.log(3)]
    driver = SMC(1, seed=0)
    result = follow(
        driver, lambda particle, step, prefix: Extended(particle, step, step, -0.5, step == 3, potentials[step])
    )
    assert result.samples[0].log_weight == pytest.approx(math.log(3) - 2, abs=1e-12)


def test_graded_potentials_are_unbiased_with_and_without_a_twist() -> None:
    """Final weight phi(x) = 1 + number of b's, as a twist that of the b's so far: both estimate sum_x p(x) phi(x)."""
    exact = sum(mass * (1 + text.count(B)) for text, mass in masses().items())
    for twisted in (False, True):
        estimates = []
        for seed in range(4000):
            plain = quick_reports(seed)

            def graded(
                particle: int, step: int, prefix: Prefix, plain: Report = plain, twisted: bool = twisted
            ) -> Extended:
                event = plain(particle, step, prefix)
                phi = None
                if event.ended or (twisted and event.token is not None):
                    phi = math.log(1 + (*prefix, event.token).count(B))
                return Extended(particle, step, event.token, event.log_weight, event.ended, phi)

            estimates.append(math.exp(follow(SMC(3, seed=seed, threshold=0.9), graded).log_normaliser))
        check(np.array(estimates), exact)


def test_a_potential_of_zero_kills() -> None:
    driver = SMC(1, seed=0)
    actions = of(driver, Extended(0, 0, 4, 0.0, log_potential=-math.inf))
    assert actions[0] == Stop(0)
    assert isinstance(actions[1], Finished)
    assert actions[1].result.reason


def test_one_is_drawn_by_weight_and_the_best_is_the_heaviest_sequence() -> None:
    """Weights (.4, .3, .3), the last two the same text: it is the best with .6, and drawn three times in five."""
    drawn, best = Counter[Prefix](), set[Prefix]()
    for seed in range(2000):
        driver = SMC(3, seed=seed, threshold=0)
        result = follow(
            driver, lambda p, step, prefix: Extended(p, step, min(p, 1), math.log([0.4, 0.3, 0.3][p]), ended=True)
        )
        assert result.drawn is not None
        assert result.best is not None
        drawn[result.drawn.tokens] += 1
        best.add(result.best.tokens)
    assert best == {(1,)}
    assert drawn[1,] == pytest.approx(1200, abs=4 * math.sqrt(2000 * 0.24))


def test_systematic_by_hand() -> None:
    """N w = (2, 0, 1.5, .5): with u = .1 the places .025, .275, .525, .775; the third has .5 to .875."""
    weights = [0.5, 0.0, 0.375, 0.125]
    assert systematic(weights, 0.1) == [0, 0, 2, 2]
    assert systematic(weights, 0.9) == [0, 0, 2, 3]
    assert multinomial(weights, [0.9, 0.1, 1 - 2**-53, 0.6]) == [0, 2, 3, 3]


def test_a_weight_of_zero_is_never_drawn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        weights = rng.dirichlet(np.full(5, 0.1)) * (rng.random(5) < 0.6)
        if weights.sum() == 0:
            continue
        for u in (2**-53, float(rng.random()), 1 - 2**-53):
            for chosen in (systematic(list(weights), u), multinomial(list(weights), [u] * 5)):
                assert all(weights[index] > 0 for index in chosen)
                assert len(chosen) == 5


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (Extended(9, 0, 1, 0.0), "particle 9 reports step 0: there is no such particle"),
        (Extended(0, 1, 1, 0.0), "particle 0, step 1: the step is out of order, its last was step -1"),
        (Extended(0, 0, 1, math.nan), "particle 0, step 0: log_weight is nan"),
        (Extended(0, 0, 1, math.inf), "log_weight is inf"),
        (Extended(0, 0, 1, 0.0, log_potential=math.nan), "log_potential is nan"),
        (Extended(0, 0, None, 0.0), "there is no token, so log_weight must be -inf"),
    ],
)
def test_events_that_cannot_be(event: Extended, message: str) -> None:
    driver = SMC(2, seed=0)
    driver.start()
    with pytest.raises(ValueError, match=message):
        driver.receive(event)
    assert driver.receive(Extended(0, 0, 1, 0.0)) == []
    assert driver.receive(Extended(1, 0, 1, 0.0)) == [Extend(0), Extend(1)]


def test_a_particle_that_goes_on_after_its_end() -> None:
    driver = SMC(2, seed=0)
    of(driver, Extended(0, 0, 1, 0.0, ended=True))
    with pytest.raises(ValueError, match="it is over since step 0"):
        driver.receive(Extended(0, 1, 1, 0.0))


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="particles is 0"):
        SMC(0, seed=0)
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        SMC(2, seed=0, threshold=1.5)
    with pytest.raises(ValueError, match="resampling is 'residual'"):
        SMC(2, seed=0, resampling="residual")  # type: ignore[arg-type]
