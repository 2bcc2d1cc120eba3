"""What the lab reports, and the stack that it runs on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .worlds import total_variation


@dataclass(frozen=True)
class Row:
    """One comparison with the truth.

    Args:
        method: the loss or the sampler, as in its table.
        quantity: what is compared, in at most 31 characters: ``align verify`` fits no more on 80 columns.
        exact: its value, by formula, root or solver, in float64; for a distribution the mean reward under it. With a
            relation ``>=`` or ``<=`` the bound.
        ours: the value that the loss's own training reaches, of several starts the one that is furthest off; or what a
            sampler gives on average over everything that it can do.
        distance: how far off: in total variation for distributions, the absolute difference for numbers, and for a
            bound by how much it is missed.
        tolerance: distance that passes; None for a value that is told, not judged.
        relation: how ``ours`` should stand to ``exact``.
    """

    method: str
    quantity: str
    exact: float
    ours: float
    distance: float
    tolerance: float | None
    relation: Literal["=", ">", ">=", "<="] = "="

    @property
    def status(self) -> Literal["pass", "miss", "told"]:
        """``miss`` where the distance is over the tolerance, or is not a number."""
        if self.tolerance is None:
            return "told"
        return "pass" if self.distance <= self.tolerance else "miss"

    @classmethod
    def number(cls, method: str, quantity: str, exact: float, ours: float, tolerance: float | None) -> Row:
        """Two numbers that should be equal; without a tolerance, two that are told."""
        return cls(method, quantity, exact, ours, abs(ours - exact), tolerance)

    @classmethod
    def at_least(cls, method: str, quantity: str, bound: float, ours: float) -> Row:
        """A number that should reach a bound."""
        return cls(method, quantity, bound, ours, _missed(bound - ours), 0.0, ">=")

    @classmethod
    def over(cls, method: str, quantity: str, bound: float, ours: float) -> Row:
        """A number that should be over a bound, and not on it."""
        return cls(method, quantity, bound, ours, _missed(math.nextafter(bound, math.inf) - ours), 0.0, ">")

    @classmethod
    def at_most(cls, method: str, quantity: str, bound: float, ours: float) -> Row:
        """A number that should stay under a bound."""
        return cls(method, quantity, bound, ours, _missed(ours - bound), 0.0, "<=")

    @classmethod
    def policy(
        cls,
        method: str,
        quantity: str,
        exact: Tensor,
        ours: list[Tensor],
        values: Tensor,
        tolerance: float | None,
    ) -> Row:
        """Distributions over the answers that should be equal.

        Args:
            exact: (P, N).
            ours: one (P, N) for each start.
            values: what is averaged under them for the reader, usually the reward, (P, N) or (N,).
        """
        far = max(ours, key=lambda policy: _or_infinite(total_variation(policy, exact)))
        mean = [float((policy.double().cpu() * values).sum(-1).mean()) for policy in (exact, far)]
        return cls(method, quantity, mean[0], mean[1], total_variation(far, exact), tolerance)


def _or_infinite(distance: float) -> float:
    return math.inf if math.isnan(distance) else distance


def _missed(by: float) -> float:
    return by if math.isnan(by) else max(0.0, by)


@dataclass(frozen=True)
class Stack:
    """Where the losses run; the exact side is always float64 on the CPU.

    Args:
        device: a torch device.
        dtype: of policies, references and scores; float64 or float32.
        seed: of worlds and starts.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def here(self, values: Tensor) -> Tensor:
        """The values on this device, in this dtype if they are floats."""
        return values.to(self.device, self.dtype if values.is_floating_point() else None)

    def tolerance(self, double: float, single: float = 2e-3) -> float:
        """The tolerance of this dtype.

        A minimum can be found to about the square root of the dtype's rounding, 3e-4 in float32 and 1e-8 in float64.
        """
        return double if self.dtype == torch.float64 else max(double, single)


@dataclass(frozen=True)
class Target:
    """What a loss or a sampler asks for in a finite world, and the check of it.

    Args:
        kind: how the target is known; ``none`` where training has no end point, and the check shows that.
        statement: the target in the notation of the losses (``r`` the world's rewards), or the reason for ``none``.
        check: the comparisons on a stack.
    """

    kind: Literal["closed form", "scalar root", "solver", "none"]
    statement: str
    check: Callable[[Stack], Iterator[Row]]
