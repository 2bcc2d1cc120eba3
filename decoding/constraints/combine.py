"""AND and OR of constraints."""

from __future__ import annotations

from typing import Any

import numpy as np

from .protocol import Constraint, ConstraintError, Masking


class AllOf:
    """The answer satisfies every one of the constraints; they are asked in order, so put cheap ones first.

    Each may still see a continuation where they have none in common, so a text may turn out to have no end.
    """

    def __init__(self, *constraints: Constraint) -> None:
        self.constraints: tuple[Constraint, ...] = ()
        for one in _some(constraints, "AllOf"):  # flat, so that each part may be in the prefilter
            self.constraints += one.constraints if isinstance(one, AllOf) else (one,)

    def start(self) -> tuple[Any, ...]:
        return tuple(constraint.start() for constraint in self.constraints)

    def advance(self, state: tuple[Any, ...], token: int) -> tuple[Any, ...] | None:
        states = []
        for constraint, part in zip(self.constraints, state, strict=True):
            after = constraint.advance(part, token)
            if after is None:
                return None
            states.append(after)
        return tuple(states)

    def may_end(self, state: tuple[Any, ...]) -> bool:
        return all(constraint.may_end(part) for constraint, part in zip(self.constraints, state, strict=True))

    def allowed(self, state: tuple[Any, ...]) -> np.ndarray | None:
        return _masks(self.constraints, state, np.logical_and)

    def prefilter(self, state: tuple[Any, ...]) -> np.ndarray | None:
        """What those parts allow that have masks, where others have none."""
        masks = [
            c.allowed(part) if isinstance(c, Masking) else None
            for c, part in zip(self.constraints, state, strict=True)
        ]
        found = [mask for mask in masks if mask is not None]
        return np.logical_and.reduce(found) if 0 < len(found) < len(masks) else None


class AnyOf:
    """The answer satisfies at least one of the constraints; prefix-closed if all of them are."""

    def __init__(self, *constraints: Constraint) -> None:
        self.constraints = _some(constraints, "AnyOf")

    def start(self) -> tuple[Any, ...]:
        return tuple(constraint.start() for constraint in self.constraints)

    def advance(self, state: tuple[Any, ...], token: int) -> tuple[Any, ...] | None:
        states = tuple(
            None if part is None else constraint.advance(part, token)
            for constraint, part in zip(self.constraints, state, strict=True)
        )
        return None if all(part is None for part in states) else states

    def may_end(self, state: tuple[Any, ...]) -> bool:
        return any(
            part is not None and constraint.may_end(part)
            for constraint, part in zip(self.constraints, state, strict=True)
        )

    def allowed(self, state: tuple[Any, ...]) -> np.ndarray | None:
        return _masks(self.constraints, state, np.logical_or)


def _some(constraints: tuple[Constraint, ...], name: str) -> tuple[Constraint, ...]:
    if not constraints:
        raise ConstraintError(f"{name}: no constraints; give at least one")
    return constraints


def _masks(constraints: tuple[Constraint, ...], state: tuple[Any, ...], join: np.ufunc) -> np.ndarray | None:
    total = None
    for constraint, part in zip(constraints, state, strict=True):
        if part is None:
            continue
        mask = constraint.allowed(part) if isinstance(constraint, Masking) else None
        if mask is None:
            return None
        total = mask if total is None else join(total, mask)
    return total
