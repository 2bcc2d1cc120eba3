"""``align models``: what is done with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .disk import writing_to

app = typer.Typer(help="Extrapolate between models.", no_args_is_help=True)


@app.callback()
def _group() -> None: ...  # so that a single command keeps its name


@app.command()
def expo(
    init: Annotated[str, typer.Argument(metavar="INIT", help="The model that training began from.")],
    aligned: Annotated[str, typer.Argument(metavar="ALIGNED", help="The model that training ended in.")],
    alpha: Annotated[float, typer.Option(help="0 is INIT, 1 ALIGNED, 1.1 to 2 beyond it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must not hold anything yet.")],
) -> None:
    """Write INIT + ALPHA (ALIGNED - INIT), all weights alike (ExPO, arXiv:2404.16792).

    Both are runs, folders, packaged names or hub ids: two causal models, or two reward models. Adapters are merged
    first. Choose alpha on held-out data: it is no safer than any other hyper-parameter.
    """
    from align.models.expo import extrapolate

    with writing_to(output):
        made = extrapolate(init, aligned, alpha=alpha, output=output)
    print(
        f"{made.tensors:,} tensors, {made.parameters:,} parameters; training moved a weight by {made.distance:.3g} on"
    )
    print(f"average, and this moves it {alpha:g} times as far")
    print(output)
