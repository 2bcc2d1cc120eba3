"""An evaluation as a W&B run of its own, in the group of the training run: offline unless told otherwise.

What it holds: ``config`` (suite, data, reference, settings), ``summary`` (every metric, with ``_low``, ``_high`` and
``_n``), the tables ``rows`` and ``comparisons``, the pictures as images under ``pictures/``, and an artefact of type
``evaluation`` with the result's files. Those files are the record: whatever goes wrong here is said once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from align.evals.result import models_of
from align.rewards.encoding import plain

from .files import finite
from .wandb import Mode, Place, start_wandb

logger = logging.getLogger(__name__)

WANDB_DATA = "WANDB_DATA_DIR"
TEXTS = ("pairs", "answers")
"""Of a result's data: the texts of its rows."""
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}
"""Of those texts."""
ROWS = 1000
"""Rows of a result in the table ``rows``, of all models together: the first ones. The artefact has all of them."""


@dataclass(frozen=True)
class Image:
    """A picture of the result: its title, what it shows, and PNG."""

    title: str
    caption: str
    png: bytes


def place_of(recipes: Mapping[str, Mapping[str, Any]], mode: Mode | None, output: Path) -> Place | None:
    """Where ``align eval`` sends a result: into the group of the first run whose recipe has ``tracking.wandb``.

    Args:
        recipes: resolved, of the runs that were asked, by folder.
        mode: asked for; None: as that recipe says.
        output: file of the result; W&B's files lie in ``wandb/`` beside it.

    Returns:
        None where neither a recipe nor ``mode`` asks for it.
    """
    tracked = {run: w for run, recipe in recipes.items() if (w := (recipe.get("tracking") or {}).get("wandb"))}
    run = next(iter(tracked or recipes), None)
    spec = tracked.get(run or "", {})
    if not spec and mode is None:
        return None
    group = spec.get("group") or (Path(run).expanduser().resolve().name if run is not None else None)
    asked: Mode = mode or spec["mode"]
    return Place(output.parent, asked, spec.get("project", "align"), group, output.stem)


def send_evaluation(
    result: Mapping[str, Any], files: Sequence[Path], images: Sequence[Image], place: Place
) -> str | None:
    """Write one W&B run of one result.

    Args:
        result: of one model or of several (``align.evals.result``).
        files: what the artefact holds; those that are not there are left out.
        images: pictures of the result.
        place: where it goes.

    Returns:
        The command that sends offline runs, or None where there is nothing to send.
    """
    if place.mode == "disabled":
        return None
    try:
        with _staged_in(place.folder / "wandb"):
            return _send(result, [path for path in files if path.is_file()], images, place)
    except Exception as error:  # the mirror must not cost a result that is on disk
        reason = "not installed" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {error}"
        logger.warning("W&B is left out for %s (%s); %s is complete", result["suite"], reason, files[0])
        return None


def _send(result: Mapping[str, Any], files: Sequence[Path], images: Sequence[Image], place: Place) -> str | None:
    import wandb

    suite, models = str(result["suite"]), models_of(result)
    identity = os.urandom(4).hex()
    config = {key: result[key] for key in ("suite", "schema", "data", "reference", "settings") if key in result}
    data = result.get("data") or {}
    texts = {key: data[key] for key in TEXTS if isinstance(data.get(key), list)}  # else it is their number
    if texts:  # which are in the table of rows
        config["data"] = {key: value for key, value in data.items() if key not in texts}
    run = start_wandb(place, id=identity, job_type="eval", config=finite(config))
    try:
        run.summary.update(finite(_summary(models)))
        logged: dict[str, Any] = {}
        columns, lines = _rows(models, [one for several in texts.values() for one in several])
        if lines:
            logged["rows"] = wandb.Table(columns=columns, data=lines, allow_mixed_types=True)
        if compared := result.get("comparisons"):
            keys = list(compared[0])
            data = [[finite(entry.get(key)) for key in keys] for entry in compared]
            logged["comparisons"] = wandb.Table(columns=keys, data=data, allow_mixed_types=True)
        with tempfile.TemporaryDirectory() as scratch:
            for number, image in enumerate(images):
                path = Path(scratch) / f"{number}.png"
                path.write_bytes(image.png)
                logged[f"pictures/{image.title}"] = wandb.Image(str(path), caption=image.caption)
            run.log(logged)
            artefact = wandb.Artifact(f"{suite}-{identity}", type="evaluation", description=f"Result of {suite}")
            for file in files:
                artefact.add_file(str(file))
            run.log_artifact(artefact)
            run.finish()  # before the images are gone
    finally:
        run.finish()  # also after an error; a second time it does nothing
    return place.sync if run.offline else None


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """What W&B keeps of artefacts until they are sent lies in ``folder``, unless the user has a place for it."""
    given = os.environ.get(WANDB_DATA)
    os.environ[WANDB_DATA] = given or str(folder.resolve())
    try:
        yield
    finally:
        os.environ.pop(WANDB_DATA)
        os.environ.update({} if given is None else {WANDB_DATA: given})


def _summary(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``accuracy``, ``accuracy_low`` and so on; of several models each under ``MODEL/``."""
    return {
        f"{model}/{metric}{suffix}" if model else f"{metric}{suffix}": entry[field]
        for model, found in models.items()
        for metric, entry in found.get("metrics", {}).items()
        for field, suffix in (("value", ""), ("low", "_low"), ("high", "_high"), ("n", "_n"))
        if entry.get(field) is not None
    }


def _rows(
    models: Mapping[str, Mapping[str, Any]], texts: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[list[Any]]]:
    """Columns and lines of the table of rows; a row's sections become columns such as ``before.text``.

    Args:
        models: results.
        texts: prompt and answers of rows, by their ids.
    """
    each = max(1, ROWS // len(models))
    named = {
        one["row_id"]: {name: plain(one[name], role) for name, role in ROLES.items() if name in one} for one in texts
    }
    flat = [
        ({"model": model} if model else {}) | _flat({**row, **_texts(row, named)})
        for model, found in models.items()
        for row in _rows_of(found)[:each]
    ]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    return columns, [[row.get(column) for column in columns] for row in flat]


def _texts(row: Mapping[str, Any], named: Mapping[str, Mapping[str, str]]) -> Mapping[str, Any]:
    """Of a row, or a list each of a row that stands for several, such as the pairs of a circle."""
    if "row_ids" not in row:
        return named.get(row.get("row_id", ""), {})
    several = [named[name] for name in row["row_ids"] if name in named]
    return {name: [one[name] for one in several] for name in (several[0] if several else ())}


def _rows_of(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows of a result, or of all of its points: the first row of each, then the second, and so on."""
    if "points" not in found:
        return list(found.get("rows", []))
    columns = [[{"point": point["label"], **row} for row in point["rows"]] for point in found["points"]]
    return [row for rows in zip_longest(*columns) for row in rows if row is not None]


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            found[prefix + key] = json.dumps(finite(value), ensure_ascii=False)
        else:
            found[prefix + key] = re.sub(r"[\ud800-\udfff]", "?", value) if isinstance(value, str) else finite(value)
    return found
