"""``align train``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

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
) -> None:
    """Train, evaluate before and after, and write the report.

    The same command goes on with a run that was interrupted. One YAML file holds the run; keys can be set behind it:

        align train quickstart training.max_steps=20 output=runs/short
    """
    from align.config.load import load_recipe
    from align.run import train as run

    changes = overrides or []
    checked = load_recipe(recipe, changes)
    command = ["align", "train", recipe, *changes]
    output = Path(checked.output)
    try:
        with writing_to(output):
            folder = run(checked, source=recipe, command=command, dry_run=dry_run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(output, command)) from None
    if not dry_run:
        _show_result(folder)


def _show_result(run: Path) -> None:
    """The first numbers, and what to look at next."""
    from align.reports.facts import headline, is_pal, trains_reward
    from align.reports.record import read_run

    print(f"done: {run}")
    record = read_run(run)
    measures = headline(record)
    width = max((len(measure.label) for measure in measures), default=0)
    for measure in measures:
        interval = f" ({measure.interval})" if measure.interval else ""
        print(f"  {measure.label:<{width}}  {measure.value}{interval}, n = {measure.n}")
    print(f"report  {run / 'report.html'}")
    if trains_reward(record.recipe):
        print(f"score   align score DATA --with {shlex.quote(str(run / 'model'))} --output OUT.jsonl")
    elif not is_pal(record.recipe):
        print(f"chat    align generate --model {shlex.quote(str(run))} --chat")


def _interrupted(output: Path, command: list[str]) -> str:
    """What is saved, and how to go on."""
    from align.tracking.run_folder import RunFolder

    checkpoint = RunFolder(output).newest_checkpoint()
    saved = f"{checkpoint} is saved" if checkpoint else "no checkpoint was complete yet"
    return f"interrupted: {saved}; to go on from there:\n  {shlex.join(command)}"
