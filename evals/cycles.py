"""Preferences that run in a circle: data of pure cycles, and what a model gets right on them.

A pure K-cycle is K answers to one prompt of which answer i is preferred to answer i + 1, and the last to the first:
each edge has its own criterion, on which its first answer is better by construction (edge i: criterion i). A reward, a
number an answer, orders the answers and so misses at least one edge: its best is (K - 1) / K (``scalar_ceiling``). A
preference model can have all (arXiv:2410.02197).

    data = attribute_cycles(200, 3, seed=0)                # (200, 3, 3): answers of each cycle, in order
    rows = text_cycles(200, 3, seed=0)                     # the same as prompt, chosen, rejected
    cycle_suite(edge_scores(matrices))                     # accuracy with ties as half, whole cycles, the ceiling
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .result import suite_result
from .statistics import bootstrap_interval, finite_vector

CRITERIA = ("speed", "price", "comfort", "safety", "taste", "silence", "charm", "care")
LEVELS = ("hopeless", "poor", "fair", "good", "superb")
PLACES = ("a café", "a hotel", "a ferry", "a train", "a taxi", "a campsite", "a sauna", "a cinema", "a gym", "a diner")


def attribute_cycles(count: int, length: int, *, seed: int) -> Tensor:
    """Pure cycles of attribute vectors.

    Answer i has 0.8 to 1 on criterion i and 0 to 0.2 on criterion i - 1, where it loses to its predecessor; on the
    others it has 0.4 to 0.6. So i beats i + 1 on criterion i by 0.6 or more.

    Args:
        count: C cycles.
        length: K answers each, 3 or more.
        seed: other seeds give other cycles: those of training and those held out.

    Returns:
        (C, K, K): cycle, answer, criterion, float32.

    Raises:
        ValueError: fewer than three answers, or no cycles.
    """
    _check_length(length)
    if count < 1:
        raise ValueError(f"count is {count}: at least one cycle")
    generator = torch.Generator().manual_seed(seed)
    low = torch.full((length, length), 0.4)
    for answer in range(length):
        low[answer, answer] = 0.8
        low[answer, answer - 1] = 0.0
    return low + 0.2 * torch.rand(count, length, length, generator=generator)


def text_cycles(count: int, length: int, *, seed: int) -> list[dict[str, Any]]:
    """The cycles of ``attribute_cycles`` as pairs of texts, the K edges of a cycle one after the other.

    Returns:
        Rows ``{prompt, chosen, rejected, cycle, edge, criterion}``; criteria are named in an order of the cycle's own.

    Raises:
        ValueError: as ``attribute_cycles``, or more answers than there are criteria.
    """
    if length > len(CRITERIA):
        raise ValueError(f"length is {length}: texts have {len(CRITERIA)} criteria")
    attributes = attribute_cycles(count, length, seed=seed)
    rng = np.random.default_rng(seed)
    rows = []
    for cycle, vectors in enumerate(attributes.tolist()):
        place = PLACES[int(rng.integers(len(PLACES)))]
        order = rng.permutation(length)
        answers = [
            f"Number {int(rng.integers(10, 100))}: "
            + ", ".join(f"{CRITERIA[k]} {LEVELS[min(4, int(5 * vector[k]))]}" for k in order)
            + "."
            for vector in vectors
        ]
        for edge in range(length):
            rows.append(
                {
                    "prompt": f"Recommend {place}.",
                    "chosen": answers[edge],
                    "rejected": answers[(edge + 1) % length],
                    "cycle": cycle,
                    "edge": edge,
                    "criterion": CRITERIA[edge],
                }
            )
    return rows


def scalar_ceiling(length: int) -> float:
    """The best accuracy of any reward on a pure K-cycle, found by trying every order of the answers: (K - 1) / K.

    Ties do not help: a tied edge counts half, and breaking all ties one way or the other does as well.

    Raises:
        ValueError: fewer than three answers, or more than 8 (8! orders).
    """
    _check_length(length)
    if length > 8:
        raise ValueError(f"length is {length}: more than 8 answers have too many orders to try")
    best = max(
        sum(ranks[edge] > ranks[(edge + 1) % length] for edge in range(length))
        for ranks in itertools.permutations(range(length))
    )
    return best / length


def edge_scores(matrices: Tensor | Sequence[Tensor]) -> Tensor:
    """Scores of each answer over the next one, (C, K), from all against all, (C, K, K) (``score_groups``).

    Raises:
        ValueError: matrices that are not square, or fewer than three answers.
    """
    stacked = torch.stack(list(matrices))
    if stacked.ndim != 3 or stacked.shape[1] != stacked.shape[2]:
        raise ValueError(f"matrices have shape {tuple(stacked.shape)} and must have (C, K, K)")
    length = stacked.shape[1]
    _check_length(length)
    index = torch.arange(length, device=stacked.device)
    return stacked[:, index, (index + 1) % length]


def cycle_suite(scores: Tensor, *, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Accuracy on pure cycles.

    Args:
        scores: of each answer over the next one, (C, K): right if positive, a tie if 0.
        settings: what made the scores, kept in the result.

    Returns:
        Metrics ``accuracy`` (share of edges; a tie is half), ``ties``, ``cycles`` (share with every edge right); the
        settings say K and the ``scalar_ceiling``. Cycles are resampled whole.

    Raises:
        ValueError: another shape, or a score that is not finite.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores has shape {tuple(scores.shape)} and must have (C, K)")
    count, length = scores.shape
    ceiling = scalar_ceiling(length)
    values = finite_vector(scores.detach().double().cpu().numpy().reshape(-1), "scores").reshape(count, length)
    right, ties = values > 0, values == 0
    metrics = {
        "accuracy": bootstrap_interval((right + 0.5 * ties).mean(1)),
        "ties": bootstrap_interval(ties.mean(1)),
        "cycles": bootstrap_interval(right.all(1)),
    }
    rows = [{"cycle": number, "scores": list(map(float, row))} for number, row in enumerate(values)]
    return suite_result("cycles", metrics, rows, {**(settings or {}), "length": length, "scalar_ceiling": ceiling})


def _check_length(length: int) -> None:
    if length < 3:
        raise ValueError(f"length is {length}: a cycle has three answers or more")
