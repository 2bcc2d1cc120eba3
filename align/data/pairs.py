"""From rows to pairs: which answer is preferred, and how strongly.

Kinds of rows:

- ``prompt, chosen, rejected`` and, if given, ``strength`` above 0, the weight of the pair in the mean loss, and
  ``preference`` in [0, 1], the probability that ``chosen`` is the preferred answer (a soft label; 0.5 is a tie), and
  ``margin``, 0 or more, for reward models.
- ``chosen, rejected``: the prompt is what they share at the beginning (``fields.resolve``).
- ``prompt, response_1, response_2, preference_strength`` from -3 (the first is much better) to 3 (the second is), as
  HelpSteer2-Preference has it (arXiv:2410.01257): its size is the strength of the pair, and its margin.
- ``prompt, completions, rank`` with 1 for the best: every two answers of different rank are a pair, with strength
  (rank gap) / (largest rank gap in the row).
- ``prompt, completions, ratings``, higher is better: every two answers of different rating are a pair, with strength
  (rating gap) / (range of all ratings of the source: highest less lowest).

Answers of equal rank or rating, or with a preference_strength of 0, give no pair, and are counted as ties.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from .fields import FieldError, check_size, collecting, content, required, resolve
from .load import Row, read_rows, usable
from .rows import Content, Fault, PairRow, PairTable, bad_rows, row_id

PAIR_FIELDS = ("prompt", "chosen", "rejected", "strength", "preference", "margin")
_RANKING_FIELDS = ("prompt", "completions", "rank", "ratings")
_SIGNED_FIELDS = ("prompt", "response_1", "response_2", "preference_strength")
_WANTED = (
    "[prompt,] chosen, rejected; or prompt, completions and rank or ratings; or prompt, response_1, response_2 and "
    "preference_strength"
)


@dataclass(frozen=True)
class Comparison:
    """Two answers in one form. ``gap`` is the strength, or a difference of ratings that waits for the range of all."""

    prompt: Content
    chosen: Content
    rejected: Content
    gap: float
    preference: float | None = None
    margin: float | None = None


def read_pairs(source: str) -> PairTable:
    """Read and validate every row of ``source`` once (see ``load.read_rows`` for what a source may be).

    Raises:
        AlignError: the source is missing, empty or unreadable as a whole. A bad row raises nothing: it is a Fault.
    """
    return pair_table(read_rows(source), source)


def pair_table(rows: Iterable[Row], source: str = "") -> PairTable:
    """The pairs in ``(file, row number, fields)`` triples, as ``read_rows`` yields them."""
    counts = dict.fromkeys(("rows", "pairs", "set_aside", "explicit_prompt", "implicit_prompt", "rankings"), 0)
    counts |= dict.fromkeys(("ratings", "signed_pairs", "ties", "duplicates", "contradictions"), 0)
    counts |= dict.fromkeys(("prompt_repeated", "soft_labels"), 0)
    table = PairTable([], [], counts, source)
    unused: Counter[str] = Counter()
    all_ratings: list[float] = []
    rated: list[int] = []
    for file, number, row in usable(rows, table):
        problems: list[FieldError] = []
        kind = _kind(row)
        ranked, signed = kind in ("rankings", "ratings"), kind == "signed_pairs"
        comparisons = _ranked(row, kind, problems) if ranked else comparison(row, problems)
        unused.update(row.keys() - set(_RANKING_FIELDS if ranked else _SIGNED_FIELDS if signed else PAIR_FIELDS))
        table.faults += [Fault(file, number, problem.field, problem.reason, row) for problem in problems]
        if problems:
            continue
        counts[kind] += 1
        if kind == "ratings":
            all_ratings += row["ratings"]
            rated += range(len(table.rows), len(table.rows) + len(comparisons))
        if ranked:
            counts["ties"] += math.comb(len(row["completions"]), 2) - len(comparisons)
        if signed:
            counts["ties"] += not comparisons
        table.rows += [_pair(file, number, comparison) for comparison in comparisons]
    spread = max(all_ratings, default=0.0) - min(all_ratings, default=0.0)
    for index in rated:
        table.rows[index] = replace(table.rows[index], strength=table.rows[index].strength / spread)
    duplicates, contradictions = repeats(table.rows)
    counts["pairs"] = len(table.rows)
    counts["set_aside"] = bad_rows(table.faults)
    counts["duplicates"], counts["contradictions"] = len(duplicates), len(contradictions)
    counts["prompt_repeated"] = sum(_repeats_prompt(pair) for pair in table.rows)
    counts["soft_labels"] = sum(pair.preference is not None for pair in table.rows)
    table.unused = dict(unused)
    return table


def repeats(rows: Iterable[PairRow]) -> tuple[list[tuple[PairRow, PairRow]], list[tuple[PairRow, PairRow]]]:
    """``(duplicates, contradictions)``, each with the earlier row first.

    A duplicate is a further row with the same prompt, chosen and rejected. A contradiction is a pair that stands
    both ways round, counted once however often either way stands. Both are reported and kept: several annotators who
    agree or disagree are data.
    """
    first: dict[str, PairRow] = {}
    preferred: set[str] = set()
    duplicates, contradictions = [], []
    for row in rows:
        if row.row_id in first:
            duplicates.append((first[row.row_id], row))
            continue
        first[row.row_id] = row
        # An id takes long: it is asked for where some row has preferred what this one does not.
        if _last_text(row.rejected) in preferred:
            opposite = first.get(row_id(row.prompt, row.rejected, row.chosen))
            if opposite is not None:
                contradictions.append((opposite, row))
        preferred.add(_last_text(row.chosen))
    return duplicates, contradictions


def _last_text(answer: Content) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


def _kind(row: dict[str, Any]) -> str:
    if "completions" in row and "chosen" not in row:
        return "rankings" if row.get("ratings") is None else "ratings"
    if "response_1" in row and "chosen" not in row:
        return "signed_pairs"
    return "explicit_prompt" if "prompt" in row else "implicit_prompt"


def _pair(source: str, number: int, comparison: Comparison) -> PairRow:
    prompt, chosen, rejected = comparison.prompt, comparison.chosen, comparison.rejected
    name = row_id(prompt, chosen, rejected)
    labels = (comparison.gap, comparison.preference, comparison.margin)
    return PairRow(name, source, number, prompt, chosen, rejected, *labels)


def _repeats_prompt(pair: PairRow) -> bool:
    if not (isinstance(pair.prompt, str) and isinstance(pair.chosen, str) and isinstance(pair.rejected, str)):
        return False
    return pair.chosen.startswith(pair.prompt) and pair.rejected.startswith(pair.prompt)


def comparison(row: dict[str, Any], problems: list[FieldError]) -> list[Comparison]:
    """The one comparison of a row with chosen and rejected, or of two responses with their preference_strength.

    None where the responses are as good, or where ``problems`` grew.
    """
    return _signed(row, problems) if _kind(row) == "signed_pairs" else compared(row, problems)


def compared(row: dict[str, Any], problems: list[FieldError]) -> list[Comparison]:
    """The one comparison of a row with chosen and rejected; none where ``problems`` grew."""
    prompt: Content | None = None
    answers: dict[str, Content] = {}
    strength, preference, margin = 1.0, None, None
    if "prompt" in row:
        with collecting(problems):
            prompt = content("prompt", required("prompt", row, _WANTED))
    for name in ("chosen", "rejected"):
        with collecting(problems):
            answers[name] = content(name, required(name, row, _WANTED))
    with collecting(problems):
        strength = _strength(row.get("strength"))
    with collecting(problems):
        preference = _preference(row.get("preference"))
    with collecting(problems):
        margin = _margin(row.get("margin"))
    if problems:
        return []
    with collecting(problems):
        _check_different(answers)
        prompt, resolved = resolve(prompt, answers)
        _check_different(resolved)
        return [Comparison(prompt, resolved["chosen"], resolved["rejected"], strength, preference, margin)]
    return []


def _signed(row: dict[str, Any], problems: list[FieldError]) -> list[Comparison]:
    """The one comparison of two responses; none where they are as good, or where ``problems`` grew."""
    prompt: Content = ""
    answers: dict[str, Content] = {}
    strength = 0.0
    with collecting(problems):
        prompt = content("prompt", required("prompt", row, _WANTED))
    for name in ("response_1", "response_2"):
        with collecting(problems):
            answers[name] = content(name, required(name, row, _WANTED))
    with collecting(problems):
        strength = _signed_strength(required("preference_strength", row, _WANTED))
    if problems or not strength:
        return []
    with collecting(problems):
        if answers["response_1"] == answers["response_2"]:
            raise FieldError("response_1", "equal to response_2, and one of them is preferred")
        prompt, resolved = resolve(prompt, answers)
        first, second = resolved["response_1"], resolved["response_2"]
        chosen, rejected = (first, second) if strength < 0 else (second, first)
        return [Comparison(prompt, chosen, rejected, abs(strength), margin=abs(strength))]
    return []


def _signed_strength(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -3 <= value <= 3:
        raise FieldError("preference_strength", f"{value!r} is not a number from -3 to 3")
    return float(value)


def _check_different(answers: Mapping[str, Content]) -> None:
    if answers["chosen"] == answers["rejected"]:
        raise FieldError("chosen", "equal to rejected")


def _strength(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldError("strength", f"{value!r} is not a number")
    if not 0 < value < math.inf:
        raise FieldError("strength", f"{value} is not a finite number above 0; leave out what is to have no weight")
    return float(value)


def _preference(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldError("preference", f"{value!r} is not a number in [0, 1]")
    if not 0 <= value <= 1:
        raise FieldError("preference", f"{value} is not in [0, 1]: it is the probability that chosen is preferred")
    return float(value)


def _margin(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FieldError("margin", f"{value!r} is not a finite number")
    if value < 0:
        raise FieldError("margin", f"{value} is negative: chosen is the answer that is to score higher")
    return check_size("margin", float(value))


def _ranked(row: dict[str, Any], kind: str, problems: list[FieldError]) -> list[Comparison]:
    prompt: Content = ""
    answers: dict[str, Content] = {}
    scores: list[float] = []
    with collecting(problems):
        prompt = content("prompt", required("prompt", row, _WANTED))
    with collecting(problems):
        answers = _completions(required("completions", row, _WANTED), problems)
    with collecting(problems):
        scores = _scores(row)
    if problems:
        return []
    with collecting(problems):
        prompt, resolved = resolve(prompt, answers)
        return _by_score(prompt, resolved, scores, 1.0 if kind == "ratings" else max(scores) - min(scores))
    return []


def _completions(values: Any, problems: list[FieldError]) -> dict[str, Content]:
    if not isinstance(values, list):
        raise FieldError("completions", "not a list of answers (CSV holds none: use JSONL or Parquet)")
    if len(values) < 2:
        raise FieldError("completions", f"{len(values)} answer: a comparison needs two")
    answers: dict[str, Content] = {}
    for number, value in enumerate(values, start=1):
        with collecting(problems):
            answers[f"completions {number}"] = content(f"completions {number}", value)
    return answers


def _scores(row: dict[str, Any]) -> list[float]:
    """One number per completion, higher is better: the ratings, or the ranks with their sign turned."""
    if row.get("rank") is not None and row.get("ratings") is not None:
        raise FieldError("rank", "given beside ratings: keep one of the two")
    name = "rank" if row.get("ratings") is None else "ratings"
    values = required(name, row, _WANTED)
    if not isinstance(values, list):
        raise FieldError(name, "not a list with one number per completion")
    if isinstance(row.get("completions"), list) and len(values) != len(row["completions"]):
        raise FieldError(name, f"{len(values)} numbers for {len(row['completions'])} completions")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FieldError(name, f"{value!r} is not a finite number")
        if name == "rank" and (value < 1 or value != int(value)):
            raise FieldError(name, f"{value!r} is not a rank: ranks are whole numbers from 1, the best")
    return [float(-value if name == "rank" else value) for value in values]


def _by_score(prompt: Content, answers: Mapping[str, Content], scores: list[float], unit: float) -> list[Comparison]:
    comparisons = []
    for (one, answer_one, score_one), (other, answer_other, score_other) in combinations(
        zip(answers, answers.values(), scores, strict=True), 2
    ):
        if score_one == score_other:
            continue
        if answer_one == answer_other:
            raise FieldError(other, f"equal to {one}, but not of the same rank or rating")
        better, worse = (answer_one, answer_other) if score_one > score_other else (answer_other, answer_one)
        comparisons.append(Comparison(prompt, better, worse, abs(score_one - score_other) / unit))
    return comparisons
