"""Tokens drawn one by one, without replacement, from uniforms that depend on (seed, position) alone."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

BLOCK = 256
"""Tokens whose mass is summed together: about the square root of a large vocabulary."""
MOST_FAILURES = 1e300
"""Where a count of failures stops, so that it is a number whose logarithm can be had."""

Accepts = Callable[[int], bool]
"""Whether a token may come next. End tokens are ids like the others."""


@dataclass(frozen=True)
class Draw:
    """A token and its weight; proper where the sampler says so: ``E[w 1{token = t}] = q(t) 1{t allowed}``.

    Args:
        token: an allowed one; None in a dead end.
        log_weight: ``log w``, nats; -inf in a dead end.
        evaluations: how many tokens the constraint was asked about, one by one.
        masks: how often it was asked for its verdicts on all tokens at once.
    """

    token: int | None
    log_weight: float
    evaluations: int
    masks: int = 0

    @property
    def dead(self) -> bool:
        """Whether there was no allowed token to be found, or none within the budget."""
        return self.token is None


class Source(Protocol):
    """Where a sampler's randomness comes from."""

    def uniform(self) -> float:
        """A number over 0 and under 1."""
        ...

    def failures(self, success: float) -> int:
        """How many trials fail before the first success, if one succeeds with this probability."""
        ...


class Draws:
    """Uniforms as a function of seed, stream, position and their number in this row; of nothing else.

    A position that is drawn twice gives the same token twice, and no other row of a batch has a say. The bits are
    BLAKE2b of the four.

    Args:
        seed: of the request; requests with the same seed see the same uniforms.
        position: number of the token in its sequence.
        stream: what tells sequences of one request apart, such as the number of a particle.
    """

    def __init__(self, seed: int, position: int, stream: int | str = 0) -> None:
        self._name = f"{seed}/{stream}/{position}"
        self._blocks = 0
        self._words: list[int] = []

    def uniform(self) -> float:
        """The next uniform: the middle of one of 2^52 equal cells, so neither 0 nor 1."""
        if not self._words:
            digest = hashlib.blake2b(f"{self._name}/{self._blocks}".encode()).digest()
            self._words = list(struct.unpack("<8Q", digest))
            self._blocks += 1
        return ((self._words.pop() >> 12) + 0.5) * 2.0**-52

    def failures(self, success: float) -> int:
        """Geometric, by inversion of one uniform, at most 1e300: no share of float64 is so small that this raises."""
        if success >= 1:
            return 0
        trials = math.log(self.uniform()) / math.log1p(-success) if success > 0 else math.inf
        return math.floor(min(trials, MOST_FAILURES))


class Live:
    """The tokens that were not removed yet, and their mass: an inverse CDF on two levels, blocks and tokens.

    Nothing is sorted. A removed token's block is summed anew, as are the blocks' sums, so what is left is never the
    difference of two larger numbers: a last token of probability 1e-30 is found and has its own weight. There is no
    tolerance under which a row counts as exhausted; it is when no token is left that float64 can tell from
    probability 0 (about 1e-308). A vocabulary that is refused as a whole costs one question a token, unless a budget
    ends it.

    Args:
        logq: log-probabilities, (V,); -inf for tokens that are never drawn. They need not sum to one: all weights are
            with respect to the measure as it is given.

    Raises:
        ValueError: not of shape (V,), or NaN or +inf among them.
    """

    def __init__(self, logq: NDArray[np.float64]) -> None:
        if logq.ndim != 1 or not logq.size:
            raise ValueError(f"logq has shape {logq.shape} and must have (V,): one row, a number for each token")
        self._set(np.exp(logq, dtype=np.float64))
        if not math.isfinite(self.mass):
            bad = int(np.flatnonzero(~(logq < math.inf))[0])
            raise ValueError(f"logq[{bad}] is {logq[bad]}: a log-probability is a finite number or -inf")

    @classmethod
    def of(cls, p: NDArray[np.float32]) -> Live:
        """From probabilities, (V,), which are the row's own from now on; sums are in float64 nevertheless.

        Raises:
            ValueError: NaN among them.
        """
        live = cls.__new__(cls)
        live._set(p)
        if not math.isfinite(live.mass):
            raise ValueError("the logits hold NaN, +inf or -inf alone: there is no law to draw from")
        return live

    def only(self, allowed: NDArray[np.bool_]) -> Live:
        """The tokens of these that are left, with the probabilities that they have.

        Raises:
            ValueError: ``allowed`` is not of shape (V,).
        """
        if allowed.shape != self._p.shape:
            raise ValueError(
                f"allowed has shape {allowed.shape} and must have {self._p.shape}: a verdict for each token"
            )
        live = Live.__new__(Live)
        live._set(np.where(allowed, self._p, self._p.dtype.type(0)))
        return live

    def _set(self, p: NDArray[np.floating]) -> None:
        self._p = p
        self._sums = np.add.reduceat(p, np.arange(0, p.size, BLOCK), dtype=np.float64)
        self._upto = np.cumsum(self._sums)

    @property
    def size(self) -> int:
        """V, the tokens that there were."""
        return len(self._p)

    @property
    def left(self) -> NDArray[np.int64]:
        """Ids of the tokens that are left, ascending."""
        return np.flatnonzero(self._p)

    @property
    def mass(self) -> float:
        """Sum of the probabilities of the tokens that are left; 0 if none is."""
        return float(self._upto[-1])

    @property
    def largest(self) -> float:
        """Probability of the likeliest token that is left."""
        return float(self._p.max())

    def draw(self, uniform: float) -> int:
        """A token that is left, with probability in proportion to its own; it stays. Some token must be left."""
        block = _first_over(self._upto, uniform * self._upto[-1])
        before = self._upto[block - 1] if block else 0.0
        begin = block * BLOCK
        upto = np.cumsum(self._p[begin : begin + BLOCK], dtype=np.float64)
        return begin + _first_over(upto, uniform * self._upto[-1] - before)

    def remove(self, token: int) -> float:
        """Take a token away; gives the probability that it had."""
        p = float(self._p[token])
        block = token // BLOCK
        self._p[token] = 0.0
        self._sums[block] = self._p[block * BLOCK : (block + 1) * BLOCK].sum(dtype=np.float64)
        np.cumsum(self._sums, out=self._upto)
        return p


Row = NDArray[np.float64] | Live
"""A base law: log-probabilities, (V,), float64, -inf for tokens that it never draws; or ``Live`` made of it."""


def live_of(row: Row) -> Live:
    """The row as ``Live``, which drawing from it uses up."""
    return row if isinstance(row, Live) else Live(row)


def _first_over(upto: NDArray[np.float64], target: float) -> int:
    """Index of the first running sum over the target, which rounding may have put on the last of them."""
    index = int(upto.searchsorted(target, side="right"))
    return index if index < len(upto) else int(upto.searchsorted(upto[-1]))


def ask(accepts: Accepts, token: int) -> bool:
    """The constraint's verdict on a token; what it raises goes through, with the token noted.

    Raises:
        ValueError: the verdict is not a Boolean.
    """
    try:
        verdict = accepts(token)
    except Exception as error:
        error.add_note(f"the constraint was asked about token {token}")
        raise
    if not isinstance(verdict, bool | np.bool_):
        raise ValueError(f"the constraint's verdict on token {token} is {verdict!r}: it must be True or False")
    return bool(verdict)
