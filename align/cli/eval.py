"""``align eval``."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from align.errors import ConfigError

from .disk import writing_to

WIDTH = 140
SHOWN = 5  # tokens


class Suite(StrEnum):
    """What can be asked of models. ``_RUN`` says how, and ``_SHOW`` what is printed of it."""

    DISPLACEMENT = "displacement"


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Run (its checkpoints and its end), checkpoint, adapter or model folder, packaged name, hub id.",
        ),
    ],
    suite: Annotated[Suite, typer.Option(help="What to measure.")],
    source: Annotated[
        str,
        typer.Option("--data", metavar="DATA", help="JSONL, JSON, CSV, Parquet, a folder, hub id, align:NAME/SPLIT."),
    ],
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What they are compared with; else what all of them were trained from."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON to write; else SUITE.json here.", show_default=False)
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Limit of prompt and answer, tokens; else the reference's own.")
    ] = None,
) -> None:
    """Compare models, and the checkpoints of runs, on a data set.

    displacement, on pairs: did the chosen answers fall too, where did their probability go, and at which checkpoint?
    Intervals are 95 %; differences are from the first line, pair by pair.

        align eval runs/quickstart --suite displacement --data align:quickstart/heldout
    """
    from align.tracking.files import make_room, write_json

    path = output or Path(f"{suite}.json")
    if path.is_dir():
        raise ConfigError("align eval", [("--output", f"{path} is a folder: name a file in it")])
    make_room(path)
    result = _RUN[suite](models, source, reference, max_length, path.with_suffix(".rejected_rows.jsonl"))
    with writing_to(path):
        write_json(path, result)
    _SHOW[suite](result)
    print(path)


def _run_displacement(
    models: list[str], source: str, reference: str | None, max_length: int | None, rejected: Path
) -> dict[str, Any]:
    from align.compare import compare_displacement

    return compare_displacement(models, source, reference=reference, max_length=max_length, rejected=rejected)


def _show_displacement(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH  # a log or a pipe has no edge to fold at
    data = result["data"]["source"]
    console.print(f"{result['n']:,} pairs of {data} against {result['reference']}: change of log-prob", soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("")
    for column in ("chosen, nats a token", "less the first line", "chosen fell", "largest fall", "rejected"):
        table.add_column(column, justify="right")
    for name, found in result["models"].items():
        metrics, difference = found["metrics"], found["difference"]
        table.add_row(
            Text(name),
            _estimate(metrics["chosen_delta_per_token"], "+.3f"),
            "" if difference is None else _estimate(difference["chosen_delta_per_token"], "+.3f"),
            _estimate(metrics["frac_chosen_down"], ".0%"),
            f"{metrics['largest_fall']['value']:.1f} nats",
            f"{metrics['rejected_delta_per_token']['value']:+.3f}",
        )
    console.print(table)
    console.print("\nTokens that gained most probability as an answer's first, mean over prompts", style="dim")
    for name, found in result["models"].items():
        tokens = (
            f"{t['token']!r} {100 * t['before']:.1f} → {100 * t['after']:.1f} %" for t in found["gained"][:SHOWN]
        )
        console.print(Text(f"{name}  "), Text(" · ".join(tokens) or "none"), sep="", soft_wrap=True)
    for name, found in result["decreases"].items():
        console.print(
            f"\n{name}: between two of its {found['steps']} steps the probability of a chosen answer fell by at most "
            f"{found['largest']:.2g}, in the mean by {_estimate(found['mean'], '.2g')}",
            soft_wrap=True,
        )


def _estimate(entry: Mapping[str, Any], form: str) -> str:
    """``-0.062 [-0.082, -0.042]``."""
    value, *ends = (format(entry[key], form) for key in ("value", "low", "high") if entry[key] is not None)
    return f"{value} [{', '.join(ends)}]" if ends else value


_RUN = {Suite.DISPLACEMENT: _run_displacement}
_SHOW = {Suite.DISPLACEMENT: _show_displacement}
