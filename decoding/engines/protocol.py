"""What a decoder asks of an engine: sequences that grow, fork and close, and the next token's logits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from align.decoding.law import Law


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


@dataclass(frozen=True)
class Rollout:
    """What a model went on with.

    Args:
        tokens: ids, the end token included where there is one.
        ended: whether the last of them is an end token; else the length or the model's context has cut it.
        cached_tokens: how many of the prompt's tokens were not computed for it, but shared or kept.
    """

    tokens: tuple[int, ...]
    ended: bool
    cached_tokens: int = 0


@runtime_checkable
class Rollouts(Protocol):
    """What goes on from many prompts at once, to an end token or for some tokens."""

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        law: Law,
        seeds: Sequence[int],
        ends: Collection[int],
    ) -> list[Rollout]:
        """One rollout a prompt; what else is in the call has no say in it, up to the rounding of the engine.

        Args:
            prompts: ids; equal ones may stand there several times.
            max_new_tokens: longest rollout, its end token counted; shorter where the model's context is full, and
                empty where the prompt fills it.
            law: of each token; ``Law(top_k=1)`` is greedy.
            seeds: one a prompt, from 0 to 2^63 - 1. A token is a function of its law, the seed and its position in
                the rollout, so equal prompts with equal seeds have equal rollouts.
            ends: ids that end a rollout.

        Raises:
            ValueError: a prompt has no tokens, the seeds are not as many as the prompts, or ``max_new_tokens`` is
                under 1.
        """
        ...
