"""``align models``: what is done with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .disk import writing_to

app = typer.Typer(help="Extrapolate between models; fit a PAL model to new annotators.", no_args_is_help=True)


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


@app.command()
def fit_annotators(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A PAL model: its run, or its folder.")],
    source: Annotated[
        str, typer.Argument(metavar="DATA", help="Judgements of new annotators: prompt, chosen, rejected, annotator.")
    ],
) -> None:
    """Fit the weights of new annotators to a few of their judgements (PAL, arXiv:2406.08469).

    Nothing else of MODEL changes: the weights are kept in its folder, in annotators.json, and the annotators are then
    chosen as those of training are:

        align models fit-annotators runs/pal eve.jsonl
        align score DATA --with runs/pal@annotator:eve
    """
    from align.annotators import fit_annotators as fit

    found, left_out, ties = fit(model, source)
    width = max(len(one.name) for one in found)
    for one in found:
        weights = " ".join(f"{weight:.2f}" for weight in one.weights)
        shares = f"{one.before:.0%} of them ranked right by the mean, {one.after:.0%} now"
        print(f"{one.name:<{width}}  weights {weights}  from {one.judgements:,} judgements, {shares}")
    if left_out:
        print(f"{left_out:,} judgements of annotators whom the model was trained on: left out")
    if ties:
        print(f"{ties:,} tie{'s' * (ties != 1)}: left out, and annotators who have no other judgements with them")
