"""Calibration suite: of the pairs that a model is 80 % sure of, are 80 % right?

A pair has no first answer, so that each is read from the side of the answer that the model prefers: the confidence
``c = max(p, 1 - p)``, in [1/2, 1], and ``right``, the probability by the label that this answer is preferred; both 1/2
where the model cannot tell. Reading each pair from both sides gives the same errors.

    ECE = sum over bins b of  n_b / N * |mean c - mean right|            (expected calibration error)

An error of bins is an absolute value of noise too: a calibrated model has an ECE above 0, the more the fewer pairs a
bin has, and resampling adds as much again. So ``ece`` is a number without an interval, and beside it stands where the
ECE of a calibrated model of these very confidences would lie (``ece_if_calibrated``): above it, the model is not
calibrated. What has an interval is ``overconfidence``, the mean of ``c - right``, which noise does not move.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .preference import preferred
from .result import suite_result
from .statistics import LEVEL, Estimate, Z, bootstrap_interval, finite_vector, share_interval

FloatArray = NDArray[np.float64]
SIMULATED = 2000


def calibration_suite(
    scores: Tensor,
    row_ids: Sequence[str],
    *,
    preference: Sequence[float | None] | None = None,
    groups: Sequence[Hashable] | None = None,
    bins: int = 10,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """How far the probabilities of N pairs can be trusted.

    Args:
        scores: log-odds that the chosen answer is preferred, (N,): the stated probability is ``sigma(score)``.
        row_ids: one per pair, kept in the rows.
        preference: probability that the chosen answer is preferred, of each pair; None: it is.
        groups: the prompt of each pair, where a prompt has several: they are resampled together.
        bins: of confidence: of equal width between 1/2 and 1, and of as many pairs each (equal confidences together).
        settings: what made the scores, kept in the result.

    Returns:
        Metrics ``ece`` (bins of equal width) and ``ece_mass`` (of as many pairs), without intervals;
        ``ece_if_calibrated`` (of bins of equal width: mean over hard labels that are drawn by the confidences, each
        pair alone, and where 95 % of them lie); ``overconfidence`` (``confidence - right``: below 0 the model is less
        sure than it could be), ``brier`` (1/4 is chance), ``log_loss`` (log 2 is), ``confidence`` and ``right``, means
        with intervals.
        ``reliability``: by kind of bin, points ``{from, to, confidence, right, low, high, n}``
        with Wilson's interval on as many observations as there are prompts. Rows ``{row_id, score, preference}``.

    Raises:
        ValueError: counts that differ, no pairs, labels that are all ties, bins < 1, or a score that is not finite.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}: at least one")
    score = finite_vector(scores.detach().double().cpu().numpy(), "scores")
    if len(score) != len(row_ids):
        raise ValueError(f"{len(score)} scores, {len(row_ids)} row ids")
    label, _ = preferred(preference, len(row_ids))
    names: Sequence[Hashable] = range(len(score)) if groups is None else groups
    confidence, right = confidences(score, label)
    width, mass = equal_width(confidence, bins), equal_mass(confidence, bins)
    probability = 1 / (1 + np.exp(-score))
    brier = label * (1 - probability) ** 2 + (1 - label) * probability**2
    nats = label * np.logaddexp(0, -score) + (1 - label) * np.logaddexp(0, score)
    n = len(set(names))
    metrics = {
        "ece": Estimate(binned_error(confidence, right, width), None, None, n),
        "ece_mass": Estimate(binned_error(confidence, right, mass), None, None, n),
        "ece_if_calibrated": if_calibrated(confidence, width, bins),
        "overconfidence": bootstrap_interval(confidence - right, groups=names),
        "brier": bootstrap_interval(brier, groups=names),
        "log_loss": bootstrap_interval(nats, groups=names),
        "confidence": bootstrap_interval(confidence, groups=names),
        "right": share_interval(right, groups=names),
    }
    rows = [
        {"row_id": row_id, "score": float(s), "preference": float(p)}
        for row_id, s, p in zip(row_ids, score, label, strict=True)
    ]
    about = {**(settings or {}), "bins": bins, "simulated": SIMULATED}
    result = suite_result("calibration", metrics, rows, about, groups=groups)
    reliability = {"equal_width": width, "equal_mass": mass}
    return result | {"reliability": {k: _points(confidence, right, of, names) for k, of in reliability.items()}}


def confidences(score: FloatArray, label: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Confidence of each pair, and the probability by the label that the answer it is for is preferred, (N,) each."""
    confidence = 1 / (1 + np.exp(-np.abs(score)))
    return confidence, np.where(score > 0, label, np.where(score < 0, 1 - label, 0.5))


def equal_width(confidence: FloatArray, bins: int) -> NDArray[np.int64]:
    """Number of the bin of each confidence in [1/2, 1], where all are equally wide; the last one has its upper end."""
    return np.minimum((2 * (confidence - 0.5) * bins).astype(np.int64), bins - 1)


def equal_mass(confidence: FloatArray, bins: int) -> NDArray[np.int64]:
    """Number of the bin of each confidence by how many are smaller; equal ones are in one bin, and some are empty."""
    smaller = np.searchsorted(np.sort(confidence), confidence, side="left")
    return (smaller * bins // len(confidence)).astype(np.int64)


def binned_error(confidence: FloatArray, right: FloatArray, of: NDArray[np.int64]) -> float:
    """ECE of bins, whose numbers are ``of``, (N,)."""
    return float(np.abs(np.bincount(of, right - confidence)).sum()) / len(of)


def if_calibrated(confidence: FloatArray, of: NDArray[np.int64], bins: int) -> Estimate:
    """ECE of hard labels drawn by the confidences themselves: mean, and where 95 % lie."""
    rng = np.random.default_rng(0)
    ordered = np.argsort(confidence, kind="stable")
    confidence, of = confidence[ordered], of[ordered]
    totals = np.bincount(of, confidence, minlength=bins)
    errors = [
        float(np.abs(np.bincount(of, rng.random(len(of)) < confidence, minlength=bins) - totals).sum()) / len(of)
        for _ in range(SIMULATED)
    ]
    low, high = np.quantile(errors, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(np.mean(errors)), float(low), float(high), len(of))


def _points(
    confidence: FloatArray, right: FloatArray, of: NDArray[np.int64], groups: Sequence[Hashable]
) -> list[dict[str, float]]:
    points = []
    for number in sorted(set(of.tolist())):
        rows = np.flatnonzero(of == number)
        share, count = float(right[rows].mean()), len({groups[row] for row in rows})
        low, high = wilson(share, count)
        ends = {"from": float(confidence[rows].min()), "to": float(confidence[rows].max())}
        where = {"confidence": float(confidence[rows].mean()), "right": share}
        points.append({**ends, **where, "low": low, "high": high, "n": len(rows)})
    return points


def wilson(share: float, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's interval of a share of ``n`` independent observations: where ``|share - p| <= z sqrt(p (1-p) / n)``."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
