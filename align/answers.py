"""The file of answers: one line of JSON a row, written as the answers come, so that a second call goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.data.rows import Fault
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


def read_done(output: Path, wanted: Mapping[int, Mapping[str, Any]]) -> tuple[set[int], set[int]]:
    """Rows that the output holds already; a line that a kill has torn is cut off.

    Args:
        wanted: what a row of the output must say, by its number: ``prompt``, ``settings`` and, under control,
            ``inputs``.

    Returns:
        The rows that are done, and those that something has failed, which are to be made again; ``sort_rows`` drops
        their old lines.

    Raises:
        AlignError: a line is something else than the answer to one of the prompts, with these settings and to this
            constraint. The file is left as it was.
    """
    if not output.exists():
        return set(), set()
    *lines, rest = output.read_bytes().split(b"\n")
    if whole := bool(_parse(rest)):
        lines.append(rest)
    done, failed = set[int](), set[int]()
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        own = wanted.get(row.get("row", 0), {})
        if not own or any(row.get(name) != own[name] for name in ("prompt", "settings")):
            raise _not_ours(output, number, "is no answer to these prompts with these settings")
        if any(name in row and row[name] is None for name in ("ess", "reward")):
            failed.add(row["row"])
        elif _line(row.get("inputs")) != _line(own.get("inputs")):
            what = "answers what the constraint or the reward was then: its text, its file or a column has changed"
            raise _not_ours(output, number, what)
        else:
            done.add(row["row"])
    if whole:
        with output.open("ab") as file:
            file.write(b"\n")
    elif rest:
        begun = [_line({"row": row, "prompt": own["prompt"]})[:-2].encode() for row, own in wanted.items()]
        if not any(start.startswith(rest) or rest.startswith(start) for start in begun):
            raise _not_ours(output, len(lines) + 1, "is no answer to these prompts")
        os.truncate(output, output.stat().st_size - len(rest))
    return done, failed - done


def write_rows(file: Any, rows: Mapping[int, Mapping[str, Any]]) -> None:
    """Append answers by number of the row; the row's number and its prompt stand first."""
    file.writelines(_line({"row": number, **row}) for number, row in rows.items())
    file.flush()


def sort_rows(output: Path) -> None:
    """Put the rows in the order of the input, the last line of each; the file is replaced as a whole."""
    # splitlines would also split at the U+2028 or U+0085 of an answer.
    lines = output.read_text("utf-8").split("\n")[:-1]
    last = {int(json.loads(line)["row"]): line for line in lines}
    ordered = [last[row] for row in sorted(last)]
    if ordered != lines:
        partial = output.with_name(f".{output.name}.tmp")
        partial.write_text("".join(f"{line}\n" for line in ordered), "utf-8")
        partial.replace(output)


def invalid_rows(output: Path) -> tuple[int, list[Fault]]:
    """How many rows there are, and those without a valid answer, with the reason."""
    rows = [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]]
    faults = [
        Fault(str(output), row["row"], "answer", row["reason"], row) for row in rows if not row.get("valid", True)
    ]
    return len(rows), faults


def _line(row: Mapping[str, Any] | None) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _parse(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return {}
    return found if isinstance(found, dict) else {}


def _not_ours(output: Path, number: int, what: str) -> AlignError:
    return AlignError(f"{output}: line {number} {what}; name another output")
