"""A memo: no verdict is computed twice for the same prefix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .protocol import Constraint, Masking


@dataclass(slots=True, eq=False)
class _Node:
    """A prefix: the constraint's state there, and what is known of its next tokens and of its end."""

    state: Any
    next: dict[int, _Node | None] = field(default_factory=dict)
    may_end: bool | None = None


class Memo:
    """Another constraint, with verdicts kept for each prefix of tokens, accepted and refused ones alike.

    Particles and requests that share a prefix share its verdicts, also across calls. Past ``capacity`` verdicts new
    answers start from an empty memo; particles under way keep theirs until they end.

    Attributes:
        evaluations: verdicts that the constraint was really asked for.
    """

    def __init__(self, constraint: Constraint, *, capacity: int = 200_000) -> None:
        self.constraint = constraint
        self.evaluations = 0
        self._capacity = capacity
        self._root: _Node | None = None
        self._kept = 0

    def start(self) -> _Node:
        if self._root is None or self._kept >= self._capacity:
            self._root, self._kept = _Node(self.constraint.start()), 0
        return self._root

    def advance(self, state: _Node, token: int) -> _Node | None:
        if token not in state.next:
            self.evaluations += 1
            self._kept += 1
            after = self.constraint.advance(state.state, token)
            state.next[token] = None if after is None else _Node(after)
        return state.next[token]

    def may_end(self, state: _Node) -> bool:
        if state.may_end is None:
            self.evaluations += 1
            state.may_end = self.constraint.may_end(state.state)
        return state.may_end

    def allowed(self, state: _Node) -> np.ndarray | None:
        """The constraint's mask, if it has one; not kept, and not counted."""
        return self.constraint.allowed(state.state) if isinstance(self.constraint, Masking) else None
