"""Rollouts on an engine whose sequences fork: what prompts have in common is computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from align.decoding.law import Law
from align.decoding.lazy import Draws, Live

from .protocol import Engine, Rollout

ROWS = 128
"""Rollouts in one batch."""
TAIL = 16
"""Most tokens that are added to a common beginning one by one; where there are more, the whole prompt is computed."""

Tokens = tuple[int, ...]


def checked(prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_new_tokens: int) -> list[Tokens]:
    """The prompts as tuples, if they and what goes with them are as ``Rollouts.rollouts`` wants them."""
    wanted = [tuple(prompt) for prompt in prompts]
    if len(seeds) != len(wanted):
        raise ValueError(f"there are {len(seeds):,} seeds for {len(wanted):,} prompts: each prompt has its own")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: it must be 1 or more")
    if () in wanted:
        raise ValueError(f"prompts[{wanted.index(())}] has no tokens")
    return wanted


def roll_out(
    engine: Engine,
    kept: dict[Tokens, int],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    law: Law,
    seeds: Sequence[int],
    ends: Collection[int],
) -> list[Rollout]:
    """``Rollouts.rollouts`` by an engine's other methods.

    Args:
        kept: handles of what the prompts of the last call had in common, by their tokens; those of this call take
            their place, so that prompts which grow from call to call are computed once. Where something is raised, it
            is left empty, and every sequence is closed.
    """
    wanted = checked(prompts, seeds, max_new_tokens)
    if not wanted:
        return []
    stems = _stems(Counter(wanted))
    shared = set(stems.values())
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    found: dict[int, Rollout] = {}
    work = _Work(engine, kept)
    try:
        for start in range(0, len(order), ROWS):
            numbers = order[start : start + ROWS]
            work.reach(stems[wanted[number]] for number in numbers)
            work.reach(wanted[number] for number in numbers)
            rows = []
            for number in numbers:
                prompt = wanted[number]
                cached = len(prompt) - work.cost(prompt) - work.cost(stems[prompt])
                room = max_new_tokens if engine.context is None else engine.context - len(prompt)
                rows.append(_Row(number, work.fork(prompt), seeds[number], min(room, max_new_tokens), cached))
            work.close({wanted[number] for number in numbers} - shared)
            work.draw(rows, law, frozenset(ends))
            found |= {row.number: Rollout(tuple(row.tokens), row.ended, row.cached) for row in rows}
        work.close(kept.keys() - shared)
    except BaseException:
        work.abandon()
        raise
    return [found[number] for number in range(len(wanted))]


@dataclass
class _Row:
    """A rollout under way."""

    number: int
    handle: int
    seed: int
    room: int
    cached: int
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


class _Work:
    """The sequences of a call: ``known`` are computed, and go on to the next call unless they are closed."""

    def __init__(self, engine: Engine, known: dict[Tokens, int]) -> None:
        self._engine, self._known = engine, known
        self._forks: set[int] = set()
        self._computed: dict[Tokens, int] = {}

    def reach(self, wanted: Iterable[Tokens]) -> None:
        """Make these sequences known: from the longest known beginning that is near, or from nothing."""
        missing = [tokens for tokens in dict.fromkeys(wanted) if tokens not in self._known]
        fresh, near = list[Tokens](), list[tuple[Tokens, int, int]]()
        for tokens in missing:
            sizes = range(len(tokens) - 1, max(0, len(tokens) - TAIL - 1), -1)
            size = next((size for size in sizes if tokens[:size] in self._known), 0)
            self._computed[tokens] = len(tokens) - size
            if size:
                near.append((tokens, self.fork(tokens[:size]), size))
            else:
                fresh.append(tokens)
        self._known.update(zip(fresh, self._engine.open(fresh), strict=True))
        while near:
            for tokens, handle, size in near:
                self._engine.extend(handle, tokens[size])
            self._engine.next_logits([handle for _, handle, _ in near])
            for tokens, handle, size in near:
                if size + 1 == len(tokens):
                    self._forks.remove(handle)
                    self._known[tokens] = handle
            near = [(tokens, handle, size + 1) for tokens, handle, size in near if size + 1 < len(tokens)]

    def cost(self, tokens: Tokens) -> int:
        """Tokens that were computed to reach this sequence; told once."""
        return self._computed.pop(tokens, 0)

    def fork(self, tokens: Tokens) -> int:
        handle = self._engine.fork(self._known[tokens])
        self._forks.add(handle)
        return handle

    def close(self, known: Iterable[Tokens]) -> None:
        for tokens in known:
            self._engine.close(self._known.pop(tokens))

    def abandon(self) -> None:
        self.close(list(self._known))
        while self._forks:
            self._engine.close(self._forks.pop())

    def draw(self, rows: Sequence[_Row], law: Law, ends: frozenset[int]) -> None:
        """Roll the rows out, all together, to their ends."""
        running = rows
        while running:
            for row in running:
                if row.ended or len(row.tokens) >= row.room:
                    self._forks.remove(row.handle)
                    self._engine.close(row.handle)
            running = [row for row in running if not row.ended and len(row.tokens) < row.room]
            if not running:
                break
            for row in running:
                if row.tokens:
                    self._engine.extend(row.handle, row.tokens[-1])
            logits, places = self._engine.next_logits([row.handle for row in running])
            for row, token in zip(running, _tokens(law, logits, places, running), strict=True):
                row.tokens.append(token)
                row.ended = token in ends


def _tokens(law: Law, logits: Tensor, places: Sequence[int], rows: Sequence[_Row]) -> list[int]:
    """A token for each row, by its seed and its position."""
    if law.top_k == 1:
        two = logits.topk(min(2, logits.shape[-1]), -1)
        if bool((two.values[:, 0] > two.values[:, -1]).all()) and bool(two.values[:, 0].isfinite().all()):
            likeliest = two.indices[:, 0].tolist()
            return [likeliest[place] for place in places]
    logps = law.log_probs(logits)
    return [
        Live(logps[place]).draw(Draws(row.seed, len(row.tokens)).uniform())
        for place, row in zip(places, rows, strict=True)
    ]


def _stems(prompts: Mapping[Tokens, int]) -> dict[Tokens, Tokens]:
    """What is kept of each prompt: what it has in common with another, if the rest is short.

    Of one that is alone all but the last token, since the next call may try another there; all of it where it is
    rolled out several times, and so is where they part.

    Args:
        prompts: how often each is rolled out.
    """
    ordered = sorted(prompts)  # those with most in common are neighbours
    common = [_common(one, other) for one, other in pairwise(ordered)]
    stems = {}
    for prompt, before, after in zip(ordered, [0, *common], [*common, 0], strict=True):
        size = max(before, after)
        if size and len(prompt) - size <= TAIL:
            stems[prompt] = prompt[:size]
        else:
            stems[prompt] = prompt if prompts[prompt] > 1 else prompt[:-1] or prompt
    return stems


def _common(one: Tokens, other: Tokens) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
