"""Win rate at equal length: what an annotator would say if both answers were as long (arXiv:2404.04475).

The preference of prompt x for the model over the baseline is modelled as

    P(model preferred | x) = sigmoid(theta + phi tanh(d_x / sd(d)))

with d_x the length of the model's answer less that of the baseline's. The length-controlled win rate is its value at
``d = 0``, ``sigmoid(theta)``. The published model has a further term for how hard an instruction is, which is fitted
to the answers of many models; with one comparison there is nothing to tell it from, and it is left out. Preferences
may be soft: the likelihood is ``p log s + (1 - p) log(1 - s)``. So that preferences that length explains without
exception have a solution too, phi has a normal prior of standard deviation ``SPREAD``, which is wide: 10 units of
log-odds between a much longer and an equally long answer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .statistics import LEVEL, RESAMPLES, Estimate, at_the_end, finite_vector

SPREAD = 10.0
_STEPS = 60
_BLOCK = 2**20
_SURE = 1e-12


def length_controlled(
    preferences: ArrayLike,
    lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate | None:
    """The length-controlled win rate with its percentile bootstrap over prompts; ``sd(d)`` stays that of the data.

    It is the plain win rate where all answers are as long as the baseline's. Where all preferences of a resample are 1
    (0), it is 1 (0), as the limit is; where all of the data are, the interval is ``share_interval``'s.

    Args:
        preferences: probability that the model's answer is preferred, (N,).
        lengths, baseline_lengths: of the two answers, (N,), in one unit.
        level: nominal coverage.
        resamples, seed: of the bootstrap.

    Returns:
        The estimate, without an interval where N is 1. None where all differences are the same and not 0: length and
        model cannot be told apart then.

    Raises:
        ValueError: shapes that differ, no rows, a number that is not finite, or a preference outside [0, 1].
    """
    p = finite_vector(preferences, "preferences")
    own, theirs = finite_vector(lengths, "lengths"), finite_vector(baseline_lengths, "baseline_lengths")
    if not len(p) == len(own) == len(theirs):
        raise ValueError(
            f"{len(p)} preferences, {len(own)} lengths and {len(theirs)} of the baseline: one each a prompt"
        )
    if ((p < 0) | (p > 1)).any():
        row = int(np.argmax((p < 0) | (p > 1)))
        raise ValueError(f"preferences[{row}] is {p[row]}: a probability was expected")
    difference = own - theirs
    spread = float(difference.std())
    if spread == 0 and difference[0] != 0:
        return None
    x = np.tanh(difference / spread) if spread else np.zeros_like(difference)
    order = np.lexsort((x, p))  # the resamples do not depend on the order of the rows
    p, x = p[order], x[order]
    n = len(p)
    (value,) = _at_zero(p, x, np.ones((1, n)))
    if n == 1:
        return Estimate(float(value), None, None, 1)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // n)
    found = []
    for start in range(0, resamples, block):
        drawn = rng.integers(n, size=(min(block, resamples - start), n))
        counts = np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float64)
        found.append(_at_zero(p, x, counts))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return at_the_end(Estimate(float(value), float(low), float(high), n), level)


def _at_zero(p: NDArray[np.float64], x: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """``sigmoid(theta)`` of the fit to each of R weighted data sets, (R,).

    Newton's method on the negative log-likelihood, which is strictly convex. A step that would raise it is halved.

    Args:
        p, x: preferences and features, (N,).
        counts: how often each row is there, (R, N).
    """
    totals, wins = counts.sum(axis=1), counts @ p
    sure = (wins <= _SURE * totals) | (wins >= (1 - _SURE) * totals)
    result: NDArray[np.float64] = wins / totals
    open_ = np.flatnonzero(~sure)
    if not x.any() or not len(open_):
        return result
    weights, total = counts[open_], totals[open_]
    share = result[open_]
    theta, phi = np.log(share / (1 - share)), np.zeros(len(open_))
    loss = _loss(theta, phi, p, x, weights)
    for _ in range(_STEPS):
        s = _sigmoid(theta[:, None] + phi[:, None] * x)
        residual, curve = weights * (s - p), weights * s * (1 - s)
        g0, g1 = residual.sum(axis=1), residual @ x + phi / SPREAD**2
        h00, h01, h11 = curve.sum(axis=1), curve @ x, curve @ (x * x) + 1 / SPREAD**2
        if bool((np.maximum(np.abs(g0), np.abs(g1)) <= 1e-9 * total).all()):
            break
        determinant = h00 * h11 - h01 * h01
        d0, d1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        scale = np.ones_like(theta)
        for _ in range(40):
            after = _loss(theta - scale * d0, phi - scale * d1, p, x, weights)
            worse = after > loss + 1e-12 * np.abs(loss)
            if not worse.any():
                break
            scale = np.where(worse, scale / 2, scale)
        theta, phi, loss = theta - scale * d0, phi - scale * d1, after
    result[open_] = _sigmoid(theta)
    return result


def _loss(
    theta: NDArray[np.float64],
    phi: NDArray[np.float64],
    p: NDArray[np.float64],
    x: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    z = theta[:, None] + phi[:, None] * x
    found: NDArray[np.float64] = (weights * (np.logaddexp(0, z) - p * z)).sum(axis=1) + phi**2 / (2 * SPREAD**2)
    return found


def _sigmoid(z: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.exp(-np.logaddexp(0, -z))
    return found
