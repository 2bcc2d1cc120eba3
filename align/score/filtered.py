"""What a filter leaves behind: the rows that stay, those that go, a reason for each, and a page."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from align.data.report import write_rejected
from align.data.rows import Fault
from align.errors import AlignError
from align.reports.drawing import Series, histogram
from align.reports.filtered import Composition, Ends, Example, FilterPage, write_filter_page
from align.reports.record import group_faults
from align.rewards.encoding import plain
from align.tracking.files import make_room, write_json, write_text

from .filter import ONE_WORD, SHORT, Candidate, Rules, Table, Verdict, cuts, describe, judge
from .output import Rows, write_rows
from .rows import id_of, score_row
from .select import rule_words

SHOWN = 6
"""Examples from each end."""
GROUPS = 20
"""Columns of text with more values than these are no groups."""


@dataclass(frozen=True)
class Filtered:
    """A judged data set.

    Attributes:
        source: its name.
        rules: by column.
        table: its rows.
        verdicts: one a candidate.
    """

    source: str
    rules: Rules
    table: Table
    verdicts: Sequence[Verdict]

    @classmethod
    def of(cls, source: str, rules: Rules, table: Table) -> Filtered:
        """Judge the rows.

        Raises:
            AlignError: no row is kept.
        """
        return cls(source, rules, table, judge(table.candidates, rules))

    @property
    def kept(self) -> list[Candidate]:
        """The rows that stay, in the order of the data."""
        return [one for one, verdict in zip(self.table.candidates, self.verdicts, strict=True) if verdict.kept]

    @property
    def counts(self) -> dict[str, int]:
        """Rows read, kept, dropped and set aside; pairs of equal answers, repeats and short answers among them."""
        kept, total = len(self.kept), len(self.table.candidates)
        found = {"rows": self.table.rows, "kept": kept, "dropped": total - kept, "set_aside": self.table.rows - total}
        flags = Counter("repeated" if flag.startswith("repeats") else flag for v in self.verdicts for flag in v.flags)
        flags["identical"] = self.table.identical
        return found | {name: flags[name] for name in FLAGS if flags[name]}

    def lengths(self, field: str) -> tuple[list[int], list[int]]:
        """Lengths of an answer field, of all rows and of those that stay."""
        before = [one.lengths[field] for one in self.table.candidates if field in one.lengths]
        return before, [one.lengths[field] for one in self.kept if field in one.lengths]

    @property
    def fields(self) -> list[str]:
        """The answer fields of the rows that stay."""
        return list(dict.fromkeys(name for one in self.kept for name in one.lengths))


def write_filtered(
    folder: Path, filtered: Filtered, rows: Rows, suffix: str = ".jsonl", parts: Sequence[str] = ("kept", "dropped")
) -> None:
    """Write the folder in one step: ``kept``, ``dropped``, ``reasons.jsonl``, ``filter.json`` and ``report.html``.

    Args:
        folder: that is not there yet, or is empty.
        rows: the rows behind the candidates, in their order.
        suffix: ``.jsonl`` or ``.parquet``, of kept and dropped.
        parts: which of the two to write.

    Raises:
        AlignError: something is there already, the folder cannot be made, or Parquet cannot hold the rows.
    """
    check_free(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    make_room(partial)
    partial.mkdir()
    try:
        for name in parts:
            kept = name == "kept"
            if any(verdict.kept is kept for verdict in filtered.verdicts):
                write_rows(partial / f"{name}{suffix}", lambda kept=kept: _part(filtered, rows, kept))  # type: ignore[misc]
        write_text(partial / "reasons.jsonl", "".join(_reasons(filtered)))
        if filtered.table.faults:
            write_rejected(partial / "rejected_rows.jsonl", filtered.table.faults)
        write_json(partial / "filter.json", facts(filtered))
        write_filter_page(partial / "report.html", _page(filtered, rows))
        if folder.is_dir():
            folder.rmdir()
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Stop where the folder holds something.

    Raises:
        AlignError: it does, or a file has its name.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise AlignError(f"{folder} is there already: name another output, or delete it")


def _part(filtered: Filtered, rows: Rows, kept: bool) -> Iterator[dict[str, Any]]:
    return (row for row, verdict in zip(rows(), filtered.verdicts, strict=True) if verdict.kept is kept)


def _reasons(filtered: Filtered) -> Iterator[str]:
    """A line for every row: those that were judged, then those that were set aside."""
    for one, verdict in zip(filtered.table.candidates, filtered.verdicts, strict=True):
        line = {"source": one.source, "row": one.row, "row_id": one.row_id, **one.scores}
        line |= {"kept": verdict.kept, "reason": verdict.reason, "flags": verdict.flags}
        yield json.dumps(line, ensure_ascii=False) + "\n"
    aside: dict[tuple[str, int], list[Fault]] = {}
    for fault in filtered.table.faults:
        aside.setdefault((fault.source, fault.row), []).append(fault)
    for (source, row), faults in aside.items():
        reason = "set aside: " + "; ".join(f"{fault.field}: {fault.reason}" for fault in faults)
        line = {"source": source, "row": row, "row_id": _id_of(faults[0].content)}
        yield json.dumps(line | {"kept": False, "reason": reason, "flags": []}, ensure_ascii=False) + "\n"


def _id_of(content: Any) -> str | None:
    """The id of a row that was set aside; None where it cannot be read."""
    if not isinstance(content, dict):
        return None
    found = None if "row_id" in content else score_row(content, [])
    return found.row_id if found is not None else content.get("row_id", id_of(content))


def facts(filtered: Filtered) -> dict[str, Any]:
    """Source, rules and counts, for files that say what was done."""
    rules = {column: rule.model_dump(exclude_none=True) for column, rule in filtered.rules.items()}
    return {
        "source": filtered.source,
        "rules": rules,
        "description": describe(filtered.rules),
        "counts": filtered.counts,
    }


def summary(filtered: Filtered) -> str:
    """The outcome in a few lines."""
    n = filtered.counts
    lines = [f"kept {n['kept']:,} · dropped {n['dropped']:,} · set aside {n['set_aside']:,} of {n['rows']:,} rows"]
    for column, rule in filtered.rules.items():
        scores = [one.scores[column] for one in filtered.table.candidates]
        spread = f"{min(scores):.4g} to {max(scores):.4g}, median {median(scores):.4g}"
        at = " and ".join(f"{cut:.4g}" for cut in cuts(filtered.table.candidates, column, rule))
        lines.append(f"{column}: {rule_words(rule)}{f', cut at {at}' if at else ''} ({spread})")
    for field in filtered.fields:
        before, after = filtered.lengths(field)
        lines.append(f"mean length of {field} {fmean(before):.0f} -> {fmean(after):.0f} {filtered.table.unit}")
    flagged = [f"{words} {n[name]:,}" for name, words in FLAGS.items() if n.get(name)]
    return "\n".join(lines + ([" · ".join(flagged)] if flagged else []))


FLAGS = {
    "identical": "pairs of equal answers (set aside)",
    "repeated": "rows that repeat another",
    SHORT: "one-token answers (a score from hidden states says little there)",
    ONE_WORD: "one-word answers (a score from hidden states says little there)",
}


def _page(filtered: Filtered, rows: Rows) -> FilterPage:
    n = filtered.counts
    what = [("Data", filtered.source), ("Rule", describe(filtered.rules))]
    what += [("Kept", f"{n['kept']:,} of {n['rows']:,} rows"), ("Dropped", f"{n['dropped']:,}, each with its reason")]
    what += [("Set aside", f"{n['set_aside']:,} that could not be judged")] if n["set_aside"] else []
    what += [(words[:1].upper() + words[1:], f"{n[name]:,}") for name, words in FLAGS.items() if n.get(name)]
    title = f"{Path(filtered.source).name}, by {' and '.join(filtered.rules)}"
    faults = group_faults([vars(fault) for fault in filtered.table.faults])
    return FilterPage(title, what, _pictures(filtered), _compositions(filtered), _ends(filtered, rows), faults)


def _pictures(filtered: Filtered) -> list[Any]:
    pictures = []
    candidates = filtered.table.candidates
    for column, rule in filtered.rules.items():
        sides = [
            Series(
                name, [one.scores[column] for one, v in zip(candidates, filtered.verdicts, strict=True) if v.kept is k]
            )
            for name, k in (("kept", True), ("dropped", False))
        ]
        at = cuts(candidates, column, rule)
        where = "each group has its own cut" if rule.group is not None else "the dashed line is the cut"
        pictures.append(
            histogram(column, column, f"{len(candidates):,} rows; {rule_words(rule)} stay; {where}.", sides, at)
        )
    for field in filtered.fields:
        before, after = filtered.lengths(field)
        sides = [Series("before", before), Series("after", after)]
        pictures.append(histogram(f"Length of {field}", filtered.table.unit, "All rows, and those that stay.", sides))
    return pictures


def _compositions(filtered: Filtered) -> list[Composition]:
    kept = filtered.kept
    lines = [("rows", f"{len(filtered.table.candidates):,}", f"{len(kept):,}")]
    for field in filtered.fields:
        before, after = filtered.lengths(field)
        lines.append((f"{field}, mean length in {filtered.table.unit}", f"{fmean(before):.1f}", f"{fmean(after):.1f}"))
        lines.append((f"{field}, median length", f"{median(before):,.0f}", f"{median(after):,.0f}"))
    for column in filtered.rules:
        means = [fmean(one.scores[column] for one in part) for part in (filtered.table.candidates, kept)]
        lines.append((f"{column}, mean", f"{means[0]:.4g}", f"{means[1]:.4g}"))
    found = [Composition("Rows, lengths and scores", lines)]
    for name in _groups(filtered):
        left = _shares(kept, name)
        shares = _shares(filtered.table.candidates, name).items()
        found.append(Composition(f"Rows by {name}", [(group, share, left.get(group, "0")) for group, share in shares]))
    return found


def _groups(filtered: Filtered) -> list[str]:
    """The columns that rules group by, and others with few values."""
    values: dict[str, set[str]] = {}
    for one in filtered.table.candidates:
        for name, value in one.labels.items():
            values.setdefault(name, set()).add(value)
    ruled = [rule.group for rule in filtered.rules.values() if rule.group is not None]
    few = [name for name, different in values.items() if 1 < len(different) <= GROUPS]
    return list(dict.fromkeys([*ruled, *few]))


def _shares(part: Sequence[Candidate], name: str) -> dict[str, str]:
    counts = Counter(one.labels.get(name, "(none)") for one in part)
    return {group: f"{n:,} ({100 * n / len(part):.1f} %)" for group, n in counts.most_common()}


def _ends(filtered: Filtered, rows: Rows) -> list[Ends]:
    candidates = filtered.table.candidates
    orders = {
        column: sorted(range(len(candidates)), key=lambda place: candidates[place].scores[column])
        for column in filtered.rules
    }
    half = min(SHOWN, len(candidates) // 2)
    wanted = {place for order in orders.values() for place in [*order[:half], *order[len(order) - half :]]}
    content = {place: row for place, row in enumerate(rows()) if place in wanted}

    def example(column: str, place: int, rank: int) -> Example:
        one, verdict = candidates[place], filtered.verdicts[place]
        prompt, answers = _texts(content[place])
        score = f"{column} {one.scores[column]:.6g}"
        where = f"row {one.row:,}, number {rank + 1:,} of {len(candidates):,}"
        return Example(where, score, verdict.kept, verdict.flags, prompt, answers)

    return [
        Ends(
            column,
            [example(column, place, rank) for rank, place in enumerate(order[:half])],
            [example(column, order[rank], rank) for rank in range(len(order) - 1, len(order) - 1 - half, -1)],
        )
        for column, order in orders.items()
    ]


def _texts(row: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    prompt = plain(row["prompt"], "user") if row.get("prompt") else ""
    answers = [(name, plain(row[name], "assistant")) for name in ("chosen", "rejected", "completion") if row.get(name)]
    answers += [
        (f"answer {n}", plain(answer, "assistant")) for n, answer in enumerate(row.get("completions") or [], 1)
    ]
    return prompt, answers
