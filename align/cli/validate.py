"""``align validate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated

import typer

from align.errors import AlignError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from align.config.schema import DataSpec
    from align.data.groups import GroupRules
    from align.data.prompts import PromptRules
    from align.data.rewards import RewardRules
    from align.data.rows import CompletionTable, Fault, PairTable
    from align.data.splits import DataKind, Split


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
        str | None,
        typer.Option("--model", "-m", help="For data: the model whose tokenizer counts the tokens (limit: 1,024)."),
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
        print()
        kind, rules = (recipe.data_kind, recipe.data_rules) if data == recipe.data.train else recipe.held_out
        split = _show_tokenized(data, tokenizer, recipe.data, kind, rules)
        if recipe.data.filter is not None and data == recipe.data.train:
            from align.score.training import TrainingFilter

            print(f"\ndata.filter\n{indent(TrainingFilter(recipe, split).describe(), '  ')}")


def _validate_data(source: str, model: str | None) -> None:
    from align.config.schema import DataSpec
    from align.data.completions import read_completions
    from align.data.pairs import read_pairs
    from align.data.thumbs import read_thumbs

    kind = _kind_of(source)
    defaults = DataSpec(train=source)
    if model:
        from align.models.load import load_tokenizer

        _show_tokenized(source, load_tokenizer(model), defaults, kind)
        return
    readers: dict[DataKind, Callable[[str], PairTable | CompletionTable]] = {
        "pairs": read_pairs,
        "completions": read_completions,
        "thumbs": read_thumbs,
    }
    table = readers[kind](source)
    print(_described(table))
    _check(table.faults, table.counts["rows"], defaults.max_bad_fraction)


def _kind_of(source: str) -> DataKind:
    """What the first row that can be read is: a comparison, an answer with a thumb, or one to imitate."""
    from align.data.load import read_rows

    first = next((row for _, _, row in read_rows(source) if isinstance(row, dict)), {})
    if {"chosen", "rejected"} & first.keys() or not {"completion", "messages", "text"} & first.keys():
        return "pairs"
    return "thumbs" if {"completion", "label"} <= first.keys() else "completions"


def _show_tokenized(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    spec: DataSpec,
    kind: DataKind,
    rules: PromptRules | RewardRules | GroupRules | None = None,
) -> Split:
    from align.data.splits import read_split

    split = read_split(source, tokenizer, spec.max_length, kind=kind, rules=rules)
    print(_described(split.table, tokenizer, spec.max_length))
    _check(split.faults, split.table.counts["rows"], spec.max_bad_fraction)
    split.check(spec.max_bad_fraction)
    return split


def _described(
    table: PairTable | CompletionTable,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
) -> str:
    from align.data.groups import GroupTable, describe_groups
    from align.data.prompts import PromptTable, describe_prompts
    from align.data.report import describe
    from align.data.rewards import RatedTable, describe_ratings
    from align.data.thumbs import ThumbTable, describe_thumbs

    if isinstance(table, GroupTable):
        return describe_groups(table, tokenizer, max_length)
    if isinstance(table, PromptTable):
        return describe_prompts(table, tokenizer)
    if isinstance(table, RatedTable):
        return describe_ratings(table, tokenizer, max_length)
    if isinstance(table, ThumbTable):
        return describe_thumbs(table, tokenizer, max_length)
    return describe(table, tokenizer, max_length)


def _check(faults: Sequence[Fault], rows: int, max_bad_fraction: float) -> None:
    """Stop where too many rows are bad; the faults themselves stand in the picture already."""
    from align.data.report import check_fraction

    try:
        check_fraction(faults, rows, max_bad_fraction)
    except AlignError as error:
        raise AlignError(str(error).splitlines()[-1]) from None
