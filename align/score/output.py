"""The input's rows with their new columns: as JSONL, or as Parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from align.errors import AlignError, ConfigError

SUFFIXES = (".jsonl", ".parquet")
PARQUET_ROWS = 4096

Rows = Callable[[], Iterator[dict[str, Any]]]
"""Gives all rows, from the first, every time it is called."""


def check_suffix(output: Path) -> None:
    """Stop where the name says no format.

    Raises:
        ConfigError: it ends in neither.
    """
    if output.suffix not in SUFFIXES:
        raise ConfigError("align score", [("--output", f"{output}: end it in {' or '.join(SUFFIXES)}")])


def write_rows(output: Path, rows: Rows) -> None:
    """Write the file in one step: a kill leaves none, or the old one.

    Raises:
        AlignError: Parquet, and a column whose values are of several types.
    """
    partial = output.with_name(f".{output.name}.partial")  # the same in the call that goes on after a kill
    try:
        if output.suffix == ".parquet":
            _write_parquet(partial, rows)
        else:
            with partial.open("w", encoding="utf-8") as file:
                # Parquet may hold dates, decimals and bytes, which JSON has not: they are written as text.
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows())
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _write_parquet(path: Path, rows: Rows) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        schemas = [pa.Table.from_pylist(_whole(part)).schema for part in _parts(rows())]
        schema = pa.unify_schemas(schemas, promote_options="permissive")
        with pq.ParquetWriter(path, schema) as writer:
            for part in _parts(rows()):
                writer.write_table(pa.Table.from_pylist(part, schema=schema))
    except pa.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise AlignError(f"Parquet takes one type a column ({reason}): name an output that ends in .jsonl") from error


def _parts(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while part := list(islice(rows, PARQUET_ROWS)):
        yield part


def _whole(part: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a first one that has every key: pyarrow takes the columns from the first."""
    keys = dict.fromkeys(key for row in part for key in row)
    return [dict.fromkeys(keys) | part[0], *part[1:]]
