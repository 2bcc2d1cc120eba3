"""Whether the probabilities that models state of pairs can be trusted: rewards, policies and annotators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field
from rich.text import Text

from align.config.section import Section
from align.errors import AlignError
from align.evals.calibration import calibration_suite
from align.evals.preference import preferred
from align.evals.result import compared_result
from align.evals.statistics import comparisons

from .annotated import Annotated, check_names, load_annotators, margins_of
from .asked import Asked
from .margins import Asking, check_models
from .pairs import common, read_suite_pairs
from .shown import estimate, plain_table, printer, show_comparisons


class Settings(Section):
    """Keys of the suite."""

    annotators: dict[str, Any] = Field(default_factory=dict)
    """Annotators by name, as recipes have them (``align.rewards.annotators``), beside the models."""
    bins: int = Field(default=10, ge=1)
    """Of confidence."""


def run(asked: Asked, settings: Settings) -> dict[str, Any]:
    """Calibration of each model on the same pairs, the others against the first.

    The probability of a reward model is ``sigma((r_chosen - r_rejected) / tau)``, of a rule and of a policy's implicit
    reward ``sigma`` of the difference, which few losses make a probability; of an annotator its own, of which log-odds
    beyond 10 are held there.

    Args:
        asked: models as of the ``preference`` suite, and pairs, whose labels may be soft.
        settings: annotators, and bins.

    Returns:
        ``compared_result`` of ``align.evals.calibration``; comparisons of Brier score and log loss.

    Raises:
        ConfigError, AlignError: a model or annotator cannot be loaded or asked, or no pair can be used.
    """
    if not settings.annotators:
        asked.require_models("calibration")
    check_names(asked.models, settings.annotators)
    check_models(asked)
    annotators: list[Annotated] = load_annotators(settings.annotators, asked)
    pairs = read_suite_pairs(asked)
    if all(label == 0.5 for label in pairs.labels):
        raise AlignError(f"{asked.source}: all pairs are ties (preference 0.5): nothing could be right or wrong")
    asking = Asking(asked, pairs)
    found = {name: asking.of(name) for name in asked.models} | {one.name: margins_of(one, pairs) for one in annotators}
    several = list(found.values())
    kept = common(asked, pairs, [one.places for one in several], [fault for one in several for fault in one.faults])
    pairs = pairs.only(kept)
    models = {
        name: calibration_suite(
            one.at(kept)[0],
            pairs.ids,
            preference=pairs.labels,
            groups=pairs.groups,
            bins=settings.bins,
            settings={"reward": one.what},
        )
        for name, one in found.items()
    }
    label, _ = preferred(pairs.labels, len(pairs.rows))
    values = {}
    for name, one in found.items():
        score = one.at(kept)[0].numpy()
        p = 1 / (1 + np.exp(-score))
        values[name] = {
            "brier": label * (1 - p) ** 2 + (1 - label) * p**2,
            "log_loss": label * np.logaddexp(0, -score) + (1 - label) * np.logaddexp(0, score),
        }
    paired = comparisons(values, against=next(iter(found)), groups=pairs.groups)
    given = {**settings.model_dump(), "max_length": asked.max_length}
    return compared_result("calibration", models, paired, pairs.facts(len(kept)), asked.reference, given)


def show(result: Mapping[str, Any]) -> None:
    """Print errors beside what a calibrated model would show, scores, and the reliability of each model."""
    console = printer()
    console.print(f"{result['n']:,} pairs of {result['data']['source']}: can the probabilities be trusted?")
    table = plain_table("", "ECE", "if calibrated", "said - right", "Brier", "log loss", "said", "right")
    for name, found in result["models"].items():
        metrics = found["metrics"]
        cells = [estimate(metrics[key], ".3f") for key in ("ece", "ece_if_calibrated")]
        cells.append(estimate(metrics["overconfidence"], "+.1%"))
        cells += [estimate(metrics[key], ".3f") for key in ("brier", "log_loss")]
        table.add_row(Text(name), *cells, *(f"{metrics[key]['value']:.1%}" for key in ("confidence", "right")))
    console.print(table)
    console.print(
        "ECE is too large by the noise in its bins and has no interval: 'if calibrated' is where 95 % of calibrated "
        "models of these confidences would be.",
        style="dim",
        soft_wrap=True,
    )
    for name, found in result["models"].items():
        console.print(Text(f"\n{name}: of pairs that it is so sure of, how many are right", "dim"))
        points = plain_table("said", "right", "n")
        for point in found["reliability"]["equal_width"]:
            right = estimate({"value": point["right"], **point}, ".0%")
            points.add_row(f"{point['confidence']:.0%}", right, f"{point['n']:,}")
        console.print(points)
    show_comparisons(console, result["comparisons"], "+.3f")
