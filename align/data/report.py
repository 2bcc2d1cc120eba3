"""What is wrong with the data and what is in it, as text that reads the same in a terminal and in a log."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from align.errors import AlignError

from .pairs import repeats
from .rows import CompletionTable, Content, Fault, PairRow, PairTable, bad_rows
from .tokenize import (
    TokenizedCompletion,
    TokenizedCompletions,
    TokenizedPair,
    TokenizedPairs,
    tokenize_completions,
    tokenize_pairs,
)

if TYPE_CHECKING:
    from rich.console import Group
    from transformers import PreTrainedTokenizerBase

Table = PairTable | CompletionTable
Tokenized = TokenizedPairs | TokenizedCompletions

_ROWS_NAMED = 3
_KINDS_SHOWN = 20
_TEXT_SHOWN = 600


def fault_report(faults: Sequence[Fault], total: int, kept_in: str | Path | None = None) -> str:
    """All faults, those of one file, field and reason on one line, in the order in which they first appear.

    Args:
        total: rows read, with the bad ones.
        kept_in: the file that ``write_rejected`` wrote, if it did.
    """
    where = f" (set aside in {kept_in})" if kept_in is not None else ""
    heading = f"{_source(faults)}: {bad_rows(faults):,} of {total:,} rows cannot be used{where}"
    return "\n".join([heading, *fault_lines(faults)])


def fault_lines(faults: Sequence[Fault]) -> list[str]:
    """A line for the faults of one file, field and reason."""
    source, groups = _source(faults), _grouped(faults)
    table = [(_rows_of(group, source), group[0].field, group[0].reason) for group in groups[:_KINDS_SHOWN]]
    rows, fields = (max((len(line[column]) for line in table), default=0) for column in (0, 1))
    lines = [f"  {row:<{rows}}  {field:<{fields}}  {reason}" for row, field, reason in table]
    more = len(groups) - _KINDS_SHOWN
    return [*lines, f"  and {more} more kinds of fault"] if more > 0 else lines


def _source(faults: Sequence[Fault]) -> str:
    sources = {fault.source for fault in faults}
    return sources.pop() if len(sources) == 1 else f"{len(sources)} files" if sources else "data"


def _grouped(faults: Sequence[Fault]) -> list[list[Fault]]:
    groups: dict[tuple[str, str, str], list[Fault]] = {}
    for fault in faults:
        # Reasons that differ in a number only, such as a count of tokens, are one kind.
        groups.setdefault((fault.source, fault.field, re.sub(r"\d+", "0", fault.reason)), []).append(fault)
    return list(groups.values())


def _rows_of(group: Sequence[Fault], source: str) -> str:
    numbers = list(dict.fromkeys(fault.row for fault in group))
    named = ", ".join(f"{number:,}" for number in numbers[:_ROWS_NAMED])
    more = f" and {len(numbers) - _ROWS_NAMED:,} more" if len(numbers) > _ROWS_NAMED else ""
    file = "" if group[0].source == source else f"{group[0].source} "
    return f"{file}{'rows' if len(numbers) > 1 else 'row'} {named}{more}"


def write_rejected(path: str | Path, faults: Sequence[Fault]) -> None:
    """One JSON line for each fault, ``{source, row, field, reason, content}``; content is the row as it was read.

    The file is replaced as a whole, so that a kill leaves the old one or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a run folder removes leftovers of this name
    with partial.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(vars(fault), default=str) + "\n" for fault in faults)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def check_fraction(faults: Sequence[Fault], total: int, max_bad_fraction: float) -> None:
    """Stop where too much of the data is bad.

    Args:
        total: rows read, with the bad ones.
        max_bad_fraction: ``data.max_bad_fraction``, from 0 to 1.

    Raises:
        AlignError: more than this fraction cannot be used, or no row can.
    """
    bad = bad_rows(faults)
    if bad <= max_bad_fraction * total and bad < total:
        return
    raise AlignError(
        f"{fault_report(faults, total)}\n"
        f"{100 * bad / total:.1f} % of the rows is over data.max_bad_fraction {max_bad_fraction:g}: "
        "mend the data, or raise the limit if what is left is enough"
    )


def describe(table: Table, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None) -> str:
    """The whole picture of one source: kinds of rows, repeats, strengths, lengths, faults.

    Args:
        tokenizer: adds lengths in tokens, moved boundaries, and what ``max_length`` (tokens) cuts.
    """
    used = "pair" if isinstance(table, PairTable) else "completion"
    facts = [("kinds of rows", _kinds(table)), *_repeats(table)]
    if table.unused:
        facts.append(("not read", "columns " + ", ".join(f"{name} ({n:,})" for name, n in table.unused.items())))
    if isinstance(table, PairTable):
        facts.append(("strength", _strengths(table.rows)))
        if table.counts["soft_labels"]:
            facts.append(("preference", _soft_labels(table.rows)))
        facts.append(("longer answer", _longer(table.rows)))
    lengths = _lengths("characters", {name: [_characters(c) for c in column] for name, column in _columns(table)})
    faults = list(table.faults)
    if tokenizer is not None:
        tokenized = _tokenize(table, tokenizer, None)
        lengths += _lengths("tokens", _token_lengths(tokenized))
        if max_length is not None:
            tokenized = _tokenize(table, tokenizer, max_length)
            facts.append((f"max_length {max_length:,}", _cuts(tokenized)))
        facts += _token_facts(tokenized)
        faults += tokenized.faults
    lines = [f"{table.source}: {_of(table.counts['rows'], 'row')}, {_of(len(table.rows), used)}"]
    lines += [f"  {name:<15} {fact}" for name, fact in facts]
    lines += lengths
    if faults:
        lines += ["", fault_report(faults, table.counts["rows"])]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Least, most and middle of some numbers."""
    ordered = sorted(values)
    return f"{ordered[0]:g} to {ordered[-1]:g}, median {ordered[len(ordered) // 2]:g}" if ordered else "none"


def left_aside(table: Table) -> list[str]:
    """The lines that end the picture of a source: columns that nobody reads, and faults."""
    lines = []
    if table.unused:
        lines.append(f"  {'not read':<15} columns " + ", ".join(f"{name} ({n:,})" for name, n in table.unused.items()))
    if table.faults:
        lines += ["", fault_report(table.faults, table.counts["rows"])]
    return lines


def _of(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def _kinds(table: Table) -> str:
    names = {
        "explicit_prompt": "with prompt",
        "implicit_prompt": "with the prompt inside the answers",
        "rankings": "ranked",
        "signed_pairs": "with a signed strength",
        "ratings": "rated",
        "prompt_completion": "with prompt and completion",
        "messages": "conversations",
        "text": "plain text",
        "chosen": "pairs, chosen answer",
        "set_aside": "set aside",
    }
    return " · ".join(f"{table.counts[key]:,} {name}" for key, name in names.items() if table.counts.get(key))


def _repeats(table: Table) -> list[tuple[str, str]]:
    counts = table.counts
    if isinstance(table, CompletionTable):
        return [("duplicates", f"{counts['duplicates']:,}")]
    duplicates, contradictions = repeats(table.rows)
    facts = [
        ("duplicates", f"{counts['duplicates']:,}{_examples(duplicates)}"),
        ("contradictions", f"{counts['contradictions']:,}{_examples(contradictions)}"),
    ]
    if counts["ties"]:
        facts.append(("ties", f"{counts['ties']:,} (of rank, of rating or in a judgement: no pair)"))
    if counts["prompt_repeated"]:
        facts.append(("repeated", f"{counts['prompt_repeated']:,} (both answers begin with the text of their prompt)"))
    return facts


def _examples(found: Sequence[tuple[PairRow, PairRow]]) -> str:
    if not found:
        return ""
    shown = "; ".join(f"{one.row:,} and {other.row:,}" for one, other in found[:_ROWS_NAMED])
    return f" (rows {shown}{'; ...' if len(found) > _ROWS_NAMED else ''})"


def _strengths(rows: Sequence[PairRow]) -> str:
    values = sorted(row.strength for row in rows)
    if not values or values[0] == values[-1]:
        return f"{values[0]:g} for every pair" if values else "no pair"
    return spread(values)


def _soft_labels(rows: Sequence[PairRow]) -> str:
    values = sorted(row.preference for row in rows if row.preference is not None)
    against = sum(value < 0.5 for value in values)
    some = f"{len(values):,} of {_of(len(rows), 'pair')}: " if len(values) < len(rows) else ""
    less = f" · under 1/2 in {against:,}: chosen is the less preferred there" if against else ""
    return f"{some}{spread(values)}{less}"


def _longer(rows: Sequence[PairRow]) -> str:
    if not rows:
        return "no pair"
    gaps = [_characters(row.chosen) - _characters(row.rejected) for row in rows]
    chosen, rejected = (sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps))
    chosen_share, rejected_share = 100 * chosen / len(gaps), 100 * rejected / len(gaps)
    return f"chosen in {chosen_share:.0f} % of the pairs, rejected in {rejected_share:.0f} % (characters)"


def _characters(content: Content) -> int:
    return len(content) if isinstance(content, str) else sum(len(message["content"]) for message in content)


def _columns(table: Table) -> list[tuple[str, list[Content]]]:
    names = ("prompt", "chosen", "rejected") if isinstance(table, PairTable) else ("prompt", "completion")
    return [(name, [getattr(row, name) for row in table.rows]) for name in names]


def _lengths(unit: str, columns: dict[str, list[int]]) -> list[str]:
    lines = ["", f"  {unit:<15} {'least':>8} {'5 %':>8} {'median':>8} {'95 %':>8} {'most':>8}"]
    for name, values in columns.items():
        if values:
            quantiles = np.quantile(values, [0, 0.05, 0.5, 0.95, 1], method="nearest")
            lines.append(f"  {name:<15} " + " ".join(f"{value:>8,}" for value in quantiles))
    return lines


def _tokenize(table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Tokenized:
    if isinstance(table, PairTable):
        return tokenize_pairs(table.rows, tokenizer, max_length)
    return tokenize_completions(table.rows, tokenizer, max_length)


def _token_lengths(tokenized: Tokenized) -> dict[str, list[int]]:
    if isinstance(tokenized, TokenizedPairs):
        names = ("prompt", "chosen", "rejected")
        return {name: [len(getattr(row, f"{name}_ids")) for row in tokenized.rows] for name in names}
    answers = [sum(row.completion_mask) for row in tokenized.rows]
    prompts = [len(row.input_ids) - n for row, n in zip(tokenized.rows, answers, strict=True)]
    return {"prompt": prompts, "completion": answers}


def _cuts(tokenized: Tokenized) -> str:
    cut = {key: n for key, n in tokenized.counts.items() if key.startswith("truncated_")}
    counts = " and ".join(f"{n:,} {key.removeprefix('truncated_')}" for key, n in cut.items())
    return f"cuts {counts} answers; sets aside {tokenized.counts['set_aside']:,}"


def _token_facts(tokenized: Tokenized) -> list[tuple[str, str]]:
    facts = [("boundary moved", f"{tokenized.counts['boundary_moved']:,} (answer begins before the prompt's end)")]
    if tokenized.counts["eos_inside"]:
        facts.append(
            (
                "end token",
                f"inside {_of(tokenized.counts['eos_inside'], 'answer')}: what follows it is never generated",
            )
        )
    return facts


def show_masks(tokenized: Tokenized, tokenizer: PreTrainedTokenizerBase, n: int = 8) -> Group:
    """The first ``n`` rows as the model gets them, for rich to print: the prompt dim, scored answers in colour.

    The labels say the same without colour. The end token stands in brackets; an answer that was cut says that it has
    none. Line ends are written out as \\n, and long texts lose their middle.
    """
    from rich.console import Group
    from rich.text import Text

    styles = {"prompt": "dim", "chosen": "green", "rejected": "yellow", "completion": "green"}
    lines = [Text("prompt: not scored · answers: scored, from their first token to the [end token]")]
    rows: Sequence[TokenizedPair | TokenizedCompletion] = tokenized.rows[:n]
    for number, row in enumerate(rows, start=1):
        parts = _parts(row)
        tokens = " · ".join(f"{name} {len(ids):,}" for name, ids in parts.items())
        weights = ""
        if isinstance(row, TokenizedPair):
            weights = f" · strength {row.strength:g}"
            weights += "" if row.preference is None else f" · preference {row.preference:g}"
        thumb = getattr(row, "label", None)
        if thumb is not None:  # a TokenizedThumb
            weights = f" · thumb {'up' if thumb else 'down'}"
        lines.append(Text(f"\n{number}  {tokens} tokens{weights} · {row.row_id}", style="bold"))
        for name, ids in parts.items():
            line = Text(f"  {name:<11}").append(*_shown(ids, name, tokenizer, styles.get(name, "green")))
            lines.append(line.append(*_end(ids, tokenizer)) if name != "prompt" else line)
    return Group(*lines)


def _parts(row: TokenizedPair | TokenizedCompletion) -> dict[str, list[int]]:
    if isinstance(row, TokenizedPair):
        return {"prompt": row.prompt_ids, "chosen": row.chosen_ids, "rejected": row.rejected_ids}
    if not any(row.completion_mask):  # the answers are still to be drawn, or are several: a TokenizedGroup
        several = getattr(row, "answer_ids", ())
        return {"prompt": row.input_ids, **{f"answer {place}": ids for place, ids in enumerate(several, start=1)}}
    start = row.completion_mask.index(1)
    return {"prompt": row.input_ids[:start], "completion": row.input_ids[start:]}


def _shown(ids: list[int], name: str, tokenizer: PreTrainedTokenizerBase, style: str) -> tuple[str, str]:
    ended = name != "prompt" and ids[-1] == tokenizer.eos_token_id
    text = str(tokenizer.decode(ids[:-1] if ended else ids)).replace("\n", "\\n")
    if len(text) > _TEXT_SHOWN:
        text = f"{text[: _TEXT_SHOWN // 2]} ... {text[-_TEXT_SHOWN // 2 :]}"
    return text, style


def _end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    return (f"[{tokenizer.eos_token}]", "bold") if ids[-1] == tokenizer.eos_token_id else ("[cut, no end]", "bold red")
