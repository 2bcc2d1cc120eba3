"""``align verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from align.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from align.evals.exact.rows import Row

COLOURS = {"pass": "green", "miss": "bold red", "told": "dim"}
WIDTH = 112


def verify(
    device: Annotated[str, typer.Option("--device", help="Where they run: cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[str, typer.Option("--dtype", help="What they compute in: float64 or float32.")] = "float64",
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="This loss, transform, pal or sampler alone; repeatable."),
    ] = None,
) -> None:
    """Train every loss, and run every sampler, in worlds where the truth is known. Exit code 1 on a miss.

    Every answer of these worlds is enumerated, so that nothing is sampled. "exact" comes from a formula, a root or a
    solver in float64; "ours" is where gradient descent on the loss ends, from the worst of several starts; for
    policies both show the mean reward, and "distance" is in total variation. Transformed rewards (lsc, all_of, any_of)
    are what a policy is trained on, with a KL. pal is a model of annotators in two opposed groups: what share of their
    labels it has right. A sampler is run in every way that it can go, so "ours" is its mean and no estimate of it.
    Rows that say "told" have no tolerance.
    """
    import time

    from rich.console import Console

    from align.evals.exact.targets import TARGETS
    from align.evals.exact.verify import make_stack, names
    from align.evals.exact.verify import verify as rows_of

    try:
        chosen, stack = names(only or ()), make_stack(device, dtype)
    except ValueError as error:
        raise ConfigError("align verify", [("options", str(error))]) from None
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH)
    console.print("Of a policy, exact and ours are mean rewards; distance is in total variation.\n", style="dim")
    began, rows = time.monotonic(), []
    with console.status("") as status:
        for count, name in enumerate(chosen, 1):
            status.update(f"{count}/{len(chosen)} {name}")
            found = rows_of(name, stack)
            target = TARGETS.get(name)
            _show(console, name, f"{target.kind}: {target.statement}" if target else "no target", found)
            rows.extend(found)
    counts = {status: sum(row.status == status for row in rows) for status in COLOURS}
    console.print(
        f"{len(chosen)} methods, {dtype} on {device}: {counts['pass']} comparisons passed, {counts['miss']} missed, "
        f"{counts['told']} told without a tolerance; {time.monotonic() - began:.0f} s"
    )
    if counts["miss"]:
        raise typer.Exit(1)


def _show(console: Console, name: str, target: str, rows: list[Row]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text.assemble((name, "bold"), "  ", (target, "dim")))
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("  quantity", ratio=1)
    for heading, width in (("exact", 10), ("ours", 10), ("distance", 8), ("tolerance", 9)):
        table.add_column(heading, justify="right", width=width, no_wrap=True)
    table.add_column("", width=4)
    for row in rows:
        bound = "" if row.relation == "=" else f"{row.relation} "
        table.add_row(
            Text(f"  {row.quantity}"),
            f"{bound}{row.exact:.4g}",
            f"{row.ours:.4g}",
            f"{row.distance:.1e}",
            "" if row.tolerance is None else f"{row.tolerance:.0e}",
            Text(row.status, COLOURS[row.status]),
        )
    console.print(table)
    console.print()
