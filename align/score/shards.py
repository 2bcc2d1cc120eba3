"""Results on disk in pieces of consecutive rows, so that an interrupted run goes on where it stopped.

A shard is a JSONL file that is there whole or not at all. One line a row of the input:
``{row, row_id, columns, cut, moved}``, or ``{row, faults}`` for a row that is set aside, with its ``row_id``
where it could be read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import AlignError
from align.tracking.files import make_room, write_json, write_text

Line = dict[str, Any]


class Shards:
    """The pieces of one output, in the hidden folder ``.NAME.parts`` beside it.

    Args:
        output: the file that is to come.
        identity: what decides the values. Pieces of another identity are not taken.

    Raises:
        AlignError: pieces of another identity are there, or the folder cannot be made.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.folder = output.with_name(f".{output.name}.parts")
        self.identity = identity
        about = self.folder / "about.json"
        make_room(about)
        begun = next(self.folder.glob("*.jsonl"), None)  # without one there is nothing to protect
        if begun is not None and about.is_file():
            check_same(self.folder, json.loads(about.read_text(encoding="utf-8")), identity)
        else:
            write_json(about, identity)

    def read(self, number: int) -> list[Line] | None:
        """The lines of a shard; None where it is not there."""
        try:
            text = self._path(number).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def write(self, number: int, lines: Sequence[Line]) -> None:
        """Keep a shard."""
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        write_text(self._path(number), text)

    def lines(self, count: int) -> Iterator[Line]:
        """All lines of the first ``count`` shards, in order.

        Raises:
            AlignError: one is missing.
        """
        for number in range(count):
            found = self.read(number)
            if found is None:
                raise AlignError(f"{self._path(number)} is missing: give the same command again")
            yield from found

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.jsonl"


def check_same(where: Path, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Stop where something else was scored, or by something else.

    Raises:
        AlignError: what differs.
    """
    differ = sorted(key for key in {*found, *identity} if found.get(key) != identity.get(key))
    if differ:
        changed = "the data has changed since it was begun"
        what = changed if differ == ["data"] else f"begun with {', '.join(f'other {key}' for key in differ)}"
        raise AlignError(f"{where}: {what}; delete it to begin anew, or name another output")
