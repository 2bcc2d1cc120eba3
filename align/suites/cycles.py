"""Rewards and preference models on pairs that run in a circle, where no reward can be right about all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from rich.text import Text

from align.config.section import Section
from align.errors import AlignError
from align.evals.cycles import cycle_suite
from align.evals.result import compared_result
from align.evals.statistics import comparisons
from align.heldout import cycles_of

from .asked import Asked
from .margins import Asking, check_models
from .pairs import common, read_suite_pairs
from .shown import estimate, plain_table, printer, show_comparisons


class Settings(Section):
    """It has none of its own."""


def run(asked: Asked, settings: Settings) -> dict[str, Any]:
    """Accuracy of each model on the pure cycles among the pairs, the others against the first.

    Args:
        asked: models as of the ``preference`` suite, and pairs.
        settings: none.

    Returns:
        ``compared_result`` of ``align.evals.cycles``; ``cycles``: how many there are, by length.

    Raises:
        ConfigError, AlignError: a model cannot be loaded or asked, or no pairs run in a circle.
    """
    asked.require_models("cycles")
    check_models(asked)
    pairs = read_suite_pairs(asked)
    cycles = cycles_of(pairs.rows)
    if not cycles:
        raise AlignError(
            f"{asked.source}: no pairs run in a circle (A over B, B over C, C over A, to one prompt), so there is "
            "nothing for --suite cycles to test"
        )
    of_cycles = {row_id for cycle in cycles for row_id in cycle.row_ids}
    first: dict[str, int] = {}
    for place, row in enumerate(pairs.rows):
        if row.row_id in of_cycles:
            first.setdefault(row.row_id, place)
    pairs = pairs.only(list(first.values()))
    asking = Asking(asked, pairs)
    found = {name: asking.of(name) for name in asked.models}
    several = list(found.values())
    kept = common(asked, pairs, [one.places for one in several], [fault for one in several for fault in one.faults])
    place_of = {pairs.ids[place]: number for number, place in enumerate(kept)}
    whole = [cycle for cycle in cycles if all(row_id in place_of for row_id in cycle.row_ids)]
    if not whole:
        raise AlignError(f"{asked.source}: of none of the {len(cycles)} cycles can all pairs be used")
    # Below 1/2 the label turns a pair: what is scored is how much the preferred answer beats the other.
    sign = [-1.0 if (p := pairs.rows[place].preference) is not None and p < 0.5 else 1.0 for place in kept]
    ids = [cycle.row_ids for cycle in whole]
    models, values = {}, {}
    for name, one in found.items():
        scores = one.at(kept)[0] * torch.tensor(sign, dtype=torch.float64)
        cycled = [scores[[place_of[row_id] for row_id in own]] for own in ids]
        models[name] = cycle_suite(cycled, ids, settings={"reward": one.what})
        values[name] = {"accuracy": np.array([float(((c > 0) + 0.5 * (c == 0)).mean()) for c in cycled])}
    paired = comparisons(values, against=next(iter(found)))
    lengths = [len(own) for own in ids]
    counts = {str(length): lengths.count(length) for length in sorted(set(lengths))}
    given = {"max_length": asked.max_length}
    return compared_result("cycles", models, paired, pairs.facts(len(kept)), asked.reference, given, cycles=counts)


def show(result: Mapping[str, Any]) -> None:
    """Print accuracy beside the best of any reward."""
    console = printer()
    lengths = ", ".join(f"{count} of {length}" for length, count in result["cycles"].items())
    console.print(f"{result['n']:,} cycles of {result['data']['source']} ({lengths} answers)")
    table = plain_table("", "accuracy, a tie is half", "best of any reward", "whole cycles", "ties")
    for name, found in result["models"].items():
        metrics = found["metrics"]
        cells = [estimate(metrics[key], ".1%") for key in ("accuracy", "ceiling", "whole", "ties")]
        table.add_row(Text(name), *cells)
    console.print(table)
    show_comparisons(console, result["comparisons"], "+.1%")
