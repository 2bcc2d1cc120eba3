"""What samplers under a constraint ask for, by enumeration of everything that they can do.

A sampler of one token must weigh properly, ``E[w 1{token = t}] = q(t) 1{t allowed}``; a sampler of sequences must have
``E[sum_i w_i 1{x_i = x} / N] = p(x) 1{x allowed}`` for every sequence x, and so the right normaliser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from align.decoding import awrs, masking, rejection
from align.decoding.law import Law
from align.decoding.lazy import Accepts, Draw
from align.decoding.smc import SMC, Copy, Extend, Extended, Finished, Result, multinomial, systematic

from .chances import Chances, TokenChances, every_run
from .rows import Row, Stack, Target
from .transfer_targets import GUIDED
from .weighted import two_loops

Sampler = Callable[[NDArray[np.float64], Accepts, TokenChances], Draw]
Numbers = NDArray[np.float64]

PAPER = (np.array([0.4, 0.3, 0.2, 0.1]), frozenset({1, 3}))
PEAKED = (np.array([0.75, 0.05, 0.15, 0.05]), frozenset({1, 2}))
"""Probabilities of four tokens, and those that are allowed."""


@dataclass(frozen=True)
class Moments:
    """What a sampler of one token does on average, over everything that it can do.

    Args:
        probability: of all runs together: 1.
        mean: ``E[w 1{token = t}]``, (V,).
        law: ``P(token = t)``, weights left out, (V,).
        variance: of w.
        evaluations: mean number of questions.
    """

    probability: float
    mean: Numbers
    law: Numbers
    variance: float
    evaluations: float


def moments(
    sampler: Sampler, logq: Numbers, allowed: frozenset[int], *, keeps: bool = True, failures: int = 0
) -> Moments:
    """Run a sampler in every way that it can go; ``keeps`` and ``failures`` as in ``TokenChances``."""
    probability = square = evaluations = 0.0
    mean, law, q = np.zeros(len(logq)), np.zeros(len(logq)), np.exp(logq)

    def run(chances: Chances) -> Draw:
        source = TokenChances(q, allowed.__contains__, chances, keeps=keeps, failures=failures)
        return sampler(logq, source.accepts, source)

    for chance, draw in every_run(run):
        probability += chance
        evaluations += chance * draw.evaluations
        if draw.token is not None:
            mean[draw.token] += chance * math.exp(draw.log_weight)
            law[draw.token] += chance
            square += chance * math.exp(2 * draw.log_weight)
    return Moments(probability, mean, law, square - float(mean.sum()) ** 2, evaluations)


@dataclass(frozen=True)
class Language:
    """Sequences of a fixed length over a few tokens, under a law and a constraint that is prefix-closed.

    Args:
        law: probabilities of the next token after a prefix, (V,).
        texts: the sequences that are allowed, all of the same length.
    """

    law: Callable[[tuple[int, ...]], Numbers]
    texts: frozenset[tuple[int, ...]]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return len(next(iter(self.texts)))

    def accepts(self, prefix: tuple[int, ...], token: int) -> bool:
        """Whether some text goes on like this."""
        begin = (*prefix, token)
        return any(text[: len(begin)] == begin for text in self.texts)

    def masses(self) -> dict[tuple[int, ...], float]:
        """``p(x)`` of every text, in order; their sum is the normaliser."""
        return {
            text: float(np.prod([self.law(text[:step])[token] for step, token in enumerate(text)]))
            for text in sorted(self.texts)
        }


A, B = 0, 1
TWO_STEPS = Language(
    lambda prefix: np.array([0.9, 0.1] if not prefix else [0.1, 0.9] if prefix[-1] == A else [0.5, 0.5]),
    frozenset({(A, A), (B, A), (B, B)}),
)
"""p(a) = .9, p(a|a) = .1, p(.|b) = 1/2; aa, ba and bb are allowed. Masking puts .9 on aa, the posterior 9/19."""

THREE_STEPS = Language(
    lambda prefix: np.array([0.6, 0.4] if not prefix or prefix[-1] == A else [0.3, 0.7]),
    frozenset(text for text in product((A, B), repeat=3) if text.count(B) >= 2),
)
"""At least two b's of three: after an a a b must follow, so that weights differ before the last step, and resampling
matters.
"""


def follow(driver: SMC, extend: Callable[[int, int, tuple[int, ...]], Extended]) -> Result:
    """Run a driver in step; ``extend(particle, step, prefix)`` gives what a particle reports."""
    prefixes: dict[int, tuple[int, ...]] = {}
    actions = driver.start()
    for action in actions:  # grows on the way
        match action:
            case Extend(particle):
                prefix = prefixes.get(particle, ())
                event = extend(particle, len(prefix), prefix)
                prefixes[particle] = prefix if event.token is None else (*prefix, event.token)
                actions += driver.receive(event)
            case Copy(source, target, step):
                prefixes[target] = prefixes[source][: step + 1]
            case Finished(result):
                return result
    raise AssertionError("the driver stopped without a result")


class _EverySMC(SMC):
    """The driver with its resampling enumerated."""

    chances: Chances

    def _ancestors(self, weights: Sequence[float]) -> list[int]:
        if self._resampling == "systematic":
            edges = np.unique([0.0, 1.0, *(np.cumsum(weights)[:-1] * len(weights) % 1)])
            cell = self.chances.choose(list(np.diff(edges)))
            return systematic(weights, float(edges[cell] + edges[cell + 1]) / 2)
        upto = np.cumsum(weights)
        chosen = [self.chances.choose(weights) for _ in weights]
        return multinomial(weights, [float(upto[index] - weights[index] / 2) for index in chosen])


def sequence_means(
    language: Language,
    sampler: Sampler,
    particles: int,
    *,
    keeps: bool = True,
    weighed: bool = True,
    **settings: object,
) -> dict[tuple[int, ...], float]:
    """``E[sum_i w_i 1{x_i = x} / N]`` of every text, over everything that the particles can do.

    Args:
        sampler: of one token; ``keeps`` as in ``TokenChances``.
        weighed: False leaves the weights of the tokens out.
        settings: of the driver.
    """
    found = dict.fromkeys(sorted(language.texts), 0.0)

    def run(chances: Chances) -> Result:
        driver = _EverySMC(particles, seed=0, **settings)  # type: ignore[arg-type]
        driver.chances = chances

        def extend(particle: int, step: int, prefix: tuple[int, ...]) -> Extended:
            q = language.law(prefix)
            source = TokenChances(q, lambda token: language.accepts(prefix, token), chances, keeps=keeps)
            draw = sampler(np.log(q), source.accepts, source)
            log_weight = draw.log_weight if weighed or draw.dead else 0.0
            return Extended(particle, step, draw.token, log_weight, ended=step + 1 == language.length)

        return follow(driver, extend)

    for chance, result in every_run(run):
        for sample in result.samples:
            if sample.tokens in found:
                found[sample.tokens] += chance * math.exp(sample.log_weight) / particles
    return found


def _tolerance(stack: Stack) -> float:
    return stack.tolerance(1e-12, 1e-6)


def _logq(q: Numbers, stack: Stack) -> Numbers:
    """Log-probs as the law gives them from logits on the stack."""
    return Law().log_probs(stack.here(torch.tensor(q).log() + 3.0))


def _proper(method: str, quantity: str, found: Moments, q: Numbers, allowed: frozenset[int], stack: Stack) -> Row:
    exact = np.array([mass if token in allowed else 0.0 for token, mass in enumerate(q)])
    far = float(np.abs(found.mean - exact).max() + abs(found.probability - 1))
    return Row(method, quantity, float(exact.sum()), float(found.mean.sum()), far, _tolerance(stack))


def _conditional(method: str, found: Moments, q: Numbers, allowed: frozenset[int], stack: Stack) -> Row:
    exact = np.array([mass if token in allowed else 0.0 for token, mass in enumerate(q)])
    far = float(np.abs(found.law - exact / exact.sum()).sum() / 2)
    first = min(allowed)
    quantity = "law of the token, and p(first)"
    return Row(method, quantity, float(exact[first] / exact.sum()), float(found.law[first]), far, _tolerance(stack))


def with_mask(logq: Numbers, accepts: Accepts, source: TokenChances, *, patience: int) -> Draw:
    """AWRS that asks for all verdicts after so many refusals."""
    return awrs.sample(logq, accepts, source, mask=source.mask, patience=patience)


def check_recursive(stack: Stack) -> Iterator[Row]:
    """Every order of visits, with and without a budget, and with a mask after one or two refusals."""
    name, recursive = "awrs_recursive", partial(awrs.sample, estimator="recursive")
    for label, (q, allowed) in (("E w 1{t}, Z = .4", PAPER), ("E w 1{t}, Z = .2", PEAKED)):
        yield _proper(name, label, moments(recursive, _logq(q, stack), allowed, keeps=False), q, allowed, stack)
    q, allowed = PAPER
    logq = _logq(q, stack)
    for budget in (1, 2, 3):
        limited = moments(partial(recursive, max_draws=budget), logq, allowed, keeps=False)
        yield _proper(name, f"E w 1{{t}}, Z, budget of {budget}", limited, q, allowed, stack)
    for patience in (1, 2):
        masked = moments(partial(with_mask, patience=patience), logq, allowed, keeps=False)
        yield _proper(name, f"E w 1{{t}}, Z, mask after {patience}", masked, q, allowed, stack)
        yield _conditional(name, masked, q, allowed, stack)
    found = moments(recursive, logq, allowed, keeps=False)
    yield _conditional(name, found, q, allowed, stack)
    yield Row.number(name, "variance of w", 0.05, found.variance, _tolerance(stack))
    yield Row.number(name, "questions a token", 17 / 6, found.evaluations, _tolerance(stack))
    published = moments(two_loops, logq, allowed)
    yield _proper(name, "published form, E w 1{t}, Z", published, q, allowed, stack)
    yield Row.number(
        name, "published form, variance of w", 0.0822962963, published.variance, max(1e-9, _tolerance(stack))
    )


def check_geometric(stack: Stack) -> Iterator[Row]:
    """Runs with replacement, reconstructed; a budget makes them finite, and their mean stays exact."""
    name, geometric = "awrs_geometric", partial(awrs.sample, estimator="geometric")
    for label, (q, allowed) in (("Z = .4", PAPER), ("Z = .2", PEAKED)):
        for budget in (1, 4, 6):
            limited = partial(geometric, max_draws=budget)
            found = moments(limited, _logq(q, stack), allowed, failures=budget)
            yield _proper(name, f"E w 1{{t}}, {label}, budget of {budget}", found, q, allowed, stack)


def check_masking(stack: Stack) -> Iterator[Row]:
    """Exact on one token; along a sequence its law is another, unless the weights are kept."""
    name, (q, allowed) = "masking", PAPER
    found = moments(masking.sample, _logq(q, stack), allowed)
    yield _proper(name, "E w 1{t}, Z", found, q, allowed, stack)
    yield _conditional(name, found, q, allowed, stack)
    exact = TWO_STEPS.masses()
    yield _sequences(name, "aa, ba, bb with weights, Z", exact, sequence_means(TWO_STEPS, masking.sample, 1), stack)
    without = sequence_means(TWO_STEPS, masking.sample, 1, weighed=False)
    yield Row.number(name, "without weights, p(aa)", 0.9, without[A, A], _tolerance(stack))
    total = sum(exact.values())
    far = sum(abs(without[text] - mass / total) for text, mass in exact.items()) / 2
    yield Row(name, "the same against the posterior", exact[A, A] / total, without[A, A], far, None)


def check_rejection(stack: Stack) -> Iterator[Row]:
    """The token's law is the conditional one; there is no weight."""
    q, allowed = PAPER
    found = moments(rejection.sample, _logq(q, stack), allowed)
    yield _conditional("rejection", found, q, allowed, stack)
    yield Row.number("rejection", "questions a token", 11 / 6, found.evaluations, _tolerance(stack))


def check_smc(stack: Stack) -> Iterator[Row]:
    """Everything that two or three particles can do, resampling included."""
    recursive = partial(awrs.sample, estimator="recursive")
    for label, sampler, keeps in (("awrs", recursive, False), ("masking", masking.sample, True)):
        for resampling, particles in (("systematic", 3), ("multinomial", 2)):
            found = sequence_means(THREE_STEPS, sampler, particles, keeps=keeps, threshold=1.0, resampling=resampling)
            quantity = f"{label}, {resampling}, N = {particles}"
            yield _sequences("smc", quantity, THREE_STEPS.masses(), found, stack)


def _sequences(
    method: str, quantity: str, exact: dict[tuple[int, ...], float], ours: dict[tuple[int, ...], float], stack: Stack
) -> Row:
    far = max(abs(ours[text] - mass) for text, mass in exact.items())
    return Row(method, quantity, sum(exact.values()), sum(ours.values()), far, _tolerance(stack))


_PROPER = "E[w 1{token = t}] = q(t) 1{t allowed}, over every run of the sampler"
DECODERS: dict[str, Target] = {
    "awrs_recursive": Target("closed form", _PROPER, check_recursive),
    "awrs_geometric": Target("closed form", _PROPER, check_geometric),
    "masking": Target("closed form", "q(t) / Z for one token; for sequences only with its weights", check_masking),
    "rejection": Target("closed form", "q(t) / Z for one token", check_rejection),
    "smc": Target("closed form", "E[sum_i w_i 1{x_i = x} / N] = p(x) 1{x allowed}, over every run", check_smc),
    **GUIDED,
}
"""The samplers of ``align.decoding``, as ``align verify`` names them."""
