"""A memo: no verdict is computed twice for the same prefix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .protocol import Constraint, ConstraintError, Masking, Prefiltering

MASKS = 8
"""How many masks are kept, the newest: particles that have said the same ask for one right after another."""


@dataclass(slots=True, eq=False)
class _Node:
    """A prefix: the constraint's state there, and what is known of its next tokens and of its end."""

    state: Any
    next: dict[int, _Node | None] = field(default_factory=dict)
    may_end: bool | None = None


class Memo:
    """Another constraint, with verdicts kept for each prefix of tokens, accepted and refused ones alike.

    Particles and requests that share a prefix share its verdicts, also across calls. A state may be large (that of a
    compiled constraint 5 to 65 kB): past ``capacity`` states, or ten times as many verdicts, new answers start from an
    empty memo; particles under way keep theirs until they end.

    Attributes:
        evaluations: verdicts that the constraint was really asked for.
    """

    def __init__(self, constraint: Constraint, *, capacity: int = 4_000) -> None:
        self.constraint = constraint
        self.evaluations = 0
        self._capacity = capacity
        self._root: _Node | None = None
        self._states = self._verdicts = 0
        self._allowed = constraint.allowed if isinstance(constraint, Masking) else None
        self._prefilter = constraint.prefilter if isinstance(constraint, Prefiltering) else None
        self._masks: dict[tuple[str, _Node], np.ndarray | None] = {}

    @property
    def states(self) -> int:
        """How many states are kept for answers to come."""
        return self._states

    def start(self) -> _Node:
        if self._root is None or max(self._states, self._verdicts / 10) >= self._capacity:
            self._root, self._states, self._verdicts = _Node(self.constraint.start()), 0, 0
        return self._root

    def advance(self, state: _Node, token: int) -> _Node | None:
        if token not in state.next:
            self.evaluations += 1
            after = self.constraint.advance(state.state, token)
            self._verdicts += 1
            self._states += after is not None
            state.next[token] = None if after is None else _Node(after)
        return state.next[token]

    def may_end(self, state: _Node) -> bool:
        if state.may_end is None:
            self.evaluations += 1
            verdict = self.constraint.may_end(state.state)
            if not isinstance(verdict, bool):
                name = type(self.constraint).__name__
                raise ConstraintError(f"{name}: may_end gave {verdict!r}, which is no bool")
            state.may_end = verdict
        return state.may_end

    def allowed(self, state: _Node) -> np.ndarray | None:
        """The constraint's mask, if it has one: a copy of your own. Not counted."""
        return self._kept("allowed", state, self._allowed)

    def prefilter(self, state: _Node) -> np.ndarray | None:
        """The constraint's prefilter, if it has one: a copy of your own. Not counted."""
        return self._kept("prefilter", state, self._prefilter)

    def _kept(self, name: str, state: _Node, compute: Callable[[Any], np.ndarray | None] | None) -> np.ndarray | None:
        if compute is None:
            return None
        if (name, state) not in self._masks:
            mask = compute(state.state)
            if mask is not None and mask.dtype != bool:
                raise ConstraintError(
                    f"{type(self.constraint).__name__}: {name} gave {mask.dtype}; it must give bools"
                )
            if len(self._masks) == MASKS:
                del self._masks[next(iter(self._masks))]
            self._masks[name, state] = mask
        kept = self._masks[name, state]
        return None if kept is None else kept.copy()
