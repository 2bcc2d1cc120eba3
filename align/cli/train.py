"""``align train``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from align.errors import ConfigError

from .disk import writing_to


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Recipe: a YAML file, or the name of a shipped one.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys to set, such as loss.beta=2.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print eight rows with their masks, and exit.")
    ] = False,
    preflight: Annotated[
        bool,
        typer.Option("--preflight", help="Score a sample of the pairs, say what to expect, recommend a filter, exit."),
    ] = False,
    preflight_rows: Annotated[int, typer.Option(min=2, metavar="N", help="Pairs of the sample.")] = 256,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE", help="A run for each value, and one table; given again, for a grid of both."
        ),
    ] = None,
) -> None:
    """Train, evaluate before and after, and write the report.

    The same command goes on with a run that was interrupted. One YAML file holds the run; keys can be set behind it:

        align train quickstart training.max_steps=20 output=runs/short

        align train quickstart --sweep loss.beta=2,5,10 output=runs/betas
    """
    from align.config.load import load_recipe
    from align.run import preflight as look
    from align.run import train as run

    if dry_run and preflight:
        raise ConfigError("align train", [("--preflight", "goes without --dry-run: each prints, and writes nothing")])
    changes = overrides or []
    if sweep:
        if preflight:
            raise ConfigError("align train", [("--preflight", "goes without --sweep: it looks at one recipe")])
        _sweep(recipe, changes, sweep, dry_run)
        return
    checked = load_recipe(recipe, changes)
    if preflight:
        print(look(checked, preflight_rows))
        return
    command = ["align", "train", recipe, *changes]
    output = Path(checked.output)
    try:
        with writing_to(output):
            folder = run(checked, source=recipe, command=command, dry_run=dry_run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(output, command, rounds=checked.iterate is not None)) from None
    if not dry_run:
        _show_result(folder)


def _sweep(source: str, overrides: list[str], options: list[str], dry_run: bool) -> None:
    """The runs of a sweep; with ``dry_run`` the plan of the first, and what would be done of each."""
    from align.run import train
    from align.sweep import Point, read_sweep, run_sweep

    points = read_sweep(source, overrides, options)

    def run(point: Point, dry_run: bool = False) -> None:
        with writing_to(Path(point.recipe.output)):
            train(point.recipe, source=source, command=["align", "train", source, *point.overrides], dry_run=dry_run)

    if dry_run:
        run(points[0], dry_run=True)
        print(*points, sep="\n")
        return
    command = ["align", "train", source, *overrides, *(word for option in options for word in ("--sweep", option))]
    try:
        run_sweep(points, source, run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(Path(points[0].recipe.output).parent, command, rounds=True)) from None


def _show_result(run: Path) -> None:
    """The first numbers, and what to look at next."""
    from align.reports.facts import first_use
    from align.reports.measures import headline
    from align.reports.record import read_run

    print(f"done: {run}")
    record = read_run(run)
    measures = headline(record)
    width = max((len(measure.label) for measure in measures), default=0)
    for measure in measures:
        interval = f" ({measure.interval})" if measure.interval else ""
        print(f"  {measure.label:<{width}}  {measure.value}{interval}, n = {measure.n}")
    print(f"report  {run / 'report.html'}")
    if use := first_use(record):
        print("{}\n  {}".format(*use))


def _interrupted(output: Path, command: list[str], *, rounds: bool) -> str:
    """What is saved, and how to go on."""
    from align.tracking.run_folder import RunFolder

    if rounds:
        return f"interrupted: {output} keeps what is done; to go on from there:\n  {shlex.join(command)}"
    checkpoint = RunFolder(output).newest_checkpoint()
    saved = f"{checkpoint} is saved" if checkpoint else "no checkpoint was complete yet"
    return f"interrupted: {saved}; to go on from there:\n  {shlex.join(command)}"
