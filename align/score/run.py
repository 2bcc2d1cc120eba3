"""One pass over a data set: rows in, columns made, a file out.

The input is read as a stream, in shards of consecutive rows. Within a shard, rows are scored in batches of like
length; a row that a scorer refuses is set aside with the reason, and the others are scored without it. A shard that is
on disk is not scored again, so a run that was killed loses the shard in flight and nothing else, and ends in the same
file.
Started by ``accelerate launch`` or ``torchrun``, n processes take every n-th of the missing shards, and the first one
writes the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from jinja2 import TemplateError

from align.data.fields import FieldError
from align.data.load import Row, read_rows
from align.data.report import write_rejected
from align.data.rows import Fault
from align.errors import AlignError
from align.tracking.files import write_json
from align.tracking.progress import progress

from .output import check_suffix, write_rows
from .policy import OF_PAIRS
from .rows import ONE_TOKEN, ScoreRow, id_of, score_row
from .scorers import Columns, Scorer
from .shards import Line, Shards, check_same

SHARD_ROWS = 256
_COUNTED = ("cut", "moved", "left_out")  # of Scored
MOVED = (
    "whose prompt ends in other tokens when an answer follows, which is then taken from where the tokens part: end "
    "prompts without a blank, and begin answers with one"
)
OTHER_FLAGS = f"keep the {ONE_TOKEN} that the data has, which would be another by the tokens of this model"


@dataclass
class Outcome:
    """What came of a pass.

    Attributes:
        output: the file.
        counts: ``rows`` (read), ``scored``, ``set_aside``, ``cut`` (answers that were too long for a scorer),
            ``moved`` (rows whose prompt ends in other tokens when an answer follows), ``left_out`` (of the answers
            drawn for references, those without a reward) and ``other_flags`` (rows whose ``one_token`` is of an
            earlier pass, and would be another by this one).
        columns: of each new column of numbers: ``n``, ``null``, ``mean``, ``min``, ``max``; of lists, over entries.
        faults: why rows were set aside, of a file that holds them.
        rejected: that file; None where there are no faults.
    """

    output: Path
    counts: dict[str, int]
    columns: dict[str, dict[str, float]]
    faults: list[Fault]
    rejected: Path | None


def processes() -> PartialState:
    """Which process we are of those that were launched together; the only one where nothing was launched."""
    return PartialState(cpu=not torch.accelerator.is_available())


def score_data(
    source: str, scorers: Sequence[Scorer], output: Path, *, batch_size: int = 16, shard_rows: int = SHARD_ROWS
) -> Outcome | None:
    """Write the rows of ``source`` with ``row_id`` and the scorers' columns to ``output``.

    Beside it, with its whole name, stand ``NAME.score.json``, what made the columns, and, if rows were set aside,
    ``NAME.rejected_rows.jsonl``; ``content`` there has the ``row_id`` of rows that could be read.

    Args:
        source: what ``align.data.load.read_rows`` takes.
        scorers: they work one after the other; a row that one of them refuses does not go to the next.
        output: ``.jsonl`` or ``.parquet``; where it is there and complete, it is left as it is.
        batch_size: rows that a scorer is given at once.
        shard_rows: rows of the input that a kill can lose.

    Returns:
        The outcome; None in a process that is not the first one.

    Raises:
        AlignError: the output holds something else, no row can be scored, or a new column has the name of one that the
            data has.
    """
    check_suffix(output)
    state = processes()
    made_by = {scorer.name: dict(scorer.identity) for scorer in scorers}
    total, content = _content_of(source)
    identity: dict[str, Any] = {"source": source, "data": content, "scorers": made_by}
    identity |= {"batch_size": batch_size, "shard_rows": shard_rows}
    about = _about(output)
    done = _finished(output, identity)
    if not done:
        with state.main_process_first():
            shards = Shards(output, identity)
        _score_shards(source, scorers, shards, total, batch_size, shard_rows)
        state.wait_for_everyone()
        if state.is_main_process:
            _write(source, shards, output, about, math.ceil(total / shard_rows))
    return _outcome(output, about) if state.is_main_process else None


def _content_of(source: str) -> tuple[int, str]:
    """How many rows there are, and a hash of all that stands in them."""
    total, digest = 0, hashlib.blake2b(digest_size=16)
    for _, _, content in read_rows(source):
        total += 1
        digest.update(json.dumps(content, default=str).encode() + b"\n")
    return total, digest.hexdigest()


def _about(output: Path) -> Path:
    return output.with_name(f"{output.name}.score.json")


def identity_at(output: Path) -> dict[str, Any] | None:
    """The identity of the run that made the output; None where there is no output.

    Raises:
        AlignError: it is there, and none of ours.
    """
    if not output.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(_about(output).read_text(encoding="utf-8"))["identity"]
    except (FileNotFoundError, ValueError, KeyError):
        raise AlignError(f"{output} is there already and was not made by align score; name another output") from None
    return found


def _finished(output: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the output is there and is what this run would make.

    Raises:
        AlignError: it is something else.
    """
    found = identity_at(output)
    if found is None:
        return False
    check_same(output, found, identity)
    return True


def _score_shards(
    source: str, scorers: Sequence[Scorer], shards: Shards, total: int, batch_size: int, shard_rows: int
) -> None:
    state = processes()
    count = math.ceil(total / shard_rows)
    missing = [number for number in range(count) if shards.read(number) is None]
    state.wait_for_everyone()  # all see what is missing before anyone adds to it
    mine = set(missing[state.process_index :: state.num_processes])
    sizes = {number: min(shard_rows, total - number * shard_rows) for number in range(count)}
    which = "" if state.num_processes == 1 else f" (process {state.process_index + 1} of {state.num_processes})"
    done = total - sum(sizes[number] for number in missing)
    ours = done + sum(sizes[number] for number in mine)
    with progress(f"scoring{which}", ours, done) as advance, no_warning_of_batches():
        rows = enumerate(read_rows(source), start=1)
        for number in range(count):
            part = list(islice(rows, shard_rows))
            if number in mine:
                shards.write(number, score_rows(scorers, part, batch_size, advance))


def _read(row: Row) -> ScoreRow | list[FieldError]:
    content = row[2]
    if isinstance(content, Fault):
        return [FieldError(content.field, content.reason)]
    problems: list[FieldError] = []
    found = score_row(content, problems)
    return problems if found is None else found


def score_rows(
    scorers: Sequence[Scorer],
    part: Sequence[tuple[int, Row]],
    batch_size: int,
    advance: Callable[[int], object] = lambda _: None,
) -> list[Line]:
    """The lines of a shard (see ``shards``): of each numbered row its columns, or why it is set aside.

    Args:
        advance: told of every batch how many rows are done.
    """
    lines: dict[int, Line] = {}
    rows: dict[int, ScoreRow] = {}
    for number, row in part:
        found = _read(row)
        if isinstance(found, ScoreRow):
            _check_id(found, row)
            rows[number] = found
            lines[number] = {"row": number, "row_id": found.row_id, "columns": {}, **dict.fromkeys(_COUNTED, 0)}
        else:
            own = id_of(row[2]) if isinstance(row[2], dict) else None
            lines[number] = _set_aside(number, found) | ({} if own is None else {"row_id": own})
    advance(len(part) - len(rows))
    numbers = sorted(rows, key=lambda n: (-rows[n].size, n))
    for start in range(0, len(numbers), batch_size):
        batch = numbers[start : start + batch_size]
        _score_through(scorers, {number: rows[number] for number in batch}, lines)
        advance(len(batch))
    return [lines[number] for number, _ in part]


def _score_through(scorers: Sequence[Scorer], rows: Mapping[int, ScoreRow], lines: dict[int, Line]) -> None:
    """One scorer after the other, each over what is left of a batch."""
    for scorer in scorers:
        batch = [number for number in rows if "columns" in lines[number]]
        if not batch:
            return
        found_each, counts = _score_batch(scorer, [rows[number] for number in batch])
        for name, count in counts.items():
            lines[batch[0]][name] += count
        for number, columns in zip(batch, found_each, strict=True):
            if isinstance(columns, FieldError):
                known = {name: lines[number][name] for name in ("row_id", *_COUNTED)}
                lines[number] = _set_aside(number, [columns]) | known
            else:
                _check_new(columns.keys() - {ONE_TOKEN}, lines[number]["columns"], rows[number])
                lines[number]["columns"] |= columns


def _check_id(found: ScoreRow, row: Row) -> None:
    file, line, content = row
    own = content.get("row_id") if isinstance(content, dict) else None
    if own not in (None, found.row_id):
        raise AlignError(
            f"{file}: row {line}: the data has a column row_id of its own ({own!r}), as ours is called; rename it"
        )


def _set_aside(number: int, problems: Sequence[FieldError]) -> Line:
    return {"row": number, "faults": [{"field": p.field, "reason": p.reason} for p in problems]}


def _score_batch(scorer: Scorer, rows: Sequence[ScoreRow]) -> tuple[list[Columns | FieldError], dict[str, int]]:
    """Columns of each row, or why it has none, and counts. Of a batch that is refused, each row is tried alone."""
    try:
        scored = scorer.score(rows)
    except (ValueError, TemplateError) as error:
        if len(rows) > 1:
            alone = [_score_batch(scorer, [row]) for row in rows]
            counts = {name: sum(count[name] for _, count in alone) for name in _COUNTED}
            return [columns for found, _ in alone for columns in found], counts
        reason = str(error).removeprefix("row 0: ")
        fault = error if isinstance(error, FieldError) else FieldError(scorer.name, reason)
        return [fault], dict.fromkeys(_COUNTED, 0)
    found = [scored.refused.get(place, columns) for place, columns in enumerate(scored.columns)]
    return found, {name: getattr(scored, name) for name in _COUNTED}


def check_columns(source: str, named: Mapping[str, str]) -> None:
    """Stop, before a model is loaded, where the data has a column already that is to be made, or other row ids.

    Looks at the first row that can be scored; what only others have is found when they are.

    Args:
        named: specs by the name of their column, as ``scorers.named_specs`` gives them.

    Raises:
        AlignError: there is such a column, or a ``row_id`` of the data's own.
    """
    for row in read_rows(source):
        if isinstance(first := _read(row), ScoreRow):
            _check_id(first, row)
            for name, spec in named.items():
                _check_new([name] if spec in OF_PAIRS else [f"{name}_{field}" for field in first.answers], {}, first)
            return


def _check_new(names: Iterable[str], others: Columns, row: ScoreRow) -> None:
    """Columns of the data are not written over."""
    if taken := sorted({*row.fields, *others, "row_id"}.intersection(names)):
        raise AlignError(
            f"there is a column {taken[0]} already: rename it, or give the new one another name, --with NAME=SPEC"
        )


@contextmanager
def no_warning_of_batches() -> Iterator[None]:
    """What a batch cuts and moves is counted, and told of all rows together (``MOVED``)."""

    def refuse(_: logging.LogRecord) -> bool:
        return False

    loggers = [logging.getLogger(name) for name in ("align.data.encode", "align.rewards.batches")]
    for logger in loggers:
        logger.addFilter(refuse)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(refuse)


def _write(source: str, shards: Shards, output: Path, about: Path, count: int) -> None:
    faults: list[Fault] = []
    statistics: dict[str, list[float]] = {}
    counts = dict.fromkeys(("rows", "scored", "set_aside", *_COUNTED, "other_flags"), 0)
    for line, (file, row, content) in zip(shards.lines(count), read_rows(source), strict=True):
        counts["rows"] += 1
        for name in _COUNTED:
            counts[name] += line.get(name, 0)
        if "columns" in line and not isinstance(content, Fault):
            counts["scored"] += 1
            columns = _beside(content, line["columns"])
            counts["other_flags"] += columns != line["columns"]
            _collect(statistics, columns)
            continue
        counts["set_aside"] += 1
        shown = content.content if isinstance(content, Fault) else content
        if "row_id" in line:
            shown = {**shown, "row_id": line["row_id"]}
        faults += [Fault(file, row, one["field"], one["reason"], shown) for one in line["faults"]]
    rejected = _rejected(output)
    rejected.unlink(missing_ok=True)  # of an output of this name that is there no more
    if faults:
        write_rejected(rejected, faults)
    if not counts["scored"]:
        first = faults[0]
        raise AlignError(
            f"{source}: no row can be scored, the reasons are in {rejected}; the first, of row {first.row}: "
            f"{first.field}: {first.reason}"
        )

    def rows() -> Iterator[dict[str, Any]]:
        for line, (_, _, content) in zip(shards.lines(count), read_rows(source), strict=True):
            if "columns" in line and not isinstance(content, Fault):
                yield {**content, "row_id": line["row_id"], **_beside(content, line["columns"])}

    summaries = {name: _summary(values) for name, values in statistics.items()}
    # Before the output: where the output is, so is what made it, whenever a kill comes.
    write_json(about, {"identity": shards.identity, "counts": counts, "columns": summaries})
    write_rows(output, rows)
    shards.remove()


def _beside(content: Mapping[str, Any], columns: Columns) -> Columns:
    """The new columns of a row, with the ``one_token`` of an earlier pass where there is one: it only informs."""
    known = content.get(ONE_TOKEN)
    return columns if known is None or ONE_TOKEN not in columns else {**columns, ONE_TOKEN: known}


def _collect(statistics: dict[str, list[float]], columns: Mapping[str, Any]) -> None:
    """Count, sum, smallest, largest and nulls, so that memory does not grow with rows."""
    for name, value in columns.items():
        for number in value if isinstance(value, list) else [value]:
            if number is None:
                statistics.setdefault(name, [0, 0.0, math.inf, -math.inf, 0])[4] += 1
            if not isinstance(number, int | float):
                continue
            known = statistics.setdefault(name, [0, 0.0, math.inf, -math.inf, 0])
            known[:] = [known[0] + 1, known[1] + number, min(known[2], number), max(known[3], number), known[4]]


def _summary(known: Sequence[float]) -> dict[str, float]:
    n, total, low, high, nulls = known
    numbers = {"mean": total / n, "min": low, "max": high} if n else {}
    return {"n": n, "null": nulls, **numbers}


def _rejected(output: Path) -> Path:
    return output.with_name(f"{output.name}.rejected_rows.jsonl")


def _outcome(output: Path, about: Path) -> Outcome:
    found = json.loads(about.read_text(encoding="utf-8"))
    faults = []
    rejected = _rejected(output)
    if found["counts"]["set_aside"]:
        text = rejected.read_text(encoding="utf-8")
        faults = [Fault(**json.loads(line)) for line in text.split("\n")[:-1]]
    return Outcome(output, found["counts"], found["columns"], faults, rejected if faults else None)
