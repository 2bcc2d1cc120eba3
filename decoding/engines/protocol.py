"""What a decoder asks of an engine: sequences that grow, fork and close, and the next token's logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Engine(Protocol):
    """Sequences by number (a handle). Handles are never used again."""

    @property
    def context(self) -> int | None:
        """Most tokens of a sequence, prompt and answer; None where the model has no limit of its own."""
        ...

    def open(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """A sequence for each prompt.

        Raises:
            ValueError: a prompt has no tokens.
        """
        ...

    def extend(self, handle: int, token: int) -> None:
        """One more token; ``next_logits`` comes before the next."""
        ...

    def fork(self, handle: int) -> int:
        """A sequence that has the same tokens so far, and shares what was computed for them."""
        ...

    def close(self, handle: int) -> None:
        """Free what the sequence alone holds."""
        ...

    def next_logits(self, handles: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Logits of the next token, (U, V) float32, and for each handle its row: equal sequences share one."""
        ...
