"""``align eval``."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from align.errors import ConfigError
from align.suites import SUITES

from .disk import writing_to

if TYPE_CHECKING:
    from align.suites.asked import Asked
    from align.tracking.wandb import Mode

EPILOG = "\n\n".join(f"[bold]{name}[/bold]  {question}" for name, question in SUITES.items())
SETTING = re.compile(r"[a-z_][\w.]*=")


def _suite(name: str) -> str:
    if name not in SUITES:
        raise typer.BadParameter(f"'{name}' is not one of {', '.join(SUITES)}")
    return name


def evaluate(
    suite: Annotated[
        list[str],
        typer.Option(metavar="SUITE", parser=_suite, help="What to measure, see below; can be given again."),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL... [KEY=VALUE...]",
            help="Run (also by its recipe), checkpoint, adapter or model folder, packaged name, hub id; then settings "
            "of the suites, such as prompts=64.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="JSONL, JSON, CSV, Parquet, a folder, hub id, align:NAME/SPLIT; else the first run's held-out data.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What they are compared with; else what all of them were trained from."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON to write, of several suites a folder.", show_default="SUITE.json"),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Limit of prompt and answer, tokens; else the reference's own.")
    ] = None,
    wandb: Annotated[
        Literal["offline", "online", "disabled"] | None,
        typer.Option(
            help="A W&B run of each result, in the group of the first run's; else as that run's tracking.wandb says.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare models, decoders and rewards on the same data. Intervals are 95 %, comparisons are paired.

    align eval runs/quickstart --suite displacement
    """
    from align.suites.asked import asked_of, settings_of
    from align.tracking.files import make_room, write_json

    given = [word for word in words or [] if SETTING.match(word)]
    models = [word for word in words or [] if not SETTING.match(word)]
    modules = {name: import_module(f"align.suites.{name.replace('-', '_')}") for name in dict.fromkeys(suite)}
    paths = _paths(list(modules), output)
    for path in paths.values():
        make_room(path)
    asked = {name: asked_of(models, data, reference, max_length, path) for name, path in paths.items()}
    settings = settings_of(modules, given, next(iter(asked.values())).recipes)
    for name, module in modules.items():
        result = module.run(asked[name], settings[name])
        with writing_to(paths[name]):
            write_json(paths[name], result)
        module.show(result)
        print(paths[name])
        _to_wandb(result, asked[name], paths[name], wandb)


def _to_wandb(result: dict[str, Any], asked: Asked, path: Path, mode: Mode | None) -> None:
    from align.reports.eval_figures import result_images
    from align.tracking.wandb_eval import place_of, send_evaluation

    place = place_of(asked.recipes, mode, path)
    if place is None or place.mode == "disabled":
        return
    sync = send_evaluation(result, [path, asked.rejected, asked.kept], result_images(result), place)
    if sync is not None:
        print(f"W&B, offline: {sync}", file=sys.stderr)


def _paths(suites: list[str], output: Path | None) -> dict[str, Path]:
    """Where each suite's result goes."""
    if len(suites) > 1 or output is None:
        return {name: (output or Path()) / f"{name}.json" for name in suites}
    if output.is_dir():
        raise ConfigError("align eval", [("--output", f"{output} is a folder: name a file in it")])
    return {suites[0]: output}
