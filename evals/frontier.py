"""Reward against KL to the reference: one point for each way to get more reward, both by prompt and paired.

What the KL of a point is stands with it, since not all of it can be had alike:

- a model that answers by itself: the mean of ``log pi - log pi_ref`` over its draws (``kl``);
- best of n: ``best_of``, an estimate and the bound;
- a decoder that chooses among candidates z, ``pi(z) ∝ p(z) exp(v(z) / alpha)``: the mean of ``log pi - log p`` over
  its own draws, whose law is known at every step (``decoder_log_ratio``);
- answers by weight, ``target(y) ∝ p(y) exp(s r(y))``: ``KL = s E_target[r] - log Z``, both from the particles,
  which few of them hold below the target's (``weighted_point``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .statistics import bootstrap_interval

MODEL_KL = "mean of log pi - log pi_ref over draws (k1)"
BEST_OF_KL = (
    "estimator of arXiv:2401.01879 over subsets, an outcome being a reward; too large where few rewards differ"
)
BEST_OF_BOUND = "bound log n - (n - 1)/n"
DECODER_KL = "mean of log pi_decoder - log pi_ref over its own draws, by its law at every step"
WEIGHTED_KL = (
    "strength * E[reward] - log Z, both from the particles: an estimate for the target that few particles hold below "
    "it; at most log(particles) without resampling"
)


def point(
    kind: str,
    label: str,
    rows: Sequence[Mapping[str, Any]],
    how: str,
    *,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A point of the frontier.

    Args:
        kind: ``reference``, ``checkpoint``, ``run``, ``model``, ``scaling``, ``best-of-n``, ``transfer-q`` or ``smc``.
        label: unique among the result's points.
        rows: of the prompts that it has, ``{row_id, reward, kl, tokens, ...}``: tokens that were drawn for the answer;
            ``judge`` where another reward judges the answers too.
        how: what the KL is.
        settings: of the point.
        more: what else there is to say.

    Returns:
        ``{kind, label, settings, reward, judge, kl, cost, rows, ...}``: estimates with intervals by prompt, ``kl`` in
        nats with ``how``, ``cost`` the tokens a prompt.

    Raises:
        ValueError: no rows.
    """
    judged = any("judge" in row for row in rows)
    return {
        "kind": kind,
        "label": label,
        "settings": dict(settings or {}),
        "reward": bootstrap_interval([row["reward"] for row in rows]).as_dict(),
        **({"judge": bootstrap_interval([row["judge"] for row in rows]).as_dict()} if judged else {}),
        "kl": {**bootstrap_interval([row["kl"] for row in rows]).as_dict(), "how": how},
        "cost": {"tokens": float(np.mean([row["tokens"] for row in rows]))},
        **more,
        "rows": [dict(row) for row in rows],
    }


def decoder_log_ratio(log_probs: Sequence[float], values: Sequence[float | None], alpha: float, chosen: int) -> float:
    """``log pi(z) - log p(z)`` of a token z that was drawn among candidates, nats.

    ``pi(z) = p(z) exp(v(z) / alpha) / sum over candidates``, so the ratio is
    ``v(z)/alpha - log sum_c p(c) exp(v(c)/alpha)``. A single candidate needs no value and has probability 1.

    Args:
        log_probs: ``log p`` of the candidates.
        values: of each; -inf for one that is never drawn.
        alpha: units of value a nat.
        chosen: number of z.
    """
    if len(log_probs) == 1:
        return -log_probs[0]
    tilts = np.array([-math.inf if value is None else value / alpha for value in values], dtype=np.float64)
    return float(tilts[chosen] - np.logaddexp.reduce(np.asarray(log_probs) + tilts))


def weighted_mean(log_weights: Sequence[float], values: Sequence[float]) -> float:
    """Mean by weight: of what is said of the sample that is drawn by weight, (N,) each; -inf for weight zero."""
    shares = np.exp(np.asarray(log_weights, dtype=np.float64) - np.logaddexp.reduce(log_weights))
    return float(shares @ np.asarray(values, dtype=np.float64))


def weighted_point(
    log_weights: Sequence[float], rewards: Sequence[float], log_normaliser: float, strength: float
) -> tuple[float, float]:
    """Reward and KL to the reference of ``target(y) ∝ p(y) exp(s r(y))``, from weighted samples of one prompt.

    ``KL(target || p) = E_target[log target - log p] = s E_target[r] - log Z``. The mean of r by weight is also the
    expected reward of the sample that is drawn by weight. Where nothing is resampled on the way, the estimate is
    ``log N - entropy of the weights``: never above ``log N``, and so below the target's KL where N is small, as is the
    reward. Its expectation is at least the KL of that sample's own law.

    Args:
        log_weights, rewards: of the samples, (N,); -inf for one of weight zero.
        log_normaliser: log of the estimate of Z.
        strength: s, nats a unit of reward.
    """
    reward = weighted_mean(log_weights, rewards)
    return reward, strength * reward - log_normaliser


def of_rows(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """A column of a point's rows, by prompt."""
    return {row["row_id"]: float(row[name]) for row in rows}


def common(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values of the prompts that both have, in one order."""
    names = [name for name in first if name in second]
    return np.array([first[name] for name in names]), np.array([second[name] for name in names])
