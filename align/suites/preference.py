"""Which models rank the chosen answer of held-out pairs first: rules, reward models, and policies by implicit reward.

RewardBench's files (columns ``prompt``, ``chosen``, ``rejected``, ``subset``; text) are scored by its rules too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.text import Text

from align.config.section import Section
from align.errors import AlignError
from align.evals.preference import compared_preferences, preferred, right_of
from align.evals.result import compared_result
from align.evals.rewardbench import SECTIONS, presence, rewardbench_comparisons, rewardbench_scores
from align.evals.statistics import comparisons, corrected

from .asked import Asked
from .margins import Asking, Margins, check_models
from .pairs import Format, Pairs, common, read_suite_pairs
from .shown import estimate, plain_table, printer, show_comparisons

SUBSET = "subset"


class Settings(Section):
    """Keys of the suite."""

    by: str | None = None
    """Column whose values are the subsets; ``subset`` where the data has one."""
    format: Format = "auto"
    """``rewardbench``: prompts and answers are one turn each of a chat, and its sections are scored; ``pairs``: data
    as they stand; ``auto``: by columns and subsets."""


def run(asked: Asked, settings: Settings) -> dict[str, Any]:
    """Accuracy of each model on the same pairs, the others against the first.

    Args:
        asked: models: ``module:function``, reward and preference models (``FOLDER@WHO`` of PAL), and policies, of
            which those that learnt from pairs have the reward of their loss; pairs.
        settings: the subsets and the format.

    Returns:
        ``compared_result``; of RewardBench's data ``rewardbench`` too, with what of it is there.

    Raises:
        ConfigError, AlignError: a model cannot be loaded or asked, a column is not there, or no pair can be used.
    """
    asked.require_models("preference")
    check_models(asked)
    pairs = read_suite_pairs(asked, settings.format)
    by = settings.by or (SUBSET if SUBSET in pairs.columns else None)
    every = None if by is None else pairs.column(by)
    if all(label == 0.5 for label in pairs.labels):
        raise AlignError(f"{asked.source}: all pairs are ties (preference 0.5): no ranking could be right or wrong")
    asking = Asking(asked, pairs)
    found = {name: asking.of(name) for name in asked.models}
    kept = common(
        asked, pairs, [one.places for one in found.values()], [fault for one in found.values() for fault in one.faults]
    )
    subsets = None if every is None else [every[place] for place in kept]
    pairs = pairs.only(kept)
    models = {name: _of(one, kept, pairs, subsets) for name, one in found.items()}
    extra: dict[str, Any] = {}
    paired = _comparisons(found, kept, pairs, subsets)
    if pairs.rewardbench and subsets is not None:
        extra["rewardbench"] = presence(subsets)
        if extra["rewardbench"]["present"]:
            right = {name: (one.at(kept)[0] > 0).numpy() for name, one in found.items()}
            paired += rewardbench_comparisons(right, subsets, against=next(iter(found)))
            for name, one in right.items():
                scores = rewardbench_scores(one, subsets)
                models[name]["metrics"] |= {f"rewardbench/{part}": score.as_dict() for part, score in scores.items()}
    given = {**settings.model_dump(), "by": by, "rewardbench": pairs.rewardbench, "max_length": asked.max_length}
    facts = pairs.facts(len(kept))
    return compared_result("preference", models, corrected(paired), facts, asked.reference, given, **extra)


def show(result: Mapping[str, Any]) -> None:
    """Print accuracies and ties, per subset, RewardBench's sections, and the comparisons."""
    console = printer()
    console.print(f"{result['n']:,} pairs of {result['data']['source']}: is the chosen answer ranked first?")
    models = result["models"]
    table = plain_table("", "accuracy, a tie is half", "ties", "margin", "")
    for name, found in models.items():
        metrics = found["metrics"]
        cells = estimate(metrics["accuracy"], ".1%"), estimate(metrics["ties"], ".1%")
        margin = estimate(metrics["margin"], "+.3g")
        table.add_row(Text(name), *cells, margin, Text(found["settings"]["reward"], "dim"))
    console.print(table)
    _show_parts(console, models, "accuracy/", f"\nAccuracy by {result['settings']['by']}, ties in brackets")
    bench = result.get("rewardbench")
    if bench:
        title = "\nRewardBench: ties are wrong, subsets have its weights"
        _show_parts(console, models, "rewardbench/", title, [*SECTIONS, "mean"])
        there = len(bench["present"])
        missing = f"; missing {', '.join(bench['missing'])}" if bench["missing"] else ""
        console.print(f"{there} of its {there + len(bench['missing'])} subsets are there{missing}", soft_wrap=True)
        for name, (count, of) in bench["incomplete"].items():
            console.print(f"  {name}: {count} of {of} pairs")
    show_comparisons(console, result["comparisons"], "+.1%")


def _of(one: Margins, kept: Sequence[int], pairs: Pairs, subsets: Sequence[str] | None) -> dict[str, Any]:
    scores, rewards = one.at(kept)
    return compared_preferences(
        scores,
        pairs.ids,
        rewards=rewards,
        preference=pairs.labels,
        groups=pairs.groups,
        subsets=subsets,
        settings={"reward": one.what},
    )


def _comparisons(
    found: Mapping[str, Margins], kept: Sequence[int], pairs: Pairs, subsets: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Of accuracy, over all pairs and in each subset."""
    label, decided = preferred(pairs.labels, len(pairs.rows))
    right = {name: right_of(one.at(kept)[0].numpy(), label) for name, one in found.items()}
    names, groups = np.array(subsets or [""] * len(kept)), pairs.groups
    parts = {"accuracy": decided}
    if subsets is not None and len(set(subsets)) > 1:
        parts |= {f"accuracy/{subset}": decided & (names == subset) for subset in sorted(set(subsets))}
    several = []
    for metric, own in parts.items():
        if own.any():
            values = {name: {metric: one[own]} for name, one in right.items()}
            own_groups = [groups[row] for row in np.flatnonzero(own)]
            several += comparisons(values, against=next(iter(found)), groups=own_groups)
    return several


def _show_parts(
    console: Any, models: Mapping[str, Any], prefix: str, title: str, only: Sequence[str] | None = None
) -> None:
    parts = [key.removeprefix(prefix) for key in next(iter(models.values()))["metrics"] if key.startswith(prefix)]
    parts = [part for part in parts if only is None or part in only]
    if not parts:
        return
    console.print(title, style="dim")
    table = plain_table("", "n", *models)
    for part in parts:
        cells = []
        for found in models.values():
            metrics = found["metrics"]
            ties = f" ({metrics[f'ties/{part}']['value']:.0%})" if prefix == "accuracy/" else ""
            cells.append(estimate(metrics[prefix + part], ".1%") + ties)
        table.add_row(Text(part), str(next(iter(models.values()))["metrics"][prefix + part]["n"]), *cells)
    console.print(table)
