"""Groups of K answers to a prompt: their pairs, and what each scores against the others."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import wide
from .types import PairLogps, SequenceLogps, check_bounded, check_type, first


def all_pairs(group: SequenceLogps) -> PairLogps:
    """The K(K-1)/2 pairs ``i < j`` of each prompt's K answers, answer i as ``chosen``.

    Args:
        group: totals (nats) and lengths (tokens) of K answers to each of B prompts, (B, K).

    Returns:
        B K(K-1)/2 pairs, prompt by prompt, in the order (0, 1), (0, 2), ..., (1, 2), ...

    Raises:
        ValueError: not of shape (B, K), or K < 2.
    """
    check_type("group", group, SequenceLogps)
    i, j = pairs_of("group", group.total)
    return PairLogps(
        SequenceLogps(group.total[:, i].flatten(), group.length[:, i].flatten()),
        SequenceLogps(group.total[:, j].flatten(), group.length[:, j].flatten()),
    )


def all_pair_values(matrix: Tensor) -> Tensor:
    """``matrix[b, i, j]`` for the pairs of ``all_pairs``, in its order.

    Args:
        matrix: a value of each ordered pair, such as the probability that i is preferred to j, (B, K, K).

    Returns:
        Shape (B K(K-1)/2,).

    Raises:
        ValueError: not of shape (B, K, K), or K < 2.
    """
    _check_table("matrix", matrix)
    i, j = pairs_of("matrix", matrix[..., 0])
    return matrix[:, i, j].flatten()


def mean_scores(scores: Tensor, include_self: bool = False) -> Tensor:
    """Mean score of each answer against the others: the estimate of its score against the policy that gave them.

    ``mean_i = sum_j s_ij / (K - 1)``. Win rates go in and come out less their 1/2: ``mean_scores(P - 0.5) + 0.5``.

    Args:
        scores: ``scores[b, i, j] = -scores[b, j, i]``, by how much i beats j, (B, K, K).
        include_self: divide by K instead, the answer's score of 0 against itself counted: (K - 1)/K of the mean over
            opponents.

    Returns:
        Shape (B, K), in float32 or better.

    Raises:
        ValueError: not of shape (B, K, K), K < 2, a score that is not finite, or a table that is not antisymmetric.
    """
    _check_table("scores", scores)
    pairs_of("scores", scores[..., 0])
    check_bounded("scores", scores)
    scores = wide(scores)
    uneven = (scores + scores.mT).abs() > 1e-4 * (1 + scores.abs())
    if bool(uneven.any()):
        raise ValueError(
            f"scores{first(uneven)} is {float(scores[uneven][0])} and its mirror image "
            f"{float(scores.mT[uneven][0])}: scores are antisymmetric, s_ij = -s_ji"
        )
    return scores.sum(-1) / (scores.shape[-1] - (not include_self))


def _check_table(name: str, table: Tensor) -> None:
    check_type(name, table, Tensor)
    if table.ndim != 3 or table.shape[1] != table.shape[2]:
        raise ValueError(
            f"{name} has shape {tuple(table.shape)} and must have (B, K, K): a value of each ordered pair"
        )


def pairs_of(name: str, group: Tensor) -> tuple[Tensor, Tensor]:
    """First and second index of the pairs i < j of (B, K)."""
    if group.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(group.shape)} and must have (B, K): K answers to each prompt")
    if group.shape[1] < 2:
        raise ValueError(f"{name} has {group.shape[1]} answers a prompt: pairs take two or more")
    i, j = torch.triu_indices(group.shape[1], group.shape[1], offset=1, device=group.device)
    return i, j
