"""``align recipes``: what ships, how to copy it, and what may stand in one."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from align.errors import AlignError

from . import logic
from .disk import writing_to

app = typer.Typer(help="List, show and copy recipes; their schema, methods and logic.", no_args_is_help=True)
app.command()(logic.logic)
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe (align recipes ls).")]


@app.command()
def ls() -> None:
    """List the shipped recipes."""
    from align.config.load import shipped_recipes, shipped_text

    names = shipped_recipes()
    width = max((len(name) for name in names), default=0)
    for name in names:
        print(f"{name:<{width}}  {_purpose(shipped_text(name))}")


@app.command()
def show(name: Name) -> None:
    """Print a shipped recipe."""
    from align.config.load import shipped_text

    print(shipped_text(name), end="")


@app.command()
def cp(
    name: Name,
    destination: Annotated[
        Path | None, typer.Argument(metavar="DEST", help="File or folder; ./NAME.yaml when not given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Copy a shipped recipe, to edit it."""
    from align.config.load import shipped_text

    text = shipped_text(name)
    target = destination or Path(f"{name}.yaml")
    target = target / f"{name}.yaml" if target.is_dir() else target
    try:
        with writing_to(target), target.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise AlignError(f"{target} is there already; --force writes over it") from None
    except FileNotFoundError:
        raise AlignError(f"{target.parent}: no such folder") from None
    print(f"{target}\n  align train {target} --dry-run")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors. It takes some seconds: TRL's fields are in it."""
    import json

    from align.config.json_schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


@app.command()
def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the page docs/methods.md.")] = False,
) -> None:
    """List the losses by kind: formula, reference, soft labels, settings with defaults, paper, what each is for."""
    from align.losses.catalogue import KINDS
    from align.reports.methods import (
        NOTATION,
        NOTATION_OF,
        losses_of,
        methods_page,
        reference_of,
        settings_of,
        soft_labels_of,
    )

    if markdown:
        print(methods_page(), end="")
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for line in NOTATION:
        console.print(escape(line.replace("`", "")), highlight=False)
    console.print()
    for kind, what in KINDS.items():
        table = Table(box=None, pad_edge=False, show_header=False)
        for info in losses_of(kind):
            settings = [] if info.default_beta is None else [("beta", f"{info.default_beta:g}")]
            facts = " · ".join(
                [
                    f"reference: {reference_of(info)}",
                    f"soft labels: {soft_labels_of(info)}",
                    *(f"{name} {default}" for name, default in settings + settings_of(info)),
                    info.paper,
                ]
            )
            table.add_row(info.name, escape(f"{info.formula}\n{info.purpose}\n") + f"[dim]{escape(facts)}[/dim]")
        if table.row_count:
            console.print(f"[bold]{kind}[/bold]: {what}", highlight=False)
            if kind in NOTATION_OF:
                console.print(escape(NOTATION_OF[kind].replace("`", "")), highlight=False)
            console.print(table, highlight=False)
            console.print()
    print("method: sft trains on answers alone (TRL's SFTTrainer); as a term of losses, sft is the chosen answer's.")


def _purpose(text: str) -> str:
    """The first sentence of the comment that a recipe begins with."""
    comment = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in comment).split(". ")[0].rstrip(".")
