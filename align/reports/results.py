"""Results of ``align eval``, read and made ready for a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import AlignError
from align.evals.result import SCHEMA, models_of, short_names

from .compared import Row, Table, ends, p_words
from .eval_figures import result_pictures
from .measures import POINTS, Measure, number


def read_result(path: Path) -> dict[str, Any]:
    """A result of ``align eval``, or of a run's own evaluation.

    Raises:
        AlignError: it cannot be read, or is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AlignError(f"{path}: cannot be read ({error.strerror}); name a file that align eval wrote") from error
    except ValueError as error:
        raise AlignError(f"{path}: not JSON ({error}); name a file that align eval wrote") from None
    if not isinstance(found, dict) or not {"suite", "schema", "n"} <= found.keys() or not models_of(found):
        raise AlignError(f"{path}: no result of an evaluation; name a file that align eval wrote")
    if found["schema"] != SCHEMA:
        raise AlignError(f"{path}: of schema {found['schema']}, and this reads {SCHEMA}; make it again")
    if not all("metrics" in one for one in models_of(found).values()):
        raise AlignError(f"{path}: it has no metrics; name a file that align eval wrote")
    return found


def shown_result(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the pages show of a result of ``align eval``."""
    data = (result.get("data") or {}).get("source")
    return {
        "suite": result["suite"],
        "what": f"n = {result['n']:,}" + (f", {data}" if data else ""),
        "reference": result.get("reference"),
        "pictures": result_pictures(result),
        "metrics": result_table(result, subsets=False),
        "subsets": result_table(result, subsets=True),
        "comparisons": compared_lines(result),
    }


def result_table(result: Row, *, subsets: bool) -> Table:
    """Metrics of a result of ``align eval``, a column a model: those of subsets, or the others."""
    models = models_of(result)
    if not subsets and any("points" in one for one in models.values()):
        return _points_table([point for one in models.values() for point in one.get("points", [])])
    names = [name or str(result["suite"]) for name in models]
    keys = dict.fromkeys(key for one in models.values() for key in one.get("metrics", {}))
    wanted = [key for key in keys if key.startswith("accuracy/") == subsets and not key.startswith("ties/")]
    lines = [(key, [_entry(one.get("metrics", {}).get(key)) for one in models.values()]) for key in wanted]
    return Table(names, [(key.removeprefix("accuracy/") if subsets else words(key), cells) for key, cells in lines])


def _points_table(points: Sequence[Row]) -> Table:
    """A line a point of a frontier."""

    def cells(point: Row) -> list[Measure | None]:
        n = point["reward"]["n"]
        bound = point.get("kl_bound")  # known, and no estimate
        most = None if bound is None else Measure("", number(bound["value"], POINTS), "", n)
        tokens = Measure("", f"{point['cost']['tokens']:.0f}", "", n)
        judged = [_entry(point["judge"])] if judge else []
        return [_entry(point["reward"]), *judged, _entry(point["kl"]), most, tokens]

    judge = all("judge" in point for point in points)
    columns = ("reward", *(["by the judge"] if judge else []), "KL, nats", "KL at most", "tokens a prompt")
    return Table(columns, [(point["label"], cells(point)) for point in points])


def compared_lines(result: Row) -> list[dict[str, Any]]:
    """The comparisons of a result of ``align eval``, ready to print."""
    entries = result.get("comparisons") or []
    names = list(dict.fromkeys(name for entry in entries for name in (entry["model"], entry["against"])))
    short = dict(zip(names, short_names(names), strict=True))
    return [
        {
            "label": words(entry["metric"]),
            "run": short[entry["model"]],
            "against": short[entry["against"]],
            "value": f"{'+' if entry['value'] > 0 else ''}{number(entry['value'], POINTS)}",
            "interval": ""
            if entry["low"] is None
            else f"{number(entry['low'], POINTS)} to {number(entry['high'], POINTS)}",
            "n": entry["n"],
            "p": p_words(entry["p_holm"]),
            "clear": entry["clear"],
        }
        for entry in entries
    ]


def words(metric: str) -> str:
    """``frac_chosen_down`` as ``frac chosen down``."""
    return metric.replace("_", " ")


def _entry(entry: Row | None) -> Measure | None:
    if entry is None:
        return None
    return Measure("", number(entry["value"], POINTS), ends(entry, POINTS), entry["n"])
