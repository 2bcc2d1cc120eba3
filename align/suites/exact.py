"""What ``align verify`` finds, as a result file: losses and samplers in worlds where the truth is known.

Every answer of these worlds is enumerated, so that there is nothing to sample, and no interval.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field
from rich.table import Table
from rich.text import Text

from align.config.section import Section
from align.errors import ConfigError
from align.evals.exact.rows import Row
from align.evals.exact.targets import TARGETS
from align.evals.exact.verify import make_stack, names, verify
from align.evals.result import compared_result, suite_result
from align.evals.statistics import Estimate
from align.tracking.progress import progress

from .asked import Asked
from .shown import printer


class Settings(Section):
    """The stack that they run on."""

    device: str = "cpu"
    """A torch device: cpu, cuda, cuda:1, mps."""
    dtype: Literal["float64", "float32"] = "float64"
    """What they compute in."""
    only: list[str] = Field(default=[])
    """These losses, transforms, pal or samplers alone; []: all."""
    seed: int = Field(default=0, ge=0)
    """Of worlds and starts."""


def run(asked: Asked, settings: Settings) -> dict[str, Any]:
    """Every comparison of every method.

    Returns:
        ``align.evals.result.compared_result``, with methods in the place of models: ``metrics`` counts comparisons
        that ``passed``, ``missed`` and were ``told`` without a tolerance; ``rows`` are the comparisons; ``kind`` and
        ``target`` say how the truth is known and what it is.

    Raises:
        ConfigError: a name that is no method, a device that is not there, or models are named.
    """
    asked.refuse_models("exact", "worlds of its own")
    try:
        chosen, stack = names(settings.only), make_stack(settings.device, settings.dtype, settings.seed)
    except ValueError as error:
        raise ConfigError("align eval", [("settings", str(error))]) from None
    methods, began = {}, time.monotonic()
    with progress("methods against the truth", len(chosen)) as advance:
        for name in chosen:
            methods[name] = _result(name, verify(name, stack))
            advance(1)
    return compared_result(
        "exact",
        methods,
        [],
        {"source": "align.evals.exact"},
        None,
        settings.model_dump(),
        n=sum(method["n"] for method in methods.values()),
        seconds=time.monotonic() - began,
    )


def _result(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    said: list[str] = [row.status for row in rows]
    counts = {"passed": "pass", "missed": "miss", "told": "told"}
    metrics = {metric: Estimate(said.count(status), None, None, len(rows)) for metric, status in counts.items()}
    lines = [{"row_id": row.quantity, **asdict(row), "status": row.status} for row in rows]
    target = TARGETS.get(name)
    result = suite_result("exact", metrics, lines, None)
    return {**result, "kind": target and target.kind, "target": target and target.statement}


def show(result: Mapping[str, Any]) -> None:
    """Print a line for each method, and every miss."""
    console = printer()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("known by")
    for column in ("passed", "missed", "told", "furthest that passed"):
        table.add_column(column, justify="right")
    for name, method in result["models"].items():
        counts = [int(method["metrics"][metric]["value"]) for metric in ("passed", "missed", "told")]
        furthest = max((row["distance"] for row in method["rows"] if row["status"] == "pass"), default=0.0)
        style = "bold red" if counts[1] else ""
        table.add_row(Text(name, style), method["kind"] or "", *map(str, counts), f"{furthest:.1e}")
    console.print(table)
    for name, method in result["models"].items():
        for row in method["rows"]:
            if row["status"] == "miss":
                console.print(Text(f"{name}, {row['row_id']}: exact {row['exact']}, ours {row['ours']}", "bold red"))
    missed = sum(int(method["metrics"]["missed"]["value"]) for method in result["models"].values())
    settings = result["settings"]
    console.print(
        f"{len(result['models'])} methods, {settings['dtype']} on {settings['device']}: {result['n']} comparisons, "
        f"{missed} missed; {result['seconds']:.0f} s"
    )
