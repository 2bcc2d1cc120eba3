"""Everything that a random procedure can do, one run after the other, with its probability.

The procedure takes its randomness from a ``Chances``; it is run again for every branch that it can take. So the code
that is checked is the code that samples, and expectations are sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from align.decoding.lazy import Accepts

T = TypeVar("T")


class Chances:
    """The choices of one run: those of a script first, then always the first that is possible.

    Attributes:
        probability: of all choices so far.
        taken: for each choice the number of the possible branch taken, and how many there are.
    """

    def __init__(self, script: Sequence[int] = ()) -> None:
        self._script = script
        self.probability = 1.0
        self.taken: list[tuple[int, int]] = []

    def choose(self, probabilities: Sequence[float]) -> int:
        """The index of a branch of positive probability."""
        possible = [index for index, probability in enumerate(probabilities) if probability > 0]
        branch = self._script[len(self.taken)] if len(self.taken) < len(self._script) else 0
        self.taken.append((branch, len(possible)))
        self.probability *= float(probabilities[possible[branch]])
        return possible[branch]


def every_run(run: Callable[[Chances], T]) -> Iterator[tuple[float, T]]:
    """Every outcome of ``run`` with its probability, depth first."""
    script: list[int] | None = []
    while script is not None:
        chances = Chances(script)
        outcome = run(chances)
        yield chances.probability, outcome
        taken = chances.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        script = [*(branch for branch, _ in taken[:-1]), taken[-1][0] + 1] if taken else None


class TokenChances:
    """A source of uniforms that takes every token in turn: the middle of its cell of the inverse CDF.

    It knows which tokens are left by listening to the constraint, for which ``accepts`` is to be handed in.

    Args:
        q: probabilities, (V,).
        accepts: the constraint's verdicts.
        chances: the run's.
        keeps: whether the sampler leaves a token in once it was allowed.
        failures: number of failures of a geometric variable from which all are taken for one.
    """

    def __init__(
        self, q: NDArray[np.float64], accepts: Accepts, chances: Chances, *, keeps: bool = True, failures: int = 0
    ) -> None:
        self._q, self._accepts, self._chances, self._keeps, self._most = q.copy(), accepts, chances, keeps, failures

    def accepts(self, token: int) -> bool:
        """The verdict, noted."""
        verdict = self._accepts(token)
        if not (verdict and self._keeps):
            self._q[token] = 0.0
        return verdict

    def mask(self) -> NDArray[np.bool_]:
        """The verdicts on all tokens, noted."""
        verdicts = np.array([self._accepts(token) for token in range(len(self._q))])
        self._q = np.where(verdicts, self._q, 0.0)
        return verdicts

    def uniform(self) -> float:
        """The middle of the cell of a token that is left."""
        left = self._q / self._q.sum()
        token = self._chances.choose(left)
        return float(left[:token].sum() + left[token] / 2)

    def failures(self, success: float) -> int:
        """A number of failures; the last stands for all from there on."""
        few = [success * (1 - success) ** count for count in range(self._most)]
        return self._chances.choose([*few, 1 - math.fsum(few)])
