"""A constraint from a finite list of texts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from .protocol import ConstraintError, Vocabulary


class _Node:
    """A text that some word begins with: its next bytes, and whether it is a word."""

    __slots__ = ("alive", "next", "word")

    def __init__(self) -> None:
        self.next: dict[int, _Node] = {}
        self.word = False
        self.alive = False  # some tokens lead from here to a word


class Words:
    """The answer is one of ``words``, exactly.

    Raises:
        ConstraintError: no word, an empty one, or none that the vocabulary's tokens can spell.
    """

    def __init__(self, words: Iterable[str], vocabulary: Vocabulary) -> None:
        if isinstance(words, str):
            raise ConstraintError(f"words: {words[:40]!r} is one text; give a list of them")
        self.vocabulary = vocabulary
        self._root = _Node()
        count = 0
        for count, word in enumerate(words, 1):
            if not word:
                raise ConstraintError(f"words: the {count}. is empty; an answer of no tokens cannot be told from none")
            node = self._root
            for byte in word.encode():
                node = node.next.setdefault(byte, _Node())
            node.word = True
        if not count:
            raise ConstraintError("words: the list is empty: nothing satisfies it")
        self._mark(self._root)
        if not self._root.alive:
            raise ConstraintError(
                f"words: the vocabulary's tokens can spell none of the {count:,}: nothing satisfies it"
            )

    def start(self) -> _Node:
        return self._root

    def advance(self, state: _Node, token: int) -> _Node | None:
        said = self.vocabulary.tokens[token]
        if said is None:
            return None
        for byte in said:
            if byte not in state.next:
                return None
            state = state.next[byte]
        return state if state.alive else None

    def may_end(self, state: _Node) -> bool:
        return state.word

    def allowed(self, state: _Node) -> np.ndarray:
        mask = np.zeros(self.vocabulary.size, dtype=bool)
        spelled, longest = _spellings(self.vocabulary)
        stack = [(state, b"")]
        while stack:
            node, said = stack.pop()
            if said and node.alive:
                mask[spelled.get(said, [])] = True
            if len(said) < longest:
                stack += [(child, said + bytes([byte])) for byte, child in node.next.items()]
        return mask

    def _mark(self, root: _Node) -> None:
        """Set ``alive``, the ends first; a vocabulary without single bytes may not reach every word."""
        order, stack = [], [root]
        while stack:
            node = stack.pop()
            order.append(node)
            stack += node.next.values()
        spelled, longest = _spellings(self.vocabulary)
        for node in reversed(order):
            node.alive = node.word or self._reaches(node, spelled, longest)

    def _reaches(self, node: _Node, spelled: dict[bytes, list[int]], longest: int) -> bool:
        stack = [(node, b"")]
        while stack:
            here, said = stack.pop()
            for byte, child in here.next.items():
                token = said + bytes([byte])
                if child.alive and token in spelled:
                    return True
                if len(token) < longest:
                    stack.append((child, token))
        return False


@lru_cache(maxsize=4)
def _spellings(vocabulary: Vocabulary) -> tuple[dict[bytes, list[int]], int]:
    """Tokens by what they say (several may say the same), and the longest."""
    spelled: dict[bytes, list[int]] = {}
    for token in vocabulary.usable.tolist():
        spelled.setdefault(vocabulary.tokens[token] or b"", []).append(token)
    return spelled, max(map(len, spelled), default=0)
