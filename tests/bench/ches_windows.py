"""The windows of arXiv:2410.08847, section 5."""

from __future__ import annotations


def window(rows: int, size: int, quantile: float) -> tuple[int, int]:
    """Start and stop of ``size`` neighbouring places of ``rows`` sorted ones, around a quantile in [0, 1]."""
    stop = min(rows, max(0, round(quantile * (rows - 1)) - size // 2) + size)
    return max(0, stop - size), stop
