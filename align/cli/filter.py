"""``align filter``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.errors import ConfigError

from .disk import writing_to

if TYPE_CHECKING:
    from align.config.schema import FilterRule


def filter_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Data with a column of scores (align score adds them): JSONL, JSON, CSV, Parquet, a hub id.",
        ),
    ],
    column: Annotated[str, typer.Option("--by", metavar="COLUMN", help="Column of numbers.")],
    keep: Annotated[
        float | None, typer.Option(metavar="FRACTION", help="Keep this share of the rows, the lowest first.")
    ] = None,
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="FROM TO", help="Keep the rows between two quantiles; 0.5 1 is the highest half."),
    ] = None,
    below: Annotated[float | None, typer.Option(metavar="X", help="Keep rows under this value.")] = None,
    above: Annotated[float | None, typer.Option(metavar="X", help="Keep rows over this value.")] = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Keep that share of each group, so that their mixture stays as it is."),
    ] = None,
    quotas: Annotated[
        list[str] | None,
        typer.Option("--quota", metavar="GROUP=FRACTION", help="Another share for one of the groups; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would stay, and write nothing.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("filtered"),
    parquet: Annotated[bool, typer.Option("--parquet", help="Write rows as Parquet, and not as JSONL.")] = False,
) -> None:
    """Keep rows by a column of scores, and say why each of the others goes.

    Writes kept and dropped rows, reasons.jsonl and report.html into a new folder; DATA stays as it is.

        align score pairs.jsonl --with ches_ln --model smollm2-135m-instruct -o scored.jsonl
        align filter scored.jsonl --by ches_ln --keep 0.5 -o kept
    """
    rule = _rule(keep, window, below, above, group, quotas or [])
    from align.data.load import read_rows
    from align.score.filter import contents, read_table
    from align.score.filtered import Filtered, check_free, summary, write_filtered
    from align.tracking.files import make_room

    if not dry_run:
        check_free(output)
        make_room(output)
    rules = {column: rule}
    table = read_table(read_rows(source), rules, lambda name, known: _missing(source, name, known))
    filtered = Filtered.of(source, rules, table)
    if not dry_run:
        with writing_to(output):
            write_filtered(
                output,
                filtered,
                lambda: contents(read_rows(source), table.candidates),
                ".parquet" if parquet else ".jsonl",
            )
    if table.faults:
        from align.data.report import fault_report

        print(fault_report(table.faults, table.rows, None if dry_run else output / "rejected_rows.jsonl"))
    print(summary(filtered))
    print("nothing is written: --dry-run" if dry_run else "   ".join(str(output / name) for name in _written(output)))


def _written(output: Path) -> list[str]:
    return [
        path.name for name in ("report.html", "kept.*", "dropped.*", "reasons.jsonl") for path in output.glob(name)
    ]


def _rule(
    keep: float | None,
    window: tuple[float, float] | None,
    below: float | None,
    above: float | None,
    group: str | None,
    quotas: Sequence[str],
) -> FilterRule:
    from pydantic import ValidationError

    from align.config.explain import model_problems
    from align.config.schema import FilterRule

    data = {
        "keep": keep,
        "window": None if window is None else list(window),
        "below": below,
        "above": above,
        "group": group,
        "quotas": _quotas(quotas) or None,
    }
    try:
        return FilterRule.model_validate({key: value for key, value in data.items() if value is not None})
    except ValidationError as error:
        problems = [
            (f"--{key.replace('quotas', 'quota')}" if key else "rule", what)
            for key, what in model_problems(error, FilterRule, data, {})
        ]
        raise ConfigError("align filter", problems) from None


def _quotas(texts: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    problems = []
    for text in texts:
        name, _, share = text.rpartition("=")
        if name in found:
            problems.append(("--quota", f"{text!r}: {name} has {found[name]:g} already"))
        try:
            found[name] = float(share)
        except ValueError:
            problems.append(("--quota", f"{text!r} is not GROUP=FRACTION, such as de=0.2"))
    if problems:
        raise ConfigError("align filter", problems)
    return found


def _missing(source: str, column: str, known: Sequence[str]) -> str:
    from align.config.explain import nearest
    from align.score.scorers import OF_THE_MODEL

    if column in OF_THE_MODEL:
        return (
            f"{source}: no column {column}; add it, and filter what that writes:\n"
            f"  align score {shlex.quote(source)} --with {column} --model MODEL --output scored.jsonl"
        )
    near = nearest(column, known)
    return f"{source}: no column {column}; " + (f"did you mean {near}?" if near else f"it has {', '.join(known)}")
