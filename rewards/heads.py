"""What a reward or preference model does with hidden states: which of them it reads, and how embeddings compare.

The last real token is found by the attention mask, never by comparing tokens with a padding id: many tokenizers pad
with their end token, and an answer ends in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.losses.general_preference import gpm_score


def first_positions(attention_mask: Tensor) -> Tensor:
    """Index of the first real token of each row, (B,). ``attention_mask``: (B, T), non-zero on real tokens.

    Raises:
        ValueError: a row has no real token.
    """
    real = attention_mask.bool()
    empty = ~real.any(-1)
    if bool(empty.any()):
        raise ValueError(f"attention_mask[{int(empty.nonzero()[0])}] has no real token: there is nothing to score")
    return real.int().argmax(-1)


def last_positions(attention_mask: Tensor) -> Tensor:
    """Index of the last real token of each row, (B,).

    Raises:
        ValueError: a row has no real token.
    """
    return attention_mask.shape[-1] - 1 - first_positions(attention_mask.flip(-1))


def token_positions(attention_mask: Tensor) -> Tensor:
    """Position of each real token in its own row, from 0, so that padding on the left moves nothing; (B, T)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def states_at(hidden: Tensor, index: Tensor) -> Tensor:
    """``hidden[b, index[b]]`` in float32 or better, (B, H). ``hidden``: (B, T, H)."""
    states = hidden[torch.arange(len(hidden), device=hidden.device), index]
    return states.to(torch.promote_types(states.dtype, torch.float32))


def pair_matrix(embeddings: Tensor, scale: Tensor | None = None) -> Tensor:
    """Scores of all answers to a prompt against each other, at once, from their K embeddings alone.

    ``s_ij = <R v_i, v_j> = sum_l lam_l (v_i[2l] v_j[2l+1] - v_i[2l+1] v_j[2l])`` (arXiv:2410.02197).

    Args:
        embeddings: (..., K, d), d even.
        scale: ``lam`` of the prompt, (..., d/2); None is 1.

    Returns:
        (..., K, K): ``[i, j]`` is the score of i over j. Exactly antisymmetric, and exactly 0 of equal embeddings; of
        a matrix product, whose sums may be rounded one way or the other, that would not be sure.

    Raises:
        ValueError: d is odd, or a number is not finite.
    """
    check_even(embeddings.shape[-1])
    lam = None if scale is None else scale[..., None, None, :]
    return gpm_score(embeddings[..., :, None, :], embeddings[..., None, :, :], lam)


def check_even(dimension: int) -> None:
    """Raise a ValueError unless a preference embedding can have this many dimensions."""
    if dimension < 2 or dimension % 2:
        raise ValueError(f"the embedding has {dimension} dimensions: a preference embedding has 2, 4, 6, ...")
