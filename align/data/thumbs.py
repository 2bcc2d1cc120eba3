"""Single answers with a thumb up or down, for the losses on thumbs (``bco``, ``kto``).

Kinds of rows:

- ``prompt, completion, label``: the label is true or 1 for a thumb up, false or 0 for a thumb down.
- pairs (``[prompt,] chosen, rejected``), checked as pairs and unpaired: the chosen answer is a thumb up, the rejected
  one a thumb down. How strongly one was preferred (``strength``) is not read, and a pair whose ``preference`` is not
  sure is a fault: half a thumb is none.

The same answer with both thumbs stays twice: people who disagree are data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError

from .columns import dataset_of
from .fields import FieldError, collecting, content, required, resolve
from .load import Row, read_rows, usable
from .pairs import compared
from .report import describe
from .rows import CompletionRow, CompletionTable, Content, Fault, bad_rows, row_id
from .tokenize import TokenizedCompletion, TokenizedCompletions, tokenize_completions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_FIELDS = {"labelled": ("prompt", "completion", "label"), "unpaired": ("prompt", "chosen", "rejected", "preference")}
_WANTED = "prompt, completion, label; or [prompt,] chosen, rejected"
_LABELS_OF_TEXT = {"true": True, "1": True, "false": False, "0": False}  # cells of a CSV file are text


@dataclass(frozen=True)
class ThumbRow(CompletionRow):
    """One answer and its thumb: ``label`` is true for up. The thumb is part of ``row_id``."""

    label: bool


@dataclass
class ThumbTable(CompletionTable):
    """The answers of one source.

    Attributes:
        counts: ``rows`` (read), ``completions``, ``set_aside`` (rows), the kinds of rows (``labelled``, ``unpaired``),
            ``up``, ``down``, ``duplicates`` (the same answer with the same thumb again) and ``contradictions``
            (answers that have both thumbs).
    """

    rows: list[ThumbRow]  # type: ignore[assignment]


@dataclass(frozen=True)
class TokenizedThumb(TokenizedCompletion):
    """Token ids of an answer with its thumb."""

    label: bool


@dataclass
class TokenizedThumbs(TokenizedCompletions):
    """Answers with their thumbs as token ids; counts as in ``TokenizedCompletions``."""

    rows: list[TokenizedThumb]  # type: ignore[assignment]

    def dataset(self) -> Dataset:
        """Columns prompt_ids, completion_ids, label, row_id."""
        columns = ("prompt_ids", "completion_ids", "label", "row_id")
        return dataset_of({column: [getattr(row, column) for row in self.rows] for column in columns})


def read_thumbs(source: str) -> ThumbTable:
    """Read and validate every row of ``source`` once (see ``load.read_rows`` for what a source may be).

    Raises:
        AlignError: the source is missing, empty or unreadable as a whole. A bad row raises nothing: it is a Fault.
    """
    return thumb_table(read_rows(source), source)


def thumb_table(rows: Iterable[Row], source: str = "") -> ThumbTable:
    """The answers in ``(file, row number, fields)`` triples, as ``read_rows`` yields them."""
    counts = dict.fromkeys(("rows", "completions", "set_aside", *_FIELDS, "up", "down"), 0)
    table = ThumbTable([], [], counts, source)
    unused: Counter[str] = Counter()
    for file, number, row in usable(rows, table):
        problems: list[FieldError] = []
        kind = "unpaired" if "completion" not in row and {"chosen", "rejected"} & row.keys() else "labelled"
        found = _unpaired(row, problems) if kind == "unpaired" else _labelled(row, file, problems)
        unused.update(row.keys() - set(_FIELDS[kind]))
        table.faults += [Fault(file, number, problem.field, problem.reason, row) for problem in problems]
        counts[kind] += not problems
        for prompt, answer, label in found:
            identity = row_id(prompt, answer, "up" if label else "down")
            table.rows.append(ThumbRow(identity, file, number, prompt, answer, label))
    counts["completions"] = len(table.rows)
    counts["set_aside"] = bad_rows(table.faults)
    counts["up"] = sum(row.label for row in table.rows)
    counts["down"] = len(table.rows) - counts["up"]
    different = {row.row_id: row for row in table.rows}
    counts["duplicates"] = len(table.rows) - len(different)
    counts["contradictions"] = len(different) - len({row_id(r.prompt, r.completion) for r in different.values()})
    table.unused = dict(unused)
    return table


def _unpaired(row: dict[str, Any], problems: list[FieldError]) -> list[tuple[Content, Content, bool]]:
    pairs = compared(row, problems)
    if problems:
        return []
    (pair,) = pairs
    if pair.preference not in (None, 0, 1):
        reason = f"{pair.preference:g}: thumbs are sure, 0 or 1; leave the pair out, or say label for each answer"
        problems.append(FieldError("preference", reason))
        return []
    up = pair.preference != 0
    return [(pair.prompt, pair.chosen, up), (pair.prompt, pair.rejected, not up)]


def _labelled(row: dict[str, Any], file: str, problems: list[FieldError]) -> list[tuple[Content, Content, bool]]:
    prompt: Content = ""
    answer: Content = ""
    label = False
    with collecting(problems):
        prompt = content("prompt", required("prompt", row, _WANTED))
    with collecting(problems):
        answer = content("completion", required("completion", row, _WANTED))
    with collecting(problems):
        label = _label(required("label", row, _WANTED), file)
    if problems:
        return []
    with collecting(problems):
        prompt, answers = resolve(prompt, {"completion": answer})
        return [(prompt, answers["completion"], label)]
    return []


def _label(value: Any, file: str) -> bool:
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    if isinstance(value, str) and file.lower().endswith((".csv", ".csv.gz")):
        known = _LABELS_OF_TEXT.get(value.strip().lower())
        if known is not None:
            return known
    raise FieldError("label", f"{value!r} is not true or 1 (thumb up), false or 0 (thumb down)")


def tokenize_thumbs(
    rows: Sequence[ThumbRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    cache: Path | None = None,
) -> TokenizedThumbs:
    """Token ids of every answer, by the rules of ``tokenize``.

    Raises:
        AlignError: the tokenizer has no end token, or no chat template for rows of messages.
    """
    done = tokenize_completions(rows, tokenizer, max_length, cache=cache)
    label = {row.row_id: row.label for row in rows}
    thumbs = [TokenizedThumb(r.input_ids, r.completion_mask, r.row_id, label[r.row_id]) for r in done.rows]
    return TokenizedThumbs(thumbs, done.faults, done.counts)


def check_both_thumbs(labels: Iterable[bool], source: str) -> None:
    """Stop where one of the thumbs is missing.

    Raises:
        AlignError: which one.
    """
    up = Counter(bool(label) for label in labels)
    for label, name, other in ((True, "up", "down"), (False, "down", "up")):
        if not up[label]:
            raise AlignError(
                f"{source}: no thumb {name} among {up[not label]:,} thumbs {other}: these losses tell the two apart "
                "and need both; add answers of the other kind, or train on the good ones with method: sft"
            )


def describe_thumbs(
    table: ThumbTable, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None
) -> str:
    """The picture of ``report.describe`` with the thumbs in it."""
    first, _, rest = describe(table, tokenizer, max_length).partition("\n")
    n = table.counts
    thumbs = f"{n['up']:,} up · {n['down']:,} down · {n['contradictions']:,} answers with both"
    kinds = f"{n['labelled']:,} labelled rows · {n['unpaired']:,} pairs, unpaired"
    rest = "\n".join(line for line in rest.split("\n") if not line.startswith("  kinds of rows"))
    return f"{first}\n  {'kinds of rows':<15} {kinds}\n  {'thumbs':<15} {thumbs}\n{rest}"
