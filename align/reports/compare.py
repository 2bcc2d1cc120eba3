"""``compare.html``: several runs on one page that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from align.errors import ConfigError
from align.evals.result import short_names
from align.tracking.files import make_room, write_text

from .compared import (
    data_table,
    metrics_table,
    paired_differences,
    recipe_difference,
    result_answers,
    run_answers,
    side_by_side,
)
from .drawing import COLOURS, Picture, Series, curve, histogram
from .facts import capitalise, judge, method_name, model_name
from .figures import CURVES, finite, logged
from .measures import interval_words
from .record import RunRecord, read_run
from .report import STATUS, asset, decimals, html_environment
from .results import read_result, shown_result


def render_comparison(runs: Sequence[Path], results: Sequence[Path], target: Path) -> Path:
    """Write the page: what differs between the runs, from their recipes to their answers.

    Args:
        runs: two to six run folders; the others are compared with the first.
        results: files of ``align eval``, to show too.
        target: the page.

    Returns:
        The path of the page.

    Raises:
        AlignError: a folder is no run, a file is no result, or the page cannot be written.
        ConfigError: fewer than two runs, more than there are colours for, or one run twice.
    """
    folders = [run.resolve() for run in runs]
    if not 2 <= len(folders) <= len(COLOURS):
        raise ConfigError("align report", [("RUN", f"{len(folders)} runs; a page compares 2 to {len(COLOURS)}")])
    if len(set(folders)) < len(folders):
        raise ConfigError("align report", [("RUN", "one run is given twice")])
    make_room(target)
    records, read = [read_run(run) for run in runs], [read_result(path) for path in results]
    write_text(target, _page(records, read).encode("utf-8", "replace").decode("utf-8"))
    return target


def breakable(text: str) -> Markup:
    """Lines may end after the dots, colons, slashes and underscores of a name."""
    return Markup(re.sub(r"([._:/])", r"\1<wbr>", str(Markup.escape(text))))


def _page(records: Sequence[RunRecord], results: Sequence[Mapping[str, Any]]) -> str:
    names = short_names([str(record.path.resolve()) for record in records])
    environment = html_environment()
    environment.filters |= {"decimals": decimals, "capitalise": capitalise, "breakable": breakable}
    script = asset("compare.js")
    recipe, same = recipe_difference(records, names)
    drawn = next((r for r in results if r["suite"] == "generation" and r.get("models")), None)
    answers = run_answers(records, names) if drawn is None else result_answers(drawn, len(COLOURS))
    samples, shared = side_by_side(answers)
    return environment.get_template("compare.html.j2").render(
        title=f"{len(records)} runs compared",
        css=Markup(asset("report.css")),
        js=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        runs=[_run(record, name) for record, name in zip(records, names, strict=True)],
        recipe=recipe,
        same=same,
        data=data_table(records, names),
        metrics=metrics_table(records, names),
        intervals=next(filter(None, map(interval_words, records)), ""),
        differences=paired_differences(records, names),
        curves=_curves(records, names),
        distributions=_distributions(records, names),
        results=[shown_result(result) for result in results],
        samples=samples,
        shared=shared,
        answerers=[one.name for one in answers],
        judges=sorted({found for record in records if (found := judge(record))}) if drawn is None else [],
    )


def _run(record: RunRecord, name: str) -> dict[str, str]:
    steps = f"{record.last_step} steps" if record.metrics else "no steps"
    return {
        "name": name,
        "what": f"{method_name(record.recipe)} on {model_name(record)}, {steps}",
        "path": str(record.path),
        "status": STATUS.get(record.manifest.get("status", ""), ""),
    }


def _curves(records: Sequence[RunRecord], names: Sequence[str]) -> list[Picture]:
    """The curves of a run's report, of all runs: the first line of each solid, the second dashed."""
    pictures = []
    methods = {method_name(record.recipe) for record in records}
    pairs = any("rewards/accuracies" in row for record in records for row in record.metrics)
    for title, label, caption, lines in CURVES:
        if title == "Token accuracy" and pairs:
            continue
        series = [
            Series(
                f"{run}, {found.name}" if kind else run,
                found.y,
                found.x,
                colour=place,
                dashed=kind == 1,
                legend=not kind,
            )
            for place, (record, run) in enumerate(zip(records, names, strict=True))
            for kind, (name, key) in enumerate(lines)
            if (found := logged(record.metrics, name, key)) is not None
        ]
        if series:
            if len({line.dashed for line in series}) == 2:
                caption += f" Solid: {lines[0][0]}; dashed: {lines[1][0]}."
            if title == "Loss" and len(methods) > 1:
                caption += " Losses of different methods are on scales of their own."
            pictures.append(curve(title, label, caption, series))
    return pictures


def _of_run(line: Series, run: str, place: int, kind: int) -> Series:
    name = f"{run}, {line.name}" if kind else run
    return Series(name, line.y, line.x, colour=place, dashed=kind == 1, legend=kind == 0)


def _distributions(records: Sequence[RunRecord], names: Sequence[str]) -> list[Picture]:
    """Histograms over the rows of the runs' own evaluations."""

    def values(suite: str, of: Any) -> list[Series]:
        columns = [finite([of(row) for row in record.evals.get(suite, {}).get("rows", [])]) for record in records]
        return [
            Series(name, column, colour=place, dashed=False)
            for place, (name, column) in enumerate(zip(names, columns, strict=True))
            if column
        ]

    def margin(row: Mapping[str, Any]) -> float | None:
        rewards = row.get("chosen_reward"), row.get("rejected_reward")
        return None if None in rewards else rewards[0] - rewards[1]  # type: ignore[operator]

    wanted = (
        ("Scores of the answers", "score", "Held-out prompts.", "generation", lambda row: row["after"]["reward"]),
        ("Answer length", "tokens", "Held-out prompts.", "generation", lambda row: row["after"]["tokens"]),
        (
            "Margin",
            "reward",
            "Implicit reward of chosen over rejected answers, held-out, in the units of each run's loss.",
            "preference",
            margin,
        ),
        ("Margin of reward models", "reward", "Held-out pairs.", "reward", margin),
        (
            "Log-prob change of chosen answers",
            "nats per answer",
            "Held-out pairs, against each run's reference.",
            "displacement",
            lambda row: row["chosen_delta"],
        ),
    )
    return [
        histogram(title, label, caption, series)
        for title, label, caption, suite, of in wanted
        if (series := values(suite, of))
    ]
