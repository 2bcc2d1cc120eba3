"""A data set given to a trainer from Python: what it may be, and what is said of rows that cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from align.data.load import Row
from align.data.report import fault_report
from align.data.splits import Split
from align.errors import AlignError

logger = logging.getLogger(__name__)

_UNREAD = {"tools", "chat_template_kwargs", "image", "images"}


def check_dataset(dataset: Any, name: str) -> None:
    """It must have rows that can be counted.

    Raises:
        ValueError: it is not a ``datasets.Dataset``.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{name}: a map-style datasets.Dataset is needed, not {type(dataset).__name__}")


def untokenized_rows(dataset: Dataset, name: str) -> Iterator[Row]:
    """Rows as the readers of ``align.data`` take them.

    Raises:
        ValueError: a column that TRL's trainers read and that is not read here.
    """
    if unread := sorted(_UNREAD & set(dataset.column_names)):
        raise ValueError(f"{name}: columns that are not read here: {', '.join(unread)}")
    return ((name, number, row) for number, row in enumerate(dataset, 1))


def tokenized_dataset(table: Any, tokenized: Any, name: str) -> Dataset:
    """The rows that can be learnt from; the log says why the others cannot.

    Args:
        table, tokenized: what a reader and a tokenizer of ``align.data`` made of the same rows.

    Raises:
        AlignError: no row is left.
    """
    if faults := [*table.faults, *tokenized.faults]:
        logger.warning("%s", fault_report(faults, table.counts["rows"]))
    if not tokenized.rows:
        raise AlignError(f"{name}: no row can be used")
    return Split(table, tokenized).dataset()
