"""Linear heads on a table of embeddings, for ``reward_study.py``: Bradley-Terry, its scaled form, and GPM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.losses.preference import bradley_terry, gpm, gpm_score, scaled_bradley_terry, unit_norm

TAU = 0.1
PENALTIES = (1e-3, 1e-2, 1e-1)


@dataclass
class Head:
    """A linear head on standardised embeddings, with an even number of columns for a gpm."""

    weight: Tensor
    center: Tensor
    spread: Tensor

    def scores(self, table: Tensor, left: Any, right: Any) -> Tensor:
        """By how much the right answer is better."""
        values = ((table - self.center) / self.spread) @ self.weight
        if values.shape[1] == 1:
            return values[right, 0] - values[left, 0]
        values = unit_norm(values)
        return gpm_score(values[right], values[left])


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # values of the preferred and the other answers, weights: (N,)


def train_head(
    table: Tensor,
    preferred: np.ndarray,
    other: np.ndarray,
    weight: np.ndarray,
    loss: Loss,
    validate: Callable[[Head], float],
    *,
    width: int = 1,
    steps: int = 400,
) -> tuple[Head, float]:
    """Adam on all pairs at once; penalty and step chosen by ``validate``, every 20 steps."""
    used = table[np.unique(np.concatenate([preferred, other]))]
    # A gpm compares directions: a reward is the special case (r, 1), whose 1 is in the mean that centring would take.
    center = used.mean(0) if width == 1 else torch.zeros(table.shape[1])
    spread = used.std(0).clamp(min=0.05 * float(used.std(0).mean()))
    z = (table - center) / spread
    weights = torch.as_tensor(weight, dtype=torch.float32)
    best: tuple[Head, float] | None = None
    for penalty in PENALTIES:
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(table.shape[1], width, generator=generator) / table.shape[1]
        if width > 1:
            w = w * table.shape[1] ** 0.5  # unit vectors need a direction to begin with
        w.requires_grad_()
        optimizer = torch.optim.Adam([w], lr=3e-3)
        for step in range(1, steps + 1):
            values = z @ w
            value = loss(values[preferred], values[other], weights).mean() + penalty * (w**2).sum()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if step % 20 == 0:
                head = Head(w.detach().clone(), center, spread)
                accuracy = validate(head)
                if best is None or accuracy > best[1]:
                    best = head, accuracy
    assert best is not None
    return best


def bt_loss(preferred: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    return bradley_terry(preferred[:, 0], other[:, 0]).loss


def scaled_loss(preferred: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    return scaled_bradley_terry(preferred[:, 0], other[:, 0], weight, normalize_weights=True).loss


def soft_loss(preferred: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    return bradley_terry(preferred[:, 0], other[:, 0], weight).loss


def gpm_loss(preferred: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    return gpm(unit_norm(preferred), unit_norm(other), tau=TAU).loss


def right_or_tie(scores: Tensor, label: np.ndarray) -> np.ndarray:
    """1 where the sign is the label's, 1/2 on a tie."""
    sign = np.sign(scores.detach().numpy())
    return np.where(sign == 0, 0.5, sign == label)
