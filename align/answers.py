"""The file of answers: one line of JSON a row, written as the answers come, so that a second call goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.data.rows import Content
from align.errors import AlignError


def make_place(output: Path, source: str) -> None:
    """Make the folder of the output.

    Raises:
        AlignError: it cannot be made, the output is something other than a file, or it is (among) what is read.
    """
    place = output.resolve()
    if Path(source).exists() and Path(source).resolve() in (place, *place.parents):
        raise AlignError(f"{output}: this is what is read, and answers would be written over it; name another output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise AlignError(
            f"{output.parent}: this folder cannot be made ({error.strerror}); name another output"
        ) from error
    if output.exists() and not output.is_file():
        raise AlignError(f"{output}: a folder or a device, where a file of answers was to go; name another output")


def read_done(output: Path, prompts: Mapping[int, Content], settings: Mapping[str, Any]) -> set[int]:
    """Rows that the output holds already; a line that a kill has torn is cut off.

    Raises:
        AlignError: a line is something else than the answer to one of the prompts with these settings. The file is
            left as it was.
    """
    if not output.exists():
        return set()
    *lines, rest = output.read_bytes().split(b"\n")
    if whole := bool(_parse(rest)):
        lines.append(rest)
    done = set()
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row.get("settings") != settings or prompts.get(row.get("row", 0)) != row.get("prompt"):
            raise _not_ours(output, number)
        done.add(row["row"])
    if whole:
        with output.open("ab") as file:
            file.write(b"\n")
    elif rest:
        begun = [_line({"row": row, "prompt": prompt})[:-2].encode() for row, prompt in prompts.items()]
        if not any(start.startswith(rest) or rest.startswith(start) for start in begun):
            raise _not_ours(output, len(lines) + 1)
        os.truncate(output, output.stat().st_size - len(rest))
    return done


def write_rows(file: Any, rows: Mapping[int, Mapping[str, Any]]) -> None:
    """Append answers by number of the row; the row's number and its prompt stand first."""
    file.writelines(_line({"row": number, **row}) for number, row in rows.items())
    file.flush()


def sort_rows(output: Path) -> None:
    """Put the rows in the order of the input; the file is replaced as a whole."""
    # splitlines would also split at the U+2028 or U+0085 of an answer.
    lines = output.read_text("utf-8").split("\n")[:-1]
    ordered = sorted(lines, key=lambda line: int(json.loads(line)["row"]))
    if ordered != lines:
        partial = output.with_name(f".{output.name}.tmp")
        partial.write_text("".join(f"{line}\n" for line in ordered), "utf-8")
        partial.replace(output)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _parse(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return {}
    return found if isinstance(found, dict) else {}


def _not_ours(output: Path, number: int) -> AlignError:
    return AlignError(
        f"{output}: line {number} is no answer to these prompts with these settings; name another output"
    )
