"""Resampling until a verifier passes, when the verifier lets wrong answers through (arXiv 2411.17501).

Of one problem: ``p`` is the probability that a sample is correct, ``t`` that the verifier passes a correct one, ``f``
that it passes a wrong one; a sample passes with ``a = p t + (1 - p) f``. Samples are drawn until one passes, at most
``k``; that one is the answer, and where none passes there is none. Which sample passes first does not hang on how
many were drawn before, so an answer is correct with probability ``p t / a`` for any ``k``: the ceiling that no number
of samples lifts. A best ``k`` that is neither 0 nor as large as can be is due to problems that differ: easy ones are
answered by the first samples, later ones add mistakes on the hard ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .statistics import LEVEL, RESAMPLES, Estimate, finite_vector, share_interval

Vector = NDArray[np.float64]
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_BLOCK = 2**22  # drawn weights held at once


@dataclass(frozen=True)
class Outcomes:
    """What comes of at most ``k`` samples, of N problems at M values of k.

    Attributes:
        k: values of k, (M,).
        samples: drawn until one passes or there are k, expected, (N, M).
        correct, wrong: probability of a correct and of a wrong answer, (N, M).
    """

    k: NDArray[np.int64]
    samples: Vector
    correct: Vector
    wrong: Vector

    @property
    def answered(self) -> Vector:
        """Probability of an answer, (N, M)."""
        return self.correct + self.wrong

    def utility(self, cost: float, price: float = 0.0) -> Vector:
        """``correct - cost * wrong - price * samples``; no answer counts 0, (N, M).

        Raises:
            ValueError: a cost or a price below 0.
        """
        if not (0 <= cost < np.inf and 0 <= price < np.inf):
            raise ValueError(f"cost is {cost} and price {price}: both are finite and at least 0")
        return self.correct - cost * self.wrong - price * self.samples


@dataclass(frozen=True)
class Optimum:
    """The best number of samples among those that were looked at.

    Args:
        k: the smallest of the best.
        utility: there, mean over problems.
        at_edge: it is the largest that was looked at, so that more may be better still.
    """

    k: int
    utility: float
    at_edge: bool


def expected_outcomes(p: ArrayLike, t: ArrayLike, f: ArrayLike, k: ArrayLike) -> Outcomes:
    """The outcomes of problems whose probabilities are known.

    ``E[min(T, k)] = (1 - (1 - a)^k) / a`` samples, which is k where nothing passes (a = 0); ``correct = p t`` and
    ``wrong = (1 - p) f`` times that.

    Args:
        p, t, f: of each problem, in [0, 1], (N,); one number stands for all.
        k: numbers of samples, at least 0, (M,) or one.

    Raises:
        ValueError: a probability outside [0, 1], a k below 0 or not whole, or shapes that differ.
    """
    right, wrong = _passing(p, t, f)
    counts = _counts(k)
    a = (right + wrong)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):  # a = 1 and a = 0, which follow
        answered = -np.expm1(counts * np.log1p(-a))
        drawn = np.where(a > 0, answered / a, counts)
    drawn = np.where(counts > 0, drawn, 0.0)
    return Outcomes(counts, drawn, drawn * right[:, None], drawn * wrong[:, None])


def sampled_outcomes(n: ArrayLike, correct: ArrayLike, wrong: ArrayLike, k: ArrayLike) -> Outcomes:
    """The outcomes of problems of which n samples were drawn and verified: unbiased for any k up to n.

    The mean over all orders of the n samples: the first k hold none of the m that pass with probability
    ``C(n - m, k) / C(n, k)``, and the first that passes is any of the m. Putting shares into the formula of
    ``expected_outcomes`` would be biased: with few samples it takes hard problems for impossible ones.

    Args:
        n: samples of each problem, (N,).
        correct, wrong: those that the verifier passed, by what they are, (N,).
        k: numbers of samples, from 0 to the smallest n, (M,) or one.

    Raises:
        ValueError: counts that are not whole, below 0, or more passes or a larger k than samples.
    """
    total, right, mistaken = (_counts(v, name) for v, name in ((n, "n"), (correct, "correct"), (wrong, "wrong")))
    if not len(total) == len(right) == len(mistaken):
        raise ValueError(f"{len(total)} n, {len(right)} correct and {len(mistaken)} wrong: one each per problem")
    passed = right + mistaken
    if (passed > total).any():
        row = int(np.argmax(passed > total))
        raise ValueError(f"problem {row}: {passed[row]} of {total[row]} samples passed")
    counts = _counts(k)
    none = _none_of(total, passed, counts)
    cumulative = np.cumsum(none, axis=1)[:, :-1]
    drawn = np.concatenate([np.zeros((len(total), 1)), cumulative], axis=1)[:, counts]
    share = np.divide(right, passed, out=np.zeros(len(total)), where=passed > 0)
    answered = (1 - none)[:, counts]
    return Outcomes(counts, drawn, answered * share[:, None], answered * (1 - share)[:, None])


def pass_at_k(n: ArrayLike, correct: ArrayLike, k: ArrayLike) -> Vector:
    """``1 - C(n - c, k) / C(n, k)``: that one of k samples is correct, unbiased (arXiv 2107.03374), (N, M). It is what
    comes of a verifier that knows the truth.

    Args:
        n, correct: samples of each problem, and those that are correct, (N,).
        k: as in ``sampled_outcomes``.

    Raises:
        ValueError: as there.
    """
    return sampled_outcomes(n, correct, np.zeros(len(_counts(n)), np.int64), k).correct


def resampling_curve(
    p: ArrayLike, t: ArrayLike, f: ArrayLike, k: ArrayLike, cost: float = 0.0, price: float = 0.0
) -> dict[str, Vector]:
    """``answered``, ``correct``, ``wrong``, ``samples`` and ``utility`` at each k, means over problems, (M,).

    Args and errors are those of ``expected_outcomes`` and ``Outcomes.utility``.
    """
    found = expected_outcomes(p, t, f, k)
    matrices = {name: getattr(found, name) for name in ("answered", "correct", "wrong", "samples")}
    return {name: m.mean(axis=0) for name, m in {**matrices, "utility": found.utility(cost, price)}.items()}


def find_optimal_k(outcomes: Outcomes, cost: float, price: float = 0.0) -> Optimum:
    """The k of the highest mean utility, by looking at each."""
    utility = outcomes.utility(cost, price).mean(axis=0)
    place = int(_best(utility[None])[0])
    k = outcomes.k
    return Optimum(int(k[place]), float(utility[place]), bool(k[place] == k.max() > 0))


def ceilings(p: ArrayLike, t: ArrayLike, f: ArrayLike) -> Vector:
    """``p t / (p t + (1 - p) f)`` of each problem, (N,); NaN where nothing passes, so that there is no answer.

    A model's ceiling is the mean of these, and not the ratio of means: in the end every problem is answered.
    """
    right, wrong = _passing(p, t, f)
    found: Vector = np.divide(right, right + wrong, out=np.full(len(right), np.nan), where=right + wrong > 0)
    return found


def resampled(outcomes: Outcomes, *, resamples: int = RESAMPLES, seed: int = 0) -> Outcomes:
    """The bootstrap over problems: means of problems drawn anew, a row each time, (resamples, M)."""
    n = len(outcomes.correct)
    matrices = np.concatenate([outcomes.samples, outcomes.correct, outcomes.wrong], axis=1)
    rng, block = np.random.default_rng(seed), max(1, _BLOCK // n)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    weights = (rng.multinomial(n, np.full(n, 1 / n), size=size) for size in sizes)
    means = np.concatenate([drawn.astype(np.float64) @ matrices / n for drawn in weights])
    return Outcomes(outcomes.k, *np.split(means, 3, axis=1))


def curve_interval(problems: Vector, drawn: Vector) -> dict[str, list[float] | None]:
    """``{value, low, high}`` of the means over problems, at each k; no ends where there is one problem.

    Args:
        problems: one quantity of ``Outcomes``, (N, M).
        drawn: the same of what ``resampled`` made of them.
    """
    value = problems.mean(axis=0).tolist()
    if len(problems) == 1:
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(drawn, ENDS, axis=0)
    return {"value": value, "low": low.tolist(), "high": high.tolist()}


def optimal_k_interval(outcomes: Outcomes, drawn: Outcomes, cost: float, price: float = 0.0) -> Estimate:
    """The best k with its interval; none where there is one problem.

    Args:
        outcomes: of the problems.
        drawn: what ``resampled`` made of them.
        cost, price: as in ``Outcomes.utility``.
    """
    best, n = find_optimal_k(outcomes, cost, price).k, len(outcomes.correct)
    if n == 1:
        return Estimate(best, None, None, 1)
    low, high = np.quantile(outcomes.k[_best(drawn.utility(cost, price))], ENDS, method="inverted_cdf")
    return Estimate(best, float(low), float(high), n)


def verifier_metrics(n: ArrayLike, correct: ArrayLike, right: ArrayLike, wrong: ArrayLike) -> dict[str, Estimate]:
    """What a model and its verifier are like, from samples; intervals over problems.

    Args:
        n, correct: samples of each problem, and those that are correct, (N,).
        right, wrong: correct and wrong ones that passed, (N,).

    Returns:
        ``accuracy`` (p: of one sample, mean over problems), ``completeness`` (t, over all correct samples; on the
        problems that have some), ``false_positives`` (f, over all wrong samples), ``ceiling`` (mean over the problems
        where some sample passed), ``never_passed`` (share of the other problems). What is of no sample is left out.
    """
    total, good, passed_right, passed_wrong = (np.asarray(v, np.float64) for v in (n, correct, right, wrong))
    passed = passed_right + passed_wrong
    found = {"accuracy": share_interval(good / total)}
    for name, part, whole in (
        ("completeness", passed_right, good),
        ("false_positives", passed_wrong, total - good),
    ):
        if whole.any():
            found[name] = share_interval(part[whole > 0], per=whole[whole > 0])
    if passed.any():
        found["ceiling"] = share_interval((passed_right[passed > 0]) / passed[passed > 0])
    return {**found, "never_passed": share_interval(passed == 0)}


def _passing(p: ArrayLike, t: ArrayLike, f: ArrayLike) -> tuple[Vector, Vector]:
    """``p t`` and ``(1 - p) f`` of each problem, (N,)."""
    shares = [finite_vector(np.atleast_1d(values), name) for values, name in ((p, "p"), (t, "t"), (f, "f"))]
    for values, name in zip(shares, "ptf", strict=True):
        outside = (values < 0) | (values > 1)
        if outside.any():
            row = int(np.argmax(outside))
            raise ValueError(f"{name}[{row}] is {values[row]}: a probability is in [0, 1]")
    try:
        correct, complete, mistaken = np.broadcast_arrays(*shares)
    except ValueError:
        raise ValueError(f"{', '.join(str(len(v)) for v in shares)} problems in p, t and f: one each") from None
    return correct * complete, (1 - correct) * mistaken


def _counts(values: ArrayLike, name: str = "k") -> NDArray[np.int64]:
    vector = finite_vector(np.atleast_1d(values), name)
    wrong = (vector < 0) | (vector != np.floor(vector))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"{name}[{row}] is {vector[row]}: a whole number, at least 0, was expected")
    return vector.astype(np.int64)


def _none_of(n: NDArray[np.int64], m: NDArray[np.int64], k: Sequence[int] | NDArray[np.int64]) -> Vector:
    """``C(n - m, j) / C(n, j)`` for j from 0 to the largest k, (N, max k + 1)."""
    most = int(max(k))
    if most > n.min():
        raise ValueError(f"k is up to {most}, and problem {int(n.argmin())} has {n.min()} samples: k is at most that")
    steps = np.arange(most)
    left = np.maximum(n[:, None] - m[:, None] - steps, 0) / (n[:, None] - steps)
    return np.concatenate([np.ones((len(n), 1)), np.cumprod(left, axis=1)], axis=1)


def _best(utility: Vector) -> NDArray[np.int64]:
    """Place of the first of the best in each row; what differs by rounding alone is equal."""
    top = utility.max(axis=1, keepdims=True)
    places: NDArray[np.int64] = np.argmax(utility >= top - 1e-12 * (1 + np.abs(top)), axis=1)
    return places
