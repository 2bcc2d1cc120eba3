"""Preferences that run in a circle, and what a reward or preference model gets right on them.

A pure K-cycle is K answers to one prompt of which each is preferred to the next one and the last to the first, with no
other pair among them. A reward, a number an answer, orders the answers and so misses at least one of the K pairs: its
best is (K - 1) / K (``scalar_ceiling``). A preference model can have all (arXiv:2410.02197).

    cycles = pure_cycles(prompts, winners, losers)     # numbers of pairs, in the order of each circle
    cycle_suite(scores, row_ids)                       # accuracy with ties as half, whole cycles, the ceiling
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .result import suite_result
from .statistics import Estimate, finite_vector, share_interval


def pure_cycles(
    prompts: Sequence[Hashable], winners: Sequence[Hashable], losers: Sequence[Hashable]
) -> list[list[int]]:
    """The pure cycles among N pairs of answers.

    Args:
        prompts, winners, losers: of each pair, N each. A pair that stands again counts once, the first time.

    Returns:
        For each cycle of three or more its K pairs, by number: the loser of one is the winner of the next. A circle
        whose answers are compared with any others too is none.

    Raises:
        ValueError: counts that differ.
    """
    if not len(prompts) == len(winners) == len(losers):
        raise ValueError(f"{len(prompts)} prompts, {len(winners)} winners, {len(losers)} losers")
    edges: dict[tuple[tuple[Hashable, Hashable], tuple[Hashable, Hashable]], int] = {}
    for number, (prompt, winner, loser) in enumerate(zip(prompts, winners, losers, strict=True)):
        edges.setdefault(((prompt, winner), (prompt, loser)), number)
    won, lost = Counter(winner for winner, _ in edges), Counter(loser for _, loser in edges)
    following = {winner: (loser, number) for (winner, loser), number in edges.items() if won[winner] == 1}
    found, seen = [], set()
    for start in following:
        walk: list[int] = []
        place = start
        # Each answer once as winner and once as loser: a walk that comes back has met no other pair.
        while place not in seen and place in following and won[place] == lost[place] == 1:
            seen.add(place)
            place, number = following[place]
            walk.append(number)
        if walk and place == start and len(walk) > 2:
            found.append(walk)
    return found


def scalar_ceiling(length: int) -> float:
    """The best accuracy of any reward on a pure K-cycle: (K - 1) / K.

    Rewards cannot fall all the way round, so one pair at least is not won; where it is a tie, which counts half,
    another one is not won either.

    Raises:
        ValueError: fewer than three answers.
    """
    if length < 3:
        raise ValueError(f"length is {length}: a cycle has three answers or more")
    return (length - 1) / length


def cycle_suite(
    scores: Sequence[Tensor], row_ids: Sequence[Sequence[str]], *, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Accuracy on pure cycles.

    Args:
        scores: for each cycle, by how much each answer beats the next one, (K,): right if positive, a tie if 0.
        row_ids: of its pairs, kept in the rows.
        settings: what made the scores, kept in the result.

    Returns:
        Metrics ``accuracy`` (share of pairs; a tie is half), ``ceiling`` (the best of any reward on these cycles),
        ``whole`` (share of cycles with every pair right) and ``ties`` (share of pairs); for each length K the same as
        ``accuracy_K``, ...; ``n`` counts cycles, which are resampled whole. Rows ``{row_ids, scores}``.

    Raises:
        ValueError: no cycles, fewer than three scores in one, or a score that is not finite.
    """
    if not scores:
        raise ValueError("no cycles: there is nothing to be right about")
    found = [finite_vector(values.detach().double().cpu().numpy(), "scores") for values in scores]
    metrics: dict[str, Estimate] = {}
    for length in (None, *sorted({len(values) for values in found})):
        chosen = [values for values in found if length in (None, len(values))]
        groups = [number for number, values in enumerate(chosen) for _ in values]
        every = np.concatenate(chosen)
        best = sum(len(values) * scalar_ceiling(len(values)) for values in chosen) / len(every)
        of = {
            "accuracy": share_interval((every > 0) + 0.5 * (every == 0), groups=groups),
            "ceiling": Estimate(best, None, None, len(chosen)),
            "whole": share_interval([bool((values > 0).all()) for values in chosen]),
            "ties": share_interval(every == 0, groups=groups),
        }
        metrics |= of if length is None else {f"{name}_{length}": value for name, value in of.items()}
    rows = [{"row_ids": list(ids), "scores": values.tolist()} for ids, values in zip(row_ids, found, strict=True)]
    return suite_result("cycles", metrics, rows, settings)
