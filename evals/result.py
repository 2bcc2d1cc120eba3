"""The shape of every suite's result: of one model, which ``eval/NAME.json`` of a run holds, and of several."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from .row_values import GROUP
from .statistics import CLEAR, LEVEL, RESAMPLES, Estimate

SCHEMA = 1
PARTS = re.compile(r"/|^[\w.]+:(?=\w+$)")
"""Where the parts of a model's name meet."""
INTERVAL = {
    "kind": "percentile bootstrap",
    "shares_at_0_or_1": "Clopper-Pearson",
    "distinct": "jackknife",
    "level": LEVEL,
    "resamples": RESAMPLES,
    "seed": 0,
}
TEST = {"kind": "sign flips", "resamples": RESAMPLES, "seed": 0, "correction": "Holm", "clear_below": CLEAR}


def suite_result(
    suite: str,
    metrics: Mapping[str, Estimate],
    rows: Sequence[dict[str, Any]],
    settings: Mapping[str, Any] | None,
    *,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """``{suite, schema, n, metrics, rows, settings}``, JSON-able; the settings say how the intervals were made.

    Args:
        suite, metrics, settings: what they say.
        rows: what the metrics were computed from.
        groups: of each row what it was resampled with; where several rows have one, each gets its number
            (``group``), so that two results can be compared row by row.
    """
    if groups is not None and len(set(groups)) < len(rows):
        numbers: dict[Hashable, int] = {}
        for row, group in zip(rows, groups, strict=True):
            row[GROUP] = numbers.setdefault(group, len(numbers))
    return {
        "suite": suite,
        "schema": SCHEMA,
        "n": len(rows),
        "metrics": {name: estimate.as_dict() for name, estimate in metrics.items()},
        "rows": list(rows),
        "settings": {**(settings or {}), "interval": INTERVAL},
    }


def compared_result(
    suite: str,
    models: Mapping[str, Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
    reference: str | None,
    settings: Mapping[str, Any] | None,
    **extra: Any,
) -> dict[str, Any]:
    """``{suite, schema, n, data, reference, settings, models, comparisons, ...}``, JSON-able.

    Args:
        suite: its name.
        models: what ``suite_result`` gave for each, by name.
        comparisons: from ``align.evals.statistics.comparisons``.
        data: where the rows are from: source, digest, counts.
        reference: the model that the others are compared with; None where there is none.
        settings: how the numbers were made; how the intervals and tests were is added.
        extra: what else the suite has to say. ``n`` stands for the rows of each model, where they differ.

    Raises:
        ValueError: no models, or their rows differ in number and ``n`` is not given.
    """
    counts = {name: result["n"] for name, result in models.items()}
    if "n" not in extra and len(set(counts.values())) != 1:
        raise ValueError(f"rows of each model: {counts}; models are compared on the same rows")
    return {
        "suite": suite,
        "schema": SCHEMA,
        "n": next(iter(counts.values()), 0),
        "data": dict(data),
        "reference": reference,
        "settings": {**(settings or {}), "interval": INTERVAL, "test": TEST},
        "models": {name: dict(result) for name, result in models.items()},
        "comparisons": [dict(comparison) for comparison in comparisons],
        **extra,
    }


def models_of(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The result of each model, by a short name; of a result of one model, that one under an empty name."""
    several = result.get("models")
    return dict(zip(short_names(list(several)), several.values(), strict=True)) if several else {"": result}


def short_names(names: Sequence[str]) -> list[str]:
    """As many of the last parts of paths, and of ``module:function``, as it takes to tell them apart."""
    names = [name.rstrip("/") for name in names]
    starts = [[0, *(match.end() for match in PARTS.finditer(name))] for name in names]
    for count in range(1, max(map(len, starts), default=1) + 1):
        found = [name[own[-count:][0] :] for name, own in zip(names, starts, strict=True)]
        if len(set(found)) == len(set(names)):
            return found
    return names
