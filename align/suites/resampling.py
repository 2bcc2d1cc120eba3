"""Sampling until a verifier passes: what a verifier that lets mistakes through allows, from samples that were judged.

The data are samples, a row each: ``problem`` (its name), ``passed`` (by the verifier, such as a task's own tests) and
``correct`` (the truth, such as more and better tests); ``model``, where they are of several. No model is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from rich.table import Table
from rich.text import Text

from align.config.section import Section
from align.data.fields import FieldError, collecting, required
from align.data.load import read_rows
from align.data.rows import Fault, bad_rows
from align.errors import AlignError, ConfigError
from align.evals.resampling import (
    Outcomes,
    curve_interval,
    find_optimal_k,
    optimal_k_interval,
    resampled,
    sampled_outcomes,
    verifier_metrics,
)
from align.evals.result import compared_result, suite_result
from align.evals.statistics import bootstrap_interval, comparisons, share_interval

from .asked import Asked, tell_faults
from .shown import estimate, printer

WANTED = "problem, passed, correct; model where samples are of several"
TRUTH = {"true": True, "1": True, "false": False, "0": False}
SAME = (
    "verifier and metric agree on every sample. If they are one check, this only says what the check says of itself: "
    "mistakes that it lets through are not seen. Judge correct by something stronger than what chose the answers."
)


class Settings(Section):
    """What mistakes and samples cost."""

    costs: list[Annotated[float, Field(ge=0)]] = Field(default=[0.0, 1.0, 4.0], min_length=1)
    """What a wrong answer costs, where a correct one is worth 1 and none 0; each has a best number of samples."""
    price: float = Field(default=0.0, ge=0)
    """What a sample costs."""
    samples: int | None = Field(default=None, ge=1)
    """The largest number of samples to look at; null: as many as the problem with the fewest has."""


@dataclass
class Counts:
    """Samples of one problem."""

    n: int = 0
    correct: int = 0
    right: int = 0
    wrong: int = 0

    def add(self, passed: bool, correct: bool) -> None:
        """One more; ``right`` and ``wrong`` are those that passed."""
        self.n += 1
        self.correct += correct
        self.right += passed and correct
        self.wrong += passed and not correct


def run(asked: Asked, settings: Settings) -> dict[str, Any]:
    """Curves, ceilings and the best number of samples of each model in the data.

    Returns:
        ``align.evals.result.compared_result``, where each model has ``curves``: ``k``, and ``answered``, ``correct``,
        ``wrong``, ``samples`` and ``perfect`` (a verifier that knows the truth: pass@k), each as
        ``{value, low, high}`` by k, and ``utility`` by cost, too; ``best``: by cost, the best k with its interval
        (``k``), the utility there, and whether it is the largest that was looked at (``at_edge``). Best values are
        chosen on the problems that they are told of, so that they are a little too good. ``warnings`` says what to
        mind.

    Raises:
        AlignError: no row can be used, the models' problems differ, or a problem has fewer samples than asked for.
        ConfigError: models are named, which nothing here would ask.
    """
    asked.refuse_models("resampling", "samples that were judged, --data")
    counts, facts = _read(asked.source, asked.rejected)
    names = _same_problems(counts)
    fewest = min(one.n for problems in counts.values() for one in problems.values())
    most = settings.samples or fewest
    if most > fewest:
        model, problem = next((m, p) for m, ps in counts.items() for p, one in ps.items() if one.n < most)
        raise AlignError(
            f"samples={most}: problem {problem!r} of {model} has {counts[model][problem].n} samples: set samples to "
            f"{fewest} or less, or draw more (beyond them nothing is known without a bias)"
        )
    against = asked.reference or next(iter(counts))
    if against not in counts:
        raise ConfigError("align eval", [("--reference", f"'{against}' is none of {', '.join(counts)}")])
    models, vectors, warnings = {}, {}, []
    for model, problems in counts.items():
        models[model], vectors[model] = _measured([problems[name] for name in names], names, most, settings)
        if all(one.correct == one.right and not one.wrong for one in problems.values()):
            warnings.append(f"{model}: {SAME}")
    return compared_result(
        "resampling",
        models,
        comparisons(vectors, against=against),
        facts,
        against if len(counts) > 1 else None,
        {**settings.model_dump(), "samples": most},
        warnings=warnings,
    )


def _measured(
    problems: list[Counts], names: list[str], most: int, settings: Settings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result of one model, and what it is compared by."""
    n, good, right, wrong = (
        np.array(column) for column in zip(*(vars(one).values() for one in problems), strict=True)
    )
    outcomes = sampled_outcomes(n, right, wrong, np.arange(most + 1))
    metrics = verifier_metrics(n, good, right, wrong)
    metrics |= {f"{name}_at_{most}": share_interval(getattr(outcomes, name)[:, -1]) for name in ("correct", "wrong")}
    drawn = resampled(outcomes)
    curves: dict[str, Any] = {"k": outcomes.k.tolist(), "utility": {}}
    for name in ("answered", "correct", "wrong", "samples"):
        curves[name] = curve_interval(getattr(outcomes, name), getattr(drawn, name))
    perfect = sampled_outcomes(n, good, np.zeros_like(n), outcomes.k)
    curves["perfect"] = curve_interval(perfect.correct, resampled(perfect).correct)
    vectors = {"accuracy": good / n, f"correct_at_{most}": outcomes.correct[:, -1]}
    vectors[f"wrong_at_{most}"] = outcomes.wrong[:, -1]
    best = {}
    for cost in settings.costs:
        utility, found = outcomes.utility(cost, settings.price), find_optimal_k(outcomes, cost, settings.price)
        curves["utility"][f"{cost:g}"] = curve_interval(utility, drawn.utility(cost, settings.price))
        vectors[f"best_utility_at_cost_{cost:g}"] = at_best = utility[:, found.k]
        metrics[f"best_k_at_cost_{cost:g}"] = k = optimal_k_interval(outcomes, drawn, cost, settings.price)
        metrics[f"best_utility_at_cost_{cost:g}"] = value = bootstrap_interval(at_best)
        best[f"{cost:g}"] = {"k": k.as_dict(), "utility": value.as_dict(), "at_edge": found.at_edge}
    rows = [_row(name, one, outcomes, place) for place, (name, one) in enumerate(zip(names, problems, strict=True))]
    result = suite_result("resampling", metrics, rows, {**settings.model_dump(), "samples": most})
    return {**result, "curves": curves, "best": best}, vectors


def _row(name: str, one: Counts, outcomes: Outcomes, place: int) -> dict[str, Any]:
    passed = one.right + one.wrong
    return {
        "row_id": name,
        "samples": one.n,
        "correct": one.correct,
        "passed_correct": one.right,
        "passed_wrong": one.wrong,
        "ceiling": one.right / passed if passed else None,
        f"correct_at_{outcomes.k[-1]}": float(outcomes.correct[place, -1]),
        f"wrong_at_{outcomes.k[-1]}": float(outcomes.wrong[place, -1]),
    }


def show(result: Mapping[str, Any]) -> None:
    """Print what each verifier lets through, what comes of more samples, the best numbers of them, and warnings."""
    console = printer()
    data, models = result["data"], result["models"]
    console.print(f"{data['samples']:,} samples of {result['n']:,} problems in {data['source']}", soft_wrap=True)
    table = _table("a sample is correct", "correct ones pass", "wrong ones pass", "ceiling")
    for name, found in models.items():
        metrics = found["metrics"]
        columns = ("accuracy", "completeness", "false_positives", "ceiling")
        table.add_row(Text(name), *(estimate(metrics[c], ".1%") if c in metrics else "" for c in columns))
    console.print(table)
    most = result["settings"]["samples"]
    shown = [k for k in (2**power for power in range(most.bit_length())) if k < most] + [most]
    console.print(Text("\nAnswers, by samples allowed: correct + wrong; a verifier that knew the truth"), style="dim")
    table = _table(*map(str, shown))
    for name, found in models.items():
        correct, wrong, perfect = (found["curves"][curve]["value"] for curve in ("correct", "wrong", "perfect"))
        table.add_row(Text(name), *(f"{correct[k]:.1%} + {wrong[k]:.1%}; {perfect[k]:.1%}" for k in shown))
    console.print(table)
    price = result["settings"]["price"]
    console.print(
        Text(f"\nBest number of samples, by the cost of a wrong answer; a sample costs {price:g}"), style="dim"
    )
    costs = list(next(iter(models.values()))["best"])
    table = _table(*costs)
    for name, found in models.items():
        table.add_row(Text(name), *(_best(found["best"][cost]) for cost in costs))
    console.print(table)
    for warning in result["warnings"]:
        console.print(Text(f"\n{warning}"), style="yellow", soft_wrap=True)


def _best(best: Mapping[str, Any]) -> str:
    k = estimate(best["k"], ".0f") + (" (all that there are)" if best["at_edge"] else "")
    return f"{k}: {best['utility']['value']:+.3f}"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _read(source: str, rejected: Path) -> tuple[dict[str, dict[str, Counts]], dict[str, Any]]:
    """Counts by model and problem, and what a result says of the data."""
    counts: dict[str, dict[str, Counts]] = defaultdict(lambda: defaultdict(Counts))
    faults: list[Fault] = []
    samples: Counter[str] = Counter()
    rows = 0
    for file, number, row in read_rows(source):
        rows += 1
        if isinstance(row, Fault):
            faults.append(row)
            continue
        problems: list[FieldError] = []
        model = problem = ""
        passed = correct = False
        with collecting(problems):
            model = _name("model", row.get("model", "samples"))
        with collecting(problems):
            problem = _name("problem", required("problem", row, WANTED))
        with collecting(problems):
            passed = _truth("passed", required("passed", row, WANTED), file)
        with collecting(problems):
            correct = _truth("correct", required("correct", row, WANTED), file)
        if problems:
            faults += [Fault(file, number, fault.field, fault.reason, row) for fault in problems]
            continue
        counts[model][problem].add(passed, correct)
        samples[json.dumps([model, problem, passed, correct])] += 1
    tell_faults(faults, rows, rejected)
    if not counts:
        raise AlignError(f"{source}: no row can be used; a row is a sample: {WANTED}")
    digest = hashlib.sha256("\n".join(f"{sample} {n}" for sample, n in sorted(samples.items())).encode()).hexdigest()
    facts = {
        "source": source,
        "sha256": digest,
        "rows": rows,
        "set_aside": bad_rows(faults),
        "samples": samples.total(),
    }
    return {model: dict(problems) for model, problems in counts.items()}, facts


def _same_problems(counts: Mapping[str, Mapping[str, Counts]]) -> list[str]:
    first, *others = counts
    for other in others:
        different = sorted(counts[first].keys() ^ counts[other].keys())
        if different:
            has, lacks = (first, other) if different[0] in counts[first] else (other, first)
            raise AlignError(
                f"problem {different[0]!r} has samples of {has} and none of {lacks}, as have {len(different) - 1} "
                "others: models are compared on the same problems"
            )
    return sorted(counts[first])


def _name(field: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise FieldError(field, f"{value!r} is no name: text or a whole number")
    return str(value)


def _truth(field: str, value: Any, file: str) -> bool:
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    if isinstance(value, str) and file.lower().endswith((".csv", ".csv.gz")):  # whose cells are all text
        known = TRUTH.get(value.strip().lower())
        if known is not None:
            return known
    raise FieldError(field, f"{value!r} is not true or 1, false or 0")
