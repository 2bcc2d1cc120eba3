"""Scoring and filtering a ``datasets.Dataset`` in a script of one's own.

scored = ches_scores(dataset, model, tokenizer)
kept = filter_by(scored, "ches_ln", keep=0.5)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any

from datasets import Dataset
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedTokenizerBase

from align.config.explain import model_problems
from align.config.schema import FilterRule
from align.data.fields import FieldError
from align.errors import AlignError
from align.models.load import LoadedModel
from align.tracking.progress import progress

from .policy import OF_PAIRS, PolicyScorer
from .run import MOVED, OTHER_FLAGS, no_warning_of_batches, score_rows
from .scorers import Policy
from .select import finite_number, group_name, standing
from .shards import Line

logger = logging.getLogger(__name__)

PART = 1024
"""Rows that are read at once, and sorted by length."""
SHOWN = 10
"""Rows whose reasons are told."""


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

    A row that cannot be scored stays, with null in the new columns; a warning names these rows and says why. So are
    answers told that ``max_length`` cuts. ``row_id`` and ``one_token`` may be there of an earlier pass, and stay; a
    warning says how many ``one_token`` would be others.

    Args:
        dataset: pairs, ``[prompt,] chosen, rejected``, as text or as messages.
        model: a causal model, or one with a LoRA adapter; it is left as it was.
        tokenizer: its tokenizer; prompts and answers are tokenised as for training.
        columns: of ``ches``, ``ches_ln``, ``last_inner``, ``edit``.
        max_length: limit of prompt and answer, tokens; None is the model's own.
        batch_size: pairs of one forward pass.

    Raises:
        AlignError: no ``Dataset``, no causal model, an unknown column, one that the data has, or no row that can be
            scored.
    """
    _check_dataset(dataset)
    if not isinstance(model, nn.Module) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        given = f"model is a {type(model).__name__}, tokenizer a {type(tokenizer).__name__}"
        raise AlignError(f"{given}: load both first, as with from_pretrained of transformers")
    for name, limit in (("batch_size", batch_size), ("max_length", max_length)):
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise AlignError(f"{name} is {limit!r}: it must be a whole number, 1 or more")
    if isinstance(columns, str) or not columns or not set(columns) <= set(OF_PAIRS):
        raise AlignError(f"columns is {columns!r}: it must be a list of one or more of {', '.join(OF_PAIRS)}")
    if len(set(columns)) < len(columns):
        raise AlignError(f"columns is {columns!r}: name each once")
    for name in columns:
        if name in dataset.column_names:
            raise AlignError(
                f"there is a column {name} already: leave {name} out of columns, or rename that of the data"
            )
    policy = Policy.of("the model", LoadedModel(model, tokenizer, ""), max_length, batch_size)
    scorer = PolicyScorer({name: name for name in columns}, policy)
    rows = ((place, ("dataset", place, row)) for place, row in enumerate(dataset.with_format(None)))
    lines: list[Line] = []
    with progress("scoring", len(dataset)) as advance, no_warning_of_batches():
        while part := list(islice(rows, PART)):
            lines += score_rows([scorer], part, batch_size, advance)
    _tell(lines)
    for name in ["row_id", *next(line["columns"] for line in lines if "columns" in line)]:
        values = [line.get("row_id") if name == "row_id" else line.get("columns", {}).get(name) for line in lines]
        if name in dataset.column_names:  # of an earlier pass; a row_id is equal where both are known
            both = list(zip(dataset[name], values, strict=True))
            if differ := sum(None not in (old, new) and old != new for old, new in both):
                logger.warning("%d of %d pairs %s", differ, len(both), OTHER_FLAGS)
            if not all(old is None or isinstance(old, type(new)) for old, new in both if new is not None):
                continue  # a one_token that is not of true and false takes no values of ours
            values = [new if old is None else old for old, new in both]
            dataset = dataset.remove_columns(name)
        dataset = dataset.add_column(name, values)
    return dataset


def _check_dataset(dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise AlignError(f"a {type(dataset).__name__} is no datasets.Dataset: name one split, and read it whole")


def _tell(lines: Sequence[Line]) -> None:
    """What became of all rows, once."""
    faults = []
    for line in lines:
        named = f" (row_id {line['row_id']})" if "row_id" in line else ""
        for one in line.get("faults", ()):
            reason = one["reason"].replace("--max-length", "max_length")
            faults.append(f"dataset[{line['row']}]{named}: {one['field']}: {reason}")
    if not any("columns" in line for line in lines):
        raise AlignError(f"no row can be scored; the first: {faults[0] if faults else 'there is none'}")
    if faults:
        without = sum("columns" not in line for line in lines)
        more = f"\n  and {len(faults) - SHOWN:,} more" if len(faults) > SHOWN else ""
        logger.warning("%d of %d rows have no score:\n  %s%s", without, len(lines), "\n  ".join(faults[:SHOWN]), more)
    cut, moved = (sum(line.get(name, 0) for line in lines) for name in ("cut", "moved"))
    if cut:
        logger.warning("%d answers are too long for max_length: the beginning of each is scored", cut)
    if moved:
        logger.warning("%d of %d rows %s", moved, len(lines), MOVED)


def filter_by(
    dataset: Dataset,
    column: str,
    *,
    keep: float | None = None,
    window: tuple[float, float] | None = None,
    below: float | None = None,
    above: float | None = None,
    group: str | None = None,
) -> Dataset:
    """The rows that a rule keeps, in the order of the data: as ``align filter``, whose options these are.

    Rows without a number are never kept; a warning says how many.

    Args:
        column: numbers, or null where there is no score.
        keep, window, below, above, group: as in ``align.config.schema.FilterRule``.

    Raises:
        AlignError: no ``Dataset``, no such column, no rule or several, no row with a number, or none is kept.
    """
    _check_dataset(dataset)
    ends: Any = list(window) if isinstance(window, tuple) else window
    given = {"keep": keep, "window": ends, "below": below, "above": above, "group": group}
    rule = _rule({name: value for name, value in given.items() if value is not None})
    for name in filter(None, (column, group)):
        if name not in dataset.column_names:
            raise AlignError(f"no column {name}: there are {', '.join(dataset.column_names)}")
    places, scores, without = list[int](), list[float](), list[str]()
    plain = dataset.with_format(None)
    for place, value in enumerate(plain[column]):
        try:
            scores.append(finite_number(column, value))
            places.append(place)
        except FieldError as error:
            without.append(f"dataset[{place}]: {error}")
    if not places:
        raise AlignError(f"no row has a number in column {column}; the first: {next(iter(without), 'there is none')}")
    if without:
        told = "%d of %d rows have no %s and are left out; the first: %s"
        logger.warning(told, len(without), len(dataset), column, without[0])
    groups = None if group is None else [group_name(value) for value in plain.select(places)[group]]
    kept = [place for place, (stays, _) in zip(places, standing(column, scores, rule, groups), strict=True) if stays]
    if not kept:
        raise AlignError(f"no row is kept: {column} lies between {min(scores):g} and {max(scores):g}")
    return dataset.select(kept)


def _rule(given: dict[str, Any]) -> FilterRule:
    try:
        return FilterRule.model_validate(given)
    except ValidationError as error:
        problems = model_problems(error, FilterRule, given, {})
        raise AlignError("; ".join(f"{name or 'filter_by'} {problem}" for name, problem in problems)) from None
