"""A sweep: one recipe with a key at several values, or with several keys at a grid of values, each point a run.

Every run is an ordinary one, in ``<output>/<key>=<value>``: called again, it goes on where it stopped, and a finished
one stays as it is. The first run puts the reference's log-probs in the cache, and the others read them there
(``data.reference_cache``). At the end one table has what the runs measured, ``sweep.md`` and ``sweep.json``;
``compare.html`` sets them side by side.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from align.config.explain import Problem
from align.config.load import NOT_IN_HASH, config_hash, load_recipe
from align.config.read import parse_yaml
from align.config.schema import Recipe
from align.errors import AlignError, ConfigError
from align.models.memory import let_go
from align.reports.compare import render_comparison
from align.reports.drawing import COLOURS
from align.reports.measures import Measure, headline
from align.reports.record import RunRecord, read_run
from align.suites.shown import printer
from align.tracking.files import write_json, write_text
from align.tracking.run_folder import RunFolder, checkpoint_step

SOURCE = "align train --sweep"
LONGEST_NAME = 100


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        values: what is given for each key that is swept.
        recipe: with these values, and a folder of its own.
        overrides: that make this recipe of the sweep's source.
    """

    values: Mapping[str, str]
    recipe: Recipe
    overrides: Sequence[str]

    @property
    def name(self) -> str:
        """``loss.beta=0.1``."""
        return _name(self.values)

    @property
    def finished(self) -> bool:
        """Whether its folder holds this very run, finished."""
        run, rounds = RunFolder(self.recipe.output), self.recipe.iterate
        if not run.has_manifest or (rounds is not None and not (run.path / f"round-{rounds.rounds}").is_dir()):
            return False
        manifest = run.manifest
        return manifest.get("status") == "finished" and manifest.get("recipe_hash") == config_hash(self.recipe)

    def __str__(self) -> str:
        folder = RunFolder(self.recipe.output)
        if self.finished:
            what = "finished, stays as it is"
        elif (checkpoint := folder.newest_checkpoint()) is not None:
            what = f"goes on from step {checkpoint_step(checkpoint):,}"
        else:
            what = "begins anew" if folder.has_manifest else "begins"
        return f"{self.name} · {what} · {folder.path}"


def read_sweep(source: str, overrides: Sequence[str], options: Sequence[str]) -> list[Point]:
    """The runs of a sweep, all checked.

    Args:
        source, overrides: of the recipe, as ``load_recipe`` takes them.
        options: ``key=value,value,...``; of several, every value of one is tried with every value of the others.

    Raises:
        ConfigError: with every problem of the options, or of the recipes that they make.
    """
    grid, problems = _grid(options, {text.partition("=")[0] for text in overrides})
    if problems:
        raise ConfigError(SOURCE, problems)
    points: list[Point] = []
    found: dict[Problem, list[str]] = {}
    for values in itertools.product(*grid.values()):
        place = dict(zip(grid, values, strict=True))
        changes = [*overrides, *(f"{key}={value}" for key, value in place.items())]
        try:
            recipe = load_recipe(source, changes)
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(_name(place))
            continue
        points.append(_placed(place, recipe, changes))
    if found:
        count = math.prod(map(len, grid.values()))
        every = [
            (where, f"{what} ({names[0]})" if len(names) < count else what) for (where, what), names in found.items()
        ]
        raise ConfigError(source, every)
    hashes: dict[str, Point] = {}
    for point in points:
        if (twin := hashes.setdefault(config_hash(point.recipe), point)) is not point:
            raise ConfigError(SOURCE, [(point.name, f"comes to the same run as {twin.name}")])
    return points


def run_sweep(points: Sequence[Point], source: str, train: Callable[[Point], object]) -> None:
    """Train what is not finished yet, and write the table.

    Args:
        source: of the recipe, for ``sweep.json``.
        train: runs one point.

    Raises:
        AlignError: a run failed; the others have been trained, and the table is written.
        KeyboardInterrupt: it was interrupted; what is done is kept.
    """
    output = Path(points[0].recipe.output).parent
    if (output / "manifest.json").exists():
        raise AlignError(f"{output} holds a run, and a sweep makes a folder of runs: choose another output")
    failed: dict[str, str] = {}
    for number, point in enumerate(points, 1):
        print(f"run {number} of {len(points)}: {point}", file=sys.stderr, flush=True)
        if point.finished:
            continue
        try:
            train(point)
        except AlignError as error:
            failed[point.name] = str(error)
        except Exception as error:
            traceback.print_exc()
            failed[point.name] = f"{type(error).__name__}: {error}"
        if point.name in failed:
            print(f"{point.name} failed: {failed[point.name]}", file=sys.stderr, flush=True)
        let_go()
    _conclude(points, source, failed, output)
    if failed:
        raise AlignError(
            f"{len(failed)} of {len(points)} runs failed: {'; '.join(failed)}\n"
            "  once the cause is mended the same command goes on with these"
        )


# --- what is asked for


def _grid(options: Sequence[str], overridden: set[str]) -> tuple[dict[str, list[str]], list[Problem]]:
    """Values by key, and what is wrong with the options."""
    grid: dict[str, list[str]] = {}
    problems: list[Problem] = []
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key:
            problems.append((option, "is not key=value,value, such as loss.beta=0.05,0.1,0.2"))
            continue
        if key in grid:
            problems.append((key, "is swept twice; give all of its values in one --sweep"))
        elif key in overridden:
            problems.append((key, f"is set by {key}=... too; leave that out"))
        elif key == "output":
            problems.append((key, "is where all runs go, a folder each; give it once, as output=FOLDER"))
        elif _is_not_hashed(key):
            problems.append((key, "does not change what a run comes to; give it once, as key=value"))
        elif what := _bad_values(grid.setdefault(key, _split(text))):
            problems.append((key, what))
    return grid, problems


def _is_not_hashed(key: str) -> bool:
    section, _, inside = key.partition(".")
    left_out = NOT_IN_HASH.get(section, ())
    return left_out is True or inside in left_out


def _bad_values(values: Sequence[str]) -> str | None:
    if "" in values:
        return f"has an empty value in '{','.join(values)}'; null is written out"
    seen: dict[str, str] = {}
    for value in values:
        try:
            parsed = json.dumps(parse_yaml(value, "override"), sort_keys=True, default=str)
        except ConfigError as error:
            return f"'{value}' is not YAML: {error.problems[0][1]}"
        alike = json.dumps(json.loads(parsed, parse_int=float))
        if alike in seen:
            twin = seen[alike]
            return f"has '{value}' twice" if twin == value else f"'{twin}' and '{value}' are the same value"
        seen[alike] = value
    return None


def _split(text: str) -> list[str]:
    """What stands between commas, but for those in brackets and in quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and (depth or not parts[-1].strip()):
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        parts[-1] += letter
    return [part.strip() for part in parts]


def _placed(values: Mapping[str, str], recipe: Recipe, overrides: Sequence[str]) -> Point:
    """The point in a folder of its own, and in a W&B group with the others."""
    whole, name = Path(recipe.output), _name(values)
    folder = re.sub(r"[^\w.+=,@-]+", "_", name)[:LONGEST_NAME]
    if folder != name:  # a path, a list, a long text
        folder = f"{folder}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    changes: dict[str, Any] = {"output": str(whole / folder)}
    if recipe.tracking.wandb is not None:
        wandb = recipe.tracking.wandb
        title = wandb.name or whole.resolve().name
        own = {"group": wandb.group or title, "name": f"{title} {name}"}
        changes["tracking"] = recipe.tracking.model_copy(update={"wandb": wandb.model_copy(update=own)})
    return Point(values, recipe.model_copy(update=changes), [*overrides, f"output={changes['output']}"])


def _name(values: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in values.items())


# --- what came of it


def _conclude(points: Sequence[Point], source: str, failed: Mapping[str, str], output: Path) -> None:
    """The table, on the terminal and in files, and the page of the runs that are finished."""
    records = {point.name: read_run(Path(point.recipe.output)) for point in points if point.finished}
    heads, lines = _table(points, records)
    notes = [f"{name} failed: {error}" for name, error in failed.items()]
    console, shown = printer(), Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for place, head in enumerate(heads):
        shown.add_column(Text(head), justify="left" if place < len(points[0].values) else "right")
    for line in lines:
        shown.add_row(*map(Text, line))
    console.print(shown)
    cells = [heads, ["---"] * len(heads), *lines]
    markdown = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in cells)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "sweep.md", markdown + "".join(f"\n{note}\n" for note in notes))
    runs = [_facts(point, records.get(point.name), failed.get(point.name)) for point in points]
    write_json(output / "sweep.json", {"recipe": source, "keys": list(points[0].values), "runs": runs})
    console.print(f"table   {output / 'sweep.md'}", soft_wrap=True)
    paths = [record.path for record in records.values()]
    if 2 <= len(paths) <= len(COLOURS):
        console.print(f"page    {render_comparison(paths, [], output / 'compare.html')}", soft_wrap=True)
    elif paths[1:]:
        console.print(f"page    of up to {len(COLOURS)} runs: align report RUN RUN", soft_wrap=True)


def _table(points: Sequence[Point], records: Mapping[str, RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: values, the first numbers of each run, seconds, and where the reference came from."""
    found = {name: {measure.label: measure for measure in headline(record)} for name, record in records.items()}
    counts: dict[str, set[int]] = {}
    for measures in found.values():
        for label, measure in measures.items():
            counts.setdefault(label, set()).add(measure.n)
    heads = [f"{label}, n = {min(n)}" if len(n) == 1 else label for label, n in counts.items()]
    closing = ["training, s", "reference rows read", "computed"]
    lines = []
    for point in points:
        if (record := records.get(point.name)) is None:
            cells = [*("" for _ in heads), "failed", "", ""]
        else:
            cells = [_cell(found[point.name].get(label), len(n) > 1) for label, n in counts.items()]
            reference = record.section("speed").get("reference", {})
            seconds = record.section("timings").get("train_seconds")
            cells += ["" if seconds is None else f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"]
            cells += [f"{reference[kind]:,}" if kind in reference else "" for kind in ("cached", "computed")]
        lines.append([*point.values.values(), *cells])
    return [*points[0].values, *heads, *closing], lines


def _cell(measure: Measure | None, counted: bool) -> str:
    if measure is None:
        return ""
    interval = f" ({measure.interval})" if measure.interval else ""
    return f"{measure.value}{interval}" + f", n = {measure.n}" * counted


def _facts(point: Point, record: RunRecord | None, error: str | None) -> dict[str, Any]:
    """A run in ``sweep.json``: every metric of its suites, as a number."""
    facts: dict[str, Any] = {
        "values": {key: parse_yaml(value, "override") for key, value in point.values.items()},
        "run": point.recipe.output,
        "status": "failed" if record is None else "finished",
    }
    if record is None:
        return {**facts, "error": error}
    kept = ("value", "low", "high", "n")
    metrics = {
        f"{suite}/{name}": {part: entry[part] for part in kept if part in entry}
        for suite, content in record.evals.items()
        for name, entry in content["metrics"].items()
    }
    timings, speed = record.section("timings"), record.section("speed")
    return {
        **facts,
        "metrics": metrics,
        "train_seconds": timings.get("train_seconds"),
        "reference": speed.get("reference"),
    }
