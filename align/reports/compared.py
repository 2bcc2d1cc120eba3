"""What differs between runs: recipes, data, measured numbers, row by row where the rows agree, and their answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.evals.result import short_names
from align.evals.row_values import GROUP, row_key
from align.evals.statistics import CLEAR, holm, paired_difference, paired_p

from .facts import data_rows
from .measures import NATS, PERCENT, POINTS, TOKENS, Measure, measures, number, unit
from .record import RunRecord

SAMPLES = 50
LONGEST = 120
"""Characters of a value of a recipe."""
ALWAYS = ("source", "sha256", "rows")
"""Of the data, also where all runs have the same."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Lines with a name and a cell a column; ``None`` where there is nothing."""

    columns: Sequence[str]
    lines: Sequence[tuple[str, Sequence[Any]]]


@dataclass(frozen=True)
class Paired:
    """What can be compared row by row.

    Attributes:
        suite: whose rows.
        label, kind: of the value, as in ``measures``.
        value: of a row; None where it has none.
        same: setting of the suite that must be equal for the values to be of one kind.
    """

    suite: str
    label: str
    kind: str
    value: Callable[[Row], float | None]
    same: str = ""


def _right(row: Row) -> float | None:
    margin = row["score"] if "score" in row else row["chosen_reward"] - row["rejected_reward"]
    label = row.get("preference", 1.0)
    return None if label == 0.5 else 0.5 if margin == 0 else float((margin > 0) == (label > 0.5))


def _won(row: Row) -> float:
    before, after = row["before"]["reward"], row["after"]["reward"]
    return 0.5 if before == after else float(after > before)


PAIRED = (
    Paired("generation", "Win rate against the model before training", PERCENT, _won, "reward"),
    Paired("generation", "Score of the answers", POINTS, lambda row: row["after"]["reward"], "reward"),
    Paired("generation", "Answer length", TOKENS, lambda row: row["after"]["tokens"]),
    Paired("preference", "Preference accuracy on held-out pairs", PERCENT, _right),
    Paired("reward", "Held-out pairs ranked right by the reward model", PERCENT, _right),
    Paired(
        "displacement",
        "Log-prob change of chosen answers, per token",
        NATS,
        lambda row: row["chosen_delta"] / row["chosen_tokens"],
    ),
    Paired("displacement", "Log-prob change of rejected answers", NATS, lambda row: row["rejected_delta"]),
    Paired("displacement", "Chosen answers that became less likely", PERCENT, lambda row: row["chosen_delta"] < 0),
)


def recipe_difference(records: Sequence[RunRecord], names: Sequence[str]) -> tuple[Table, int]:
    """Keys whose values differ, a column a run, and how many are the same; the output folder always differs."""
    flat = [_leaves(record.recipe) for record in records]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key != "output"]
    different = [key for key in keys if len({json.dumps(one.get(key), sort_keys=True) for one in flat}) > 1]
    lines = [(key, [None if key not in one else _short(one[key]) for one in flat]) for key in different]
    return Table(names, lines), len(keys) - len(different)


def data_table(records: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """What was read, a column a run: where it is from, its rows, and counts that differ."""
    lines: list[tuple[str, list[str | None]]] = []
    for part, what in (("train", "training"), ("eval", "held-out")):
        sections = {name: record.section("data").get(part, {}) for name, record in zip(names, records, strict=True)}
        for label, cells in data_rows(sections):
            if label in ALWAYS or len({"0" if cell == "—" else cell for cell in cells}) > 1:
                lines.append((f"{what}: {label}", [None if cell == "—" else cell for cell in cells]))
    return Table(names, lines)


def metrics_table(records: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """Every measured number, a column a run."""
    found: list[dict[str, Measure]] = [{m.label: m for m in measures(record)} for record in records]
    longest = max(found, key=len, default={})
    labels = dict.fromkeys([*longest, *(label for one in found for label in one)])
    return Table(names, [(label, [one.get(label) for one in found]) for label in labels])


def paired_differences(records: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, Any]]:
    """Every run against the first one that has such rows, on the rows that both have; Holm over all of them.

    Returns:
        ``{label, run, against, value, interval, n, p, clear}`` each, ready to print; rows of one prompt go together.
    """
    found: list[dict[str, Any]] = []
    for paired in PAIRED:
        columns = [_column(record, paired) for record in records]
        base = next((place for place, column in enumerate(columns) if column), None)
        if base is None:
            continue
        for place in range(base + 1, len(records)):
            one, other = columns[base], columns[place]
            shared = [key for key in one if key in other]
            same = [record.evals.get(paired.suite, {}).get("settings", {}).get(paired.same) for record in records]
            if len(shared) < 2 or (paired.same and same[base] != same[place]):
                continue
            values = [one[key].value for key in shared], [other[key].value for key in shared]
            groups = [one[key].unit for key in shared]
            estimate = paired_difference(*values, groups=groups)
            found.append(
                {
                    "label": paired.label,
                    "run": names[place],
                    "against": names[base],
                    "value": signed(estimate.value, paired.kind) + unit(paired.kind),
                    "interval": ends(estimate.as_dict(), paired.kind),
                    "n": estimate.n,
                    "p": paired_p(*values, groups=groups),
                }
            )
    for entry, p in zip(found, holm([entry["p"] for entry in found]), strict=True):
        entry |= {"p": p_words(p), "clear": p < CLEAR}
    return found


@dataclass(frozen=True)
class Answers:
    """Answers of one run or model by prompt, and those that it is compared with."""

    name: str
    colour: int
    own: Mapping[str, Row]
    before: Mapping[str, Row]


def run_answers(records: Sequence[RunRecord], names: Sequence[str]) -> list[Answers]:
    """Of the runs' own evaluations; runs without any are left out."""
    found = []
    for place, (record, name) in enumerate(zip(records, names, strict=True)):
        rows = record.evals.get("generation", {}).get("rows", [])
        own, before = ({row["prompt"]: row[side] for row in rows} for side in ("after", "before"))
        if rows:
            found.append(Answers(name, place, own, before))
    return found


def result_answers(result: Row, most: int) -> list[Answers]:
    """Of a result of suite generation over several models."""
    models = result["models"]
    short = dict(zip(models, short_names(list(models)), strict=True))
    rows = {name: {row["prompt"]: row for row in one["rows"]} for name, one in models.items()}
    before = rows.get(result["reference"], {})
    others = [name for name in models if name != result["reference"]][:most]
    return [Answers(short[name], place, rows[name], before) for place, name in enumerate(others)]


def side_by_side(answers: Sequence[Answers]) -> tuple[list[dict[str, Any]], bool]:
    """The first prompts that all have answered, and whether all are compared with the same answers before."""
    if not answers:
        return [], True
    prompts = [prompt for prompt in answers[0].own if all(prompt in one.own for one in answers)][:SAMPLES]
    first = answers[0].before
    shared = all(one.before.get(p, {}).get("text") == first.get(p, {}).get("text") for one in answers for p in prompts)
    return [_sample(prompt, answers, shared) for prompt in prompts], shared


def _sample(prompt: str, answers: Sequence[Answers], shared: bool) -> dict[str, Any]:
    sides = [(one, one.own[prompt], one.before.get(prompt)) for one in answers]
    facts = {
        "scores": [own.get("reward") for _, own, _ in sides],
        "lengths": [own.get("tokens") for _, own, _ in sides],
        "gains": [_gain(own, before) for _, own, before in sides],
        "changed": [before is not None and own["text"] != before["text"] for _, own, before in sides],
    }
    shown = [{"name": one.name, "colour": one.colour, "own": own, "before": before} for one, own, before in sides]
    return {
        "prompt": prompt,
        "facts": json.dumps(facts),
        "baseline": answers[0].before.get(prompt) if shared else None,
        "sides": shown,
    }


def _gain(own: Row, before: Row | None) -> float | None:
    """By how much it is better: the annotator's preference over a half, or else the difference of the scores."""
    if own.get("preference") is not None:
        return float(own["preference"]) - 0.5
    if before is None or own.get("reward") is None or before.get("reward") is None:
        return None
    return float(own["reward"] - before["reward"])


@dataclass(frozen=True)
class _Value:
    """Of a row, and what the row goes together with."""

    value: float
    unit: Hashable


def _column(record: RunRecord, paired: Paired) -> dict[Hashable, _Value]:
    rows = record.evals.get(paired.suite, {}).get("rows", [])
    if paired.suite == "reward" and rows and "score" not in rows[0]:
        return {}  # ratings
    values = {row_key(row): (paired.value(row), row.get(GROUP, row_key(row))) for row in rows}
    return {key: _Value(float(value), unit) for key, (value, unit) in values.items() if value is not None}


def ends(entry: Row, kind: str) -> str:
    """``-0.1 to 0.2``, or nothing."""
    low, high = entry.get("low"), entry.get("high")
    return "" if low is None or high is None else f"{number(low, kind)} to {number(high, kind)}"


def signed(value: float, kind: str) -> str:
    """With a plus where it is one."""
    return ("+" if value > 0 else "") + number(value, kind)


def _leaves(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def p_words(p: float) -> str:
    """A p-value to print."""
    return "under 0.001" if p < 0.001 else f"{p:.3f}"
