"""A run folder, read."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align.errors import AlignError
from align.tracking.metrics import read_metrics
from align.tracking.run_folder import read_manifest

SAMPLES_SHOWN = 20
SUITES = ("generation", "thumbs", "reward", "preference", "displacement", "goals", "cycles", "pal")


@dataclass(frozen=True)
class FaultGroup:
    """Rows that were set aside for one reason.

    Attributes:
        field, reason: of the first such row; numbers in the reasons of the others may differ.
        count: faults of this kind.
        example: ``file, row N`` of the first.
    """

    field: str
    reason: str
    count: int
    example: str


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds; empty where the run did not come to it.

    Attributes:
        path: the folder.
        manifest: ``manifest.json``.
        recipe_text, recipe: ``config.resolved.yaml``.
        metrics: rows of ``metrics.jsonl``.
        evals: contents of ``eval/NAME.json`` by suite.
        samples: answers before and after training, of the generation suite.
        faults: ``rejected_rows.jsonl``, grouped by reason, most frequent first.
    """

    path: Path
    manifest: dict[str, Any]
    recipe_text: str
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    evals: dict[str, dict[str, Any]]
    samples: list[dict[str, Any]]
    faults: list[FaultGroup]

    def section(self, name: str) -> dict[str, Any]:
        """A section of the manifest; empty when the run stopped before it was known."""
        return self.manifest.get(name) or {}

    @property
    def output(self) -> str:
        """The run folder as the recipe names it, for commands to copy."""
        return str(self.recipe.get("output") or self.path)

    @property
    def last_step(self) -> int:
        """The last logged step; 0 when none was."""
        return max((row["step"] for row in self.metrics), default=0)


def read_run(run: Path) -> RunRecord:
    """Read what is there.

    Raises:
        AlignError: the folder is no run, or a file in it is broken.
    """
    manifest = read_manifest(run)
    recipe_path = run / "config.resolved.yaml"
    recipe_text = recipe_path.read_text(encoding="utf-8") if recipe_path.exists() else ""
    evals = {suite: _read_json(path) for suite in SUITES if (path := run / "eval" / f"{suite}.json").exists()}
    recipe = _parse_recipe(recipe_text, recipe_path)
    return RunRecord(
        path=run,
        manifest=manifest,
        recipe_text=recipe_text,
        recipe=recipe,
        metrics=read_metrics(run / "metrics.jsonl"),
        evals=evals,
        samples=evals.get("generation", {}).get("rows", [])[:SAMPLES_SHOWN]
        if recipe.get("online")  # its samples.jsonl has the answers that it learnt from
        else _read_jsonl(run / "samples.jsonl"),
        faults=group_faults(_read_jsonl(run / "rejected_rows.jsonl")),
    )


def _parse_recipe(text: str, path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise AlignError(f"{path}: not YAML ({error}); restore the file") from None
    return recipe if isinstance(recipe, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AlignError(f"{path}: not JSON ({error.msg}, line {error.lineno}); run the evaluation again") from None
    if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
        raise AlignError(f"{path}: has no metrics; run the evaluation again")
    return content


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    # Split at newlines alone: splitlines() also cuts at U+2028, which JSON strings may hold as it stands.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise AlignError(f"{path}: line {number} is not JSON ({error.msg}); restore the file") from None
    return rows


def group_faults(faults: Iterable[Mapping[str, Any]]) -> list[FaultGroup]:
    """Faults by field and reason, most frequent first; reasons that differ in a number only are one."""
    kinds: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for fault in faults:
        kind = (str(fault.get("field", "")), re.sub(r"\d[\d,.]*", "N", str(fault.get("reason", ""))))
        kinds[kind] += 1
        first.setdefault(kind, fault)
    return [
        FaultGroup(
            field=kind[0],
            reason=str(first[kind].get("reason", "")),
            count=count,
            example=f"{Path(str(first[kind].get('source', ''))).name}, row {first[kind].get('row', '?')}",
        )
        for kind, count in kinds.most_common()
    ]
