"""From rows to single answers, for ``method: sft``.

Kinds of rows:

- ``prompt, completion``.
- ``messages``: a conversation; its last assistant turn is the answer, all before it is the prompt.
- ``text``: plain text without a prompt; all of it is learnt.
- pairs (``[prompt,] chosen, rejected``), checked as pairs: the chosen answer is learnt.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from .fields import EMPTY, FieldError, collecting, content, required, resolve
from .load import read_rows, usable
from .pairs import PAIR_FIELDS, compared
from .rows import CompletionRow, CompletionTable, Content, Fault, bad_rows, row_id

_FIELDS = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "chosen": PAIR_FIELDS,
}
_WANTED = "prompt, completion; or messages; or text; or [prompt,] chosen, rejected"


def read_completions(source: str) -> CompletionTable:
    """Read and validate every row of ``source`` once (see ``load.read_rows`` for what a source may be).

    Raises:
        AlignError: the source is missing, empty or unreadable as a whole. A bad row raises nothing: it is a Fault.
    """
    counts = dict.fromkeys(("rows", "completions", "set_aside", *_FIELDS, "duplicates"), 0)
    table = CompletionTable([], [], counts, source)
    unused: Counter[str] = Counter()
    for file, number, row in usable(read_rows(source), table):
        problems: list[FieldError] = []
        kind = _kind(row)
        found = _answer(row, kind, problems)
        unused.update(row.keys() - set(_FIELDS[kind]))
        table.faults += [Fault(file, number, problem.field, problem.reason, row) for problem in problems]
        if found is not None:
            counts[kind] += 1
            table.rows.append(CompletionRow(row_id(*found), file, number, *found))
    counts["completions"] = len(table.rows)
    counts["set_aside"] = bad_rows(table.faults)
    counts["duplicates"] = len(table.rows) - len({row.row_id for row in table.rows})
    table.unused = dict(unused)
    return table


def _kind(row: dict[str, Any]) -> str:
    if "completion" not in row:
        for kind in ("messages", "text", "chosen"):
            if kind in row:
                return kind
    return "prompt_completion"


def _answer(row: dict[str, Any], kind: str, problems: list[FieldError]) -> tuple[Content, Content] | None:
    """Prompt and answer; None where ``problems`` grew."""
    if kind == "chosen":
        return next(((pair.prompt, pair.chosen) for pair in compared(row, problems)), None)
    prompt: Content | None = None
    answer: Content = ""
    name = kind if kind in row else "completion"
    if kind == "prompt_completion":
        with collecting(problems):
            prompt = content("prompt", required("prompt", row, _WANTED))
    with collecting(problems):
        answer = content(name, required(name, row, _WANTED))
    if problems:
        return None
    with collecting(problems):
        if kind == "text":
            return "", _text(answer)
        if kind == "messages":
            _check_conversation(answer)
        prompt, answers = resolve(prompt, {name: answer})
        return prompt, answers[name]
    return None


def _text(answer: Content) -> str:
    if not isinstance(answer, str):
        raise FieldError("text", "messages: name the field messages")
    if not answer.strip():
        raise FieldError("text", EMPTY)
    return answer


def _check_conversation(answer: Content) -> None:
    if isinstance(answer, str):
        raise FieldError("messages", "text: name the field text")
    if len(answer) < 2:
        raise FieldError("messages", f"{len(answer)} message: wanted a prompt and an assistant turn at least")
