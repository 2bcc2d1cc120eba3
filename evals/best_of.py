"""Best of n, from N >= n draws of the reference: its reward and its KL to the reference, of one prompt.

The policy draws n answers of p and takes the one with the largest reward, of equal ones any alike. With F the law of
rewards under p, an answer of reward r then has the probability ``p(y) (F(r)^n - F(r-)^n) / (F(r) - F(r-))``: its
probability changes by its reward alone, so the KL to p is that of the rewards' law.

- **bound**: ``log n - (n - 1)/n``. It is the KL where no two answers have the same reward and none has a probability
  to speak of, and too large otherwise (arXiv:2401.01879, theorem 1).
- **estimator** (same paper): with e the probability of what was taken,

      D(e) = (1-e)^n (log n + (n-1) log(1-e) - (n-1)/n) + (1 - (1-e)^n) log((1 - (1-e)^n) / e)

  in the mean over draws of best of n. It is exact where one best outcome has the mass e and all others are spread. The
  outcomes here are rewards: e is the share of the other draws with the same reward. Where few rewards differ it is too
  large: of a reward that is 1 with probability 0.1, else 0, at n = 4 it is 0.287 nats and the KL 0.217.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .statistics import finite_vector


def best_of_reward(rewards: ArrayLike, n: int) -> float:
    """Mean of the largest of n draws over all subsets of n of the N: unbiased for the best of n.

    ``sum_i C(i - 1, n - 1) / C(N, n) r_(i)``, rewards in ascending order.

    Args:
        rewards: of N independent draws, (N,).
        n: from 1 to N.

    Raises:
        ValueError: n is out of its range, or a reward is not finite.
    """
    return float(np.sort(finite_vector(rewards, "rewards")) @ weights(np.size(rewards), n))


def best_of_judged(rewards: ArrayLike, judged: ArrayLike, n: int) -> float:
    """Mean of what another judge says of the best of n by the rewards, over all subsets of n of the N: unbiased.

    Of answers with the same reward any may be taken, so that each counts as the mean of them.

    Args:
        rewards: of N independent draws, (N,).
        judged: of the same, (N,).
        n: from 1 to N.

    Raises:
        ValueError: as ``best_of_reward``, or counts that differ.
    """
    given, others = finite_vector(rewards, "rewards"), finite_vector(judged, "judged")
    if len(given) != len(others):
        raise ValueError(f"{len(given)} rewards and {len(others)} of the judge: one each")
    _, tied, counts = np.unique(given, return_inverse=True, return_counts=True)
    means = np.bincount(tied, others) / counts
    return float(means[np.sort(tied)] @ weights(len(given), n))


def best_of_kl_bound(n: int) -> float:
    """``log n - (n - 1)/n``, nats: the KL of best of n to the reference is no more."""
    if n < 1:
        raise ValueError(f"n is {n}: it must be 1 or more")
    return math.log(n) - (n - 1) / n


def best_of_kl(rewards: ArrayLike, n: int) -> float:
    """The estimator over all subsets of n of the N draws, nats.

    Args:
        rewards: of N independent draws, (N,), N >= 2 or n 1.
        n: from 1 to N.

    Raises:
        ValueError: n is out of its range, or a reward is not finite.
    """
    ordered = np.sort(finite_vector(rewards, "rewards"))
    own = weights(len(ordered), n)
    if n == 1:
        return 0.0
    same = np.searchsorted(ordered, ordered, "right") - np.searchsorted(ordered, ordered, "left")
    return float(kl_at((same - 1) / (len(ordered) - 1), n) @ own)


def kl_at(mass: ArrayLike, n: int) -> NDArray[np.float64]:
    """``D(e)`` of the docstring, element by element; at 0 the bound, and 0 at 1.

    Args:
        mass: e, in [0, 1].
        n: at least 1.

    Raises:
        ValueError: a mass outside [0, 1].
    """
    e = np.asarray(mass, dtype=np.float64)
    if not ((e >= 0) & (e <= 1)).all():
        raise ValueError("mass: a probability is in [0, 1]")
    bound = best_of_kl_bound(n)
    inside = np.clip(e, 1e-300, 1 - 1e-16)
    rest = n * np.log1p(-inside)  # log of (1-e)^n
    top = -np.expm1(rest)
    value = np.exp(rest) * (bound + (n - 1) * np.log1p(-inside)) + top * np.log(top / inside)
    return np.where(e == 0, bound, np.where(e == 1, 0.0, value))


@lru_cache(maxsize=64)
def weights(count: int, n: int) -> NDArray[np.float64]:
    """Share of the subsets of n of ``count`` whose largest is the i-th smallest, (count,).

    Raises:
        ValueError: n is not from 1 to ``count``.
    """
    if not 1 <= n <= count:
        raise ValueError(f"n is {n}: best of n is estimated from n draws or more, and there are {count}")
    total = math.comb(count, n)
    return np.array([math.comb(i, n - 1) / total for i in range(count)])
