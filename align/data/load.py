"""Rows from files, folders, saved datasets, the hub and the package, one at a time."""

from __future__ import annotations

import csv
import gzip
import importlib.resources
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from align.errors import AlignError

from .rows import CompletionTable, Fault, PairTable

Row = tuple[str, int, dict[str, Any] | Fault]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
NOT_UTF8 = "not UTF-8: save the file as UTF-8"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def read_rows(source: str) -> Iterator[Row]:
    """Yield ``(file, row, content)`` for every row; content is a Fault where the row itself cannot be read.

    Args:
        source: a ``.jsonl``, ``.json`` (a list of objects), ``.csv`` (the first line names the columns; all cells
            are text but ``strength``, ``preference``, ``margin`` and ``preference_strength``) or ``.parquet`` file,
            the first three also with ``.gz``; a folder of such files, read in the order of their paths; a folder
            written by ``datasets`` (``save_to_disk``); a hub id ``owner/name`` or ``owner/name:split``; or
            ``align:NAME/SPLIT``, data that comes with the package.

    Rows count from 1; in a JSONL file the row is the line, so that an editor finds it, and blank lines are no rows.

    Raises:
        AlignError: nothing is there, it is of no known kind, it cannot be read as what it claims to be, or it
            holds no rows. Raised at the call where the source is missing, while reading otherwise.
    """
    if source.startswith("align:"):
        rows = _read_file(_packaged(source), source)
    elif Path(source).is_dir():
        rows = _read_folder(Path(source))
    elif Path(source).is_file():
        rows = _read_file(Path(source), source)
    elif _HUB_ID.fullmatch(source) and not source.endswith(SUFFIXES):
        rows = _read_hub(source)
    else:
        raise AlignError(f"{source}: no such file or folder (looked from {Path.cwd()}): check the path")
    return _with_rows(source, rows)


def usable(rows: Iterable[Row], table: PairTable | CompletionTable) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The rows that could be read; the others go to the table's faults, and its count says how many there were."""
    for file, number, row in rows:
        table.counts["rows"] += 1
        if isinstance(row, Fault):
            table.faults.append(row)
        else:
            yield file, number, row


def _with_rows(source: str, rows: Iterator[Row]) -> Iterator[Row]:
    empty = True
    try:
        for row in rows:
            empty = False
            yield row
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise AlignError(f"{source}: cannot be read ({error}): check the file and its permissions") from error
    if empty:
        raise AlignError(f"{source}: empty: it has no rows")


def _packaged(source: str) -> Path:
    folder = Path(str(importlib.resources.files("align.recipes") / "data"))
    path = folder / f"{source.removeprefix('align:').replace('/', '_')}.jsonl"
    if not path.is_file():
        names = sorted("align:" + "/".join(known.stem.rsplit("_", 1)) for known in folder.glob("*_*.jsonl"))
        raise AlignError(f"{source}: no such data in the package; it has {', '.join(names) or 'none'}")
    return path


def _read_folder(folder: Path) -> Iterator[Row]:
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        raise AlignError(f"{folder}: has splits: name one: {', '.join(str(folder / split) for split in splits)}")
    if (folder / "state.json").exists():
        return _read_saved(folder)
    paths = (path for path in folder.rglob("*") if path.name.lower().endswith(SUFFIXES) and path.is_file())
    files = sorted(path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not files:
        raise AlignError(f"{folder}: no data in this folder: looked for {', '.join(SUFFIXES)}")
    return (row for path in files for row in _read_file(path, str(path)))


def _read_file(path: Path, name: str) -> Iterator[Row]:
    suffixes = path.name.lower().removesuffix(".gz")
    if suffixes.endswith(".jsonl"):
        return _read_jsonl(path, name)
    if suffixes.endswith(".json"):
        return _read_json(path, name)
    if suffixes.endswith(".csv"):
        return _read_csv(path, name)
    if path.name.lower().endswith(".parquet"):
        return _read_parquet(path, name)
    raise AlignError(f"{name}: unknown kind of file: use one of {', '.join(SUFFIXES)}")


def _lines(path: Path) -> Iterator[bytes]:
    """Lines without the byte-order mark that spreadsheets write."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for index, line in enumerate(file):
            yield line.removeprefix(b"\xef\xbb\xbf") if index == 0 else line


def _read_jsonl(path: Path, name: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            yield name, number, _object(name, number, json.loads(line.decode()))
        except UnicodeDecodeError:
            yield name, number, Fault(name, number, "line", NOT_UTF8, line.decode(errors="replace").rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            yield name, number, Fault(name, number, "line", f"broken JSON: {error}", line.decode().rstrip("\r\n"))


def _read_json(path: Path, name: str) -> Iterator[Row]:
    try:
        rows = json.loads(b"".join(_lines(path)).decode())
    except UnicodeDecodeError as error:
        raise AlignError(f"{name}: {NOT_UTF8} (byte {error.start:,})") from error
    except (ValueError, RecursionError) as error:
        hint = "one object per line? then name it .jsonl" if "Extra data" in str(error) else "fix the file"
        raise AlignError(f"{name}: broken JSON: {error}: {hint}") from error
    if not isinstance(rows, list):
        raise AlignError(f"{name}: not a list of rows [{{...}}, ...]: for one row per line name it .jsonl")
    for number, row in enumerate(rows, start=1):
        yield name, number, _object(name, number, row)


def _object(name: str, number: int, row: Any) -> dict[str, Any] | Fault:
    if isinstance(row, dict):
        return row
    return Fault(name, number, "line", f"a {type(row).__name__}, not an object with named fields", row)


def _read_csv(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is less than a long dialogue
    # A byte that is not UTF-8 becomes a surrogate, so that the fault keeps its row where a record spans lines.
    reader = csv.reader(line.decode(errors="surrogateescape") for line in _lines(path))
    header = next(reader, [])
    for number, cells in enumerate((cells for cells in reader if cells), start=1):
        yield name, number, _csv_row(name, number, header, cells)


def _csv_row(name: str, number: int, header: list[str], cells: list[str]) -> dict[str, Any] | Fault:
    if any(not _is_unicode(cell) for cell in cells):
        shown = [cell.encode(errors="surrogateescape").decode(errors="replace") for cell in cells]
        return Fault(name, number, "line", NOT_UTF8, shown)
    if len(cells) != len(header):
        reason = f"{len(cells)} cells under {len(header)} column names: put quotes around a cell that holds commas"
        return Fault(name, number, "line", reason, cells)
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for field in ("strength", "preference", "margin", "preference_strength"):
        cell = row.pop(field, "").strip()
        if cell:
            try:
                row[field] = float(cell)
            except ValueError:
                row[field] = cell
    return row


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    # Here and below: reading a JSONL file must not cost the import of pyarrow and datasets.
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield name, number, row
    except pa.ArrowException as error:
        raise AlignError(f"{name}: not a readable Parquet file ({_first_line(error)}): export it again") from error


def _read_saved(folder: Path) -> Iterator[Row]:
    from datasets import load_from_disk

    for number, row in enumerate(load_from_disk(str(folder)), start=1):
        yield str(folder), number, row


def _read_hub(source: str) -> Iterator[Row]:
    from datasets import Dataset, load_dataset

    hub_id, _, split = source.partition(":")
    try:
        loaded = load_dataset(hub_id, split=split or None)
    except Exception as error:  # the hub's client raises errors of many libraries, and all mean: no data
        raise AlignError(
            f"{source}: no file or folder of that name here, and not readable as a hub id ({_first_line(error)}): "
            "check the name and the network, or download the data and name the folder"
        ) from error
    if isinstance(loaded, Dataset):
        return ((source, number, row) for number, row in enumerate(loaded, start=1))
    if len(loaded) == 1:
        return ((source, number, row) for number, row in enumerate(next(iter(loaded.values())), start=1))
    raise AlignError(f"{source}: name a split: {', '.join(f'{hub_id}:{name}' for name in loaded)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
