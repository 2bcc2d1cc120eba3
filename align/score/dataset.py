"""Scoring and filtering a ``datasets.Dataset`` in a script of one's own.

scored = ches_scores(dataset, model, tokenizer)
kept = filter_by(scored, "ches_ln", keep=0.5)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from align.errors import AlignError
from align.models.load import LoadedModel
from align.tracking.progress import progress

from .policy import OF_PAIRS, PolicyScorer
from .run import each_warning_once, score_rows
from .scorers import Policy
from .select import select
from .shards import Line

logger = logging.getLogger(__name__)

PART = 1024
"""Rows that are read at once, and sorted by length."""


def ches_scores(
    dataset: Dataset,
    model: Any,
    tokenizer: Any,
    *,
    columns: Sequence[str] = ("ches", "ches_ln"),
    max_length: int | None = None,
    batch_size: int = 16,
) -> Dataset:
    """The data set with ``row_id``, the columns, and ``one_token`` where CHES is asked for.

    A row that cannot be scored stays, with null in the new columns; a warning names these rows and says why.

    Args:
        dataset: pairs, ``[prompt,] chosen, rejected``, as text or as messages.
        model: a causal model, or one with a LoRA adapter; it is left as it was.
        tokenizer: its tokenizer; prompts and answers are tokenised as for training.
        columns: of ``ches``, ``ches_ln``, ``last_inner``, ``edit``.
        max_length: limit of prompt and answer, tokens; None is the model's own.
        batch_size: pairs of one forward pass.

    Raises:
        AlignError: no ``Dataset``, an unknown column, one that the data has, or no row that can be scored.
    """
    _check_dataset(dataset)
    if not isinstance(model, nn.Module) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        given = f"model is a {type(model).__name__}, tokenizer a {type(tokenizer).__name__}"
        raise AlignError(f"{given}: load both first, as with from_pretrained of transformers")
    for name, limit in (("batch_size", batch_size), ("max_length", max_length)):
        if limit is not None and limit < 1:
            raise AlignError(f"{name} is {limit}: it must be 1 or more")
    unknown = [name for name in columns if name not in OF_PAIRS]
    if unknown or not columns:
        raise AlignError(f"columns {list(columns)}: choose from {', '.join(OF_PAIRS)}")
    for name in columns:
        if name in dataset.column_names:
            raise AlignError(
                f"there is a column {name} already: leave {name} out of columns, or rename that of the data"
            )
    policy = Policy.of("the model", LoadedModel(model, tokenizer, ""), max_length, batch_size)
    scorer = PolicyScorer({name: name for name in columns}, policy)
    rows = enumerate((("dataset", n, row) for n, row in enumerate(dataset.with_format(None), start=1)), start=1)
    lines: list[Line] = []
    with progress("scoring", len(dataset)) as advance, each_warning_once():
        while part := list(islice(rows, PART)):
            lines += score_rows([scorer], part, batch_size, advance)
    _tell_faults(lines)
    for name in ["row_id", *next(line["columns"] for line in lines if "columns" in line)]:
        values = [line.get("row_id") if name == "row_id" else line.get("columns", {}).get(name) for line in lines]
        if name in dataset.column_names:  # of an earlier pass, and equal where both are known
            values = [old if new is None else new for old, new in zip(dataset[name], values, strict=True)]
            dataset = dataset.remove_columns(name)
        dataset = dataset.add_column(name, values)
    return dataset


def _check_dataset(dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise AlignError(f"a {type(dataset).__name__} is no datasets.Dataset: name one split, and read it whole")


def _tell_faults(lines: Sequence[Line]) -> None:
    faults = [
        f"row {line['row']}: {one['field']}: {one['reason'].replace('--max-length', 'max_length')}"
        for line in lines
        for one in line.get("faults", ())
    ]
    if not any("columns" in line for line in lines):
        raise AlignError(f"no row can be scored; the first: {faults[0] if faults else 'there is none'}")
    if faults:
        more = f"\n  and {len(faults) - 10:,} more" if len(faults) > 10 else ""
        shown = "\n  ".join(faults[:10])
        logger.warning("%d of %d rows have no score:\n  %s%s", len(faults), len(lines), shown, more)


def filter_by(
    dataset: Dataset,
    column: str,
    *,
    keep: float | None = None,
    below: float | None = None,
    above: float | None = None,
    groups: str | None = None,
) -> Dataset:
    """The rows whose score is lowest, or under and over thresholds, in the order of the data.

    Rows without a score are never kept; a warning says how many.

    Args:
        column: numbers, or null or NaN where there is no score.
        keep, below, above: as in ``select.select``.
        groups: a column; ``keep`` is then a share of each of its groups.

    Raises:
        AlignError: no ``Dataset``, no such column, a value that is no number, no row with a score, or none is kept.
        ValueError: as ``select.select``.
    """
    _check_dataset(dataset)
    for name in filter(None, (column, groups)):
        if name not in dataset.column_names:
            raise AlignError(f"no column {name}: there are {', '.join(dataset.column_names)}")
    plain = dataset.with_format(None)
    scores = list(plain[column])
    for place, score in enumerate(scores):
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or math.isinf(score)):
            raise AlignError(f"column {column}, row {place + 1}: {str(score)[:40]!r} is not a finite number")
    places = [place for place, score in enumerate(scores) if score is not None and not math.isnan(score)]
    if not places:
        raise AlignError(f"no row has a number in column {column}")
    if len(places) < len(dataset):
        logger.warning("%d of %d rows have no %s and are left out", len(dataset) - len(places), len(dataset), column)
    named = None if groups is None else list(plain[groups])
    found = select(
        [scores[place] for place in places],
        keep=keep,
        below=below,
        above=above,
        groups=None if named is None else [str(named[place]) for place in places],
    )
    if not found.kept:
        known = [scores[place] for place in places]
        raise AlignError(f"no row is kept: {column} lies between {min(known):g} and {max(known):g}")
    return dataset.select([places[position] for position in found.kept])
