"""The one shape of every suite's result: what ``eval/NAME.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .statistics import LEVEL, RESAMPLES, Estimate

SCHEMA = 1


def suite_result(
    suite: str, metrics: Mapping[str, Estimate], rows: Sequence[dict[str, Any]], settings: Mapping[str, Any] | None
) -> dict[str, Any]:
    """``{suite, schema, n, metrics, rows, settings}``, JSON-able; the settings say how the intervals were made."""
    interval = {"kind": "percentile bootstrap", "level": LEVEL, "resamples": RESAMPLES, "seed": 0}
    return {
        "suite": suite,
        "schema": SCHEMA,
        "n": len(rows),
        "metrics": {name: estimate.as_dict() for name, estimate in metrics.items()},
        "rows": list(rows),
        "settings": {**(settings or {}), "interval": interval},
    }
