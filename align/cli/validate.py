"""``align validate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.errors import AlignError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from align.data.rows import CompletionTable, PairTable


def validate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|DATA",
            help="Recipe (.yaml, or a shipped name), or data: JSONL, JSON, CSV, Parquet, a folder, a hub id, "
            "align:NAME/SPLIT.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="For data: the model whose tokenizer counts the tokens.")
    ] = None,
) -> None:
    """Check a recipe with its data, or data alone, and print the whole picture.

    Exit code 1 when more rows are bad than the recipe's data.max_bad_fraction allows (0.05 for data alone).
    """
    from align.config.load import shipped_recipes

    if source.endswith((".yaml", ".yml")) or (source in shipped_recipes() and not Path(source).exists()):
        _validate_recipe(source)
    else:
        _validate_data(source, model)


def _validate_recipe(source: str) -> None:
    from align.config.load import load_recipe
    from align.models.load import load_tokenizer

    recipe = load_recipe(source)
    print(f"{source}: no problems in the recipe")
    tokenizer = load_tokenizer(recipe.model.name, trust_remote_code=recipe.model.trust_remote_code)
    for data in filter(None, (recipe.data.train, recipe.data.eval)):
        table = _read(data, completions=recipe.method == "sft")
        _show(table, tokenizer, recipe.data.max_length, recipe.data.max_bad_fraction)


def _validate_data(source: str, model: str | None) -> None:
    from align.config.schema import DataSpec
    from align.models.load import load_tokenizer

    tokenizer = load_tokenizer(model) if model else None
    limit = DataSpec(train=source).max_bad_fraction
    _show(_read(source, completions=_holds_completions(source)), tokenizer, None, limit)


def _holds_completions(source: str) -> bool:
    """Whether the first row that can be read is an answer to imitate, and not a comparison."""
    from align.data.load import read_rows

    first = next((row for _, _, row in read_rows(source) if isinstance(row, dict)), {})
    return bool({"completion", "messages", "text"} & first.keys()) and not {"chosen", "rejected"} & first.keys()


def _read(source: str, completions: bool) -> PairTable | CompletionTable:
    from align.data.completions import read_completions
    from align.data.pairs import read_pairs

    return read_completions(source) if completions else read_pairs(source)


def _show(
    table: PairTable | CompletionTable,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
    max_bad_fraction: float,
) -> None:
    from align.data.report import check_fraction, describe
    from align.data.rows import PairTable
    from align.data.tokenize import tokenize_completions, tokenize_pairs

    print()
    print(describe(table, tokenizer, max_length))
    faults = list(table.faults)
    if tokenizer is not None and isinstance(table, PairTable):
        faults += tokenize_pairs(table.rows, tokenizer, max_length).faults
    elif tokenizer is not None:
        faults += tokenize_completions(table.rows, tokenizer, max_length).faults
    try:
        check_fraction(faults, table.counts["rows"], max_bad_fraction)
    except AlignError as error:  # its other lines name the faults, which stand above already
        raise AlignError(str(error).splitlines()[-1]) from None
