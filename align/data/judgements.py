"""Comparisons with the name of who made them, for reward models of people who disagree (``method: pal``).

Rows are ``[prompt,] chosen, rejected, annotator``, checked as pairs; the annotator is text or a whole number. A pair
that annotators judge both ways is no contradiction here but what there is to learn. A ``preference``, where it is
given, is 1 or 0, which says that the rejected answer is the better one; ties, 0.5, are left out and counted. Strengths
and margins are not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .fields import FieldError, collecting, required
from .load import Row, read_rows, usable
from .pairs import Comparison, compared, repeats
from .rows import Fault, PairRow, PairTable, bad_rows, row_id

FIELDS = ("prompt", "chosen", "rejected", "preference", "annotator")
_WANTED = "[prompt,] chosen, rejected, annotator"


@dataclass(frozen=True)
class JudgementRow(PairRow):
    """One comparison by one annotator; the annotator is part of ``row_id``."""

    annotator: str = ""


@dataclass
class JudgementTable(PairTable):
    """The comparisons of one source; counts as in ``PairTable``, and ``annotators``."""

    rows: list[JudgementRow]  # type: ignore[assignment]


def read_judgements(source: str) -> JudgementTable:
    """Read and validate every row of ``source`` once (see ``load.read_rows`` for what a source may be).

    Raises:
        AlignError: the source is missing, empty or unreadable as a whole. A bad row raises nothing: it is a Fault.
    """
    return judgement_table(read_rows(source), source)


def judgement_table(rows: Iterable[Row], source: str = "") -> JudgementTable:
    """The comparisons in ``(file, row number, fields)`` triples, as ``read_rows`` yields them."""
    counts = dict.fromkeys(("rows", "pairs", "set_aside", "annotators", "explicit_prompt", "implicit_prompt"), 0)
    counts |= dict.fromkeys(("ties", "duplicates", "contradictions", "prompt_repeated", "soft_labels"), 0)
    table = JudgementTable([], [], counts, source)
    unused: Counter[str] = Counter()
    for file, number, row in usable(rows, table):
        problems: list[FieldError] = []
        plain = {name: value for name, value in row.items() if name in FIELDS}
        comparisons = compared(plain, problems)
        judged = comparisons[0].preference if comparisons else None
        if judged not in (None, 0, 0.5, 1):
            reason = f"{judged:g}: one annotator's judgement is 0, 1 or 0.5, a tie"
            problems.append(FieldError("preference", reason))
        name = ""
        with collecting(problems):
            name = _annotator(required("annotator", row, _WANTED))
        unused.update(row.keys() - set(FIELDS))
        table.faults += [Fault(file, number, problem.field, problem.reason, row) for problem in problems]
        if not problems:
            counts["explicit_prompt" if "prompt" in row else "implicit_prompt"] += 1
            if judged == 0.5:
                counts["ties"] += 1
                continue
            table.rows += [_judgement(file, number, comparison, name) for comparison in comparisons]
    duplicates, contradictions = repeats(table.rows)
    counts["pairs"] = len(table.rows)
    counts["set_aside"] = bad_rows(table.faults)
    counts["annotators"] = len({row.annotator for row in table.rows})
    counts["duplicates"], counts["contradictions"] = len(duplicates), len(contradictions)
    table.unused = dict(unused)
    return table


def _annotator(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        raise FieldError("annotator", f"{value!r} is not a name or a whole number")
    return str(value)


def _judgement(source: str, number: int, comparison: Comparison, annotator: str) -> JudgementRow:
    prompt, chosen, rejected = comparison.prompt, comparison.chosen, comparison.rejected
    if comparison.preference == 0:
        chosen, rejected = rejected, chosen
    name = row_id(prompt, chosen, rejected, annotator)
    return JudgementRow(name, source, number, prompt, chosen, rejected, annotator=annotator)
