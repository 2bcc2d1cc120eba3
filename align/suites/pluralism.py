"""Whom rewards serve: accuracy per annotator, the worst annotator and group, and what PAL's prototypes bring.

A PAL folder without ``@WHO`` is asked with each annotator's own weights (the mean of those of training for people whom
it does not know), and beside it stands ``FOLDER@mean``, one reward for all from the same model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from rich.text import Text
from torch import Tensor

from align.config.section import Section
from align.data.rewards import tokenize_reward_pairs
from align.errors import AlignError
from align.evals.pluralism import LEAST, pluralism_suite
from align.evals.result import compared_result
from align.evals.statistics import comparisons, corrected
from align.models.load import LOAD_ERRORS
from align.rewards.named import reward_folder
from align.rewards.pal_model import PalRewardModel, is_pal

from .asked import Asked
from .margins import BATCH, Asking, Margins, check_models, places_of
from .pairs import Pairs, common, read_suite_judgements
from .shown import estimate, plain_table, printer, show_comparisons

SHOWN = 5  # annotators


class Settings(Section):
    """Keys of the suite."""

    by: str | None = None
    """Column of annotators' groups; else a group is a prototype: the heaviest, by the first PAL model."""
    least: int = Field(default=LEAST, ge=1)
    """Judgements that an annotator or a group has to have to count as the worst."""


@dataclass(frozen=True)
class Prototypes:
    """Weights of a PAL model.

    Attributes:
        weights: by annotator of the data, K each.
        known: annotators that it has weights of.
        mean: over the annotators of its training, K.
    """

    weights: dict[str, list[float]]
    known: list[str]
    mean: list[float]


def run(asked: Asked, settings: Settings) -> dict[str, Any]:
    """Each reward on the same judgements, the others against the first, and PAL against one reward for all.

    Args:
        asked: models as of the ``preference`` suite, PAL folders among them; judgements (an ``annotator`` column).
        settings: groups.

    Returns:
        ``compared_result`` of ``align.evals.pluralism``, with comparisons of each PAL model against its own mean
        reward too; ``prototypes``: of each its weights by annotator, their mean, and for how many of the annotators of
        the data each prototype weighs most.

    Raises:
        ConfigError, AlignError: a model cannot be loaded or asked, a column is not there, or no judgement can be used.
    """
    asked.require_models("pluralism")
    pals = {name: folder for name in asked.models if (folder := _pal_folder(name)) is not None}
    names: list[str] = []
    for name in asked.models:  # the mean first, so that a PAL model alone is compared with it
        names += [f"{name}@mean", name] if name in pals else [name]
    names = list(dict.fromkeys(names))
    others = tuple(name for name in names if name not in pals)
    check_models(Asked(others, asked.data, asked.reference, asked.max_length, asked.output, asked.recipes))
    pairs, annotators = read_suite_judgements(asked)
    own_groups = None if settings.by is None else _own_groups(pairs, annotators, settings.by)
    asking = Asking(asked, pairs)
    found: dict[str, Margins] = {}
    prototypes: dict[str, Prototypes] = {}
    for name in names:
        if name in pals:
            found[name], prototypes[name] = _pal(name, pals[name], pairs, annotators)
        else:
            found[name] = asking.of(name)
    several = list(found.values())
    kept = common(asked, pairs, [one.places for one in several], [fault for one in several for fault in one.faults])
    pairs, who = pairs.only(kept), [annotators[place] for place in kept]
    groups = own_groups
    if groups is None and prototypes:
        weights = next(iter(prototypes.values())).weights
        groups = {one: f"prototype {int(np.argmax(own)) + 1}" for one, own in weights.items()}
    right = {name: _right(one.at(kept)[0]) for name, one in found.items()}
    models = {
        name: pluralism_suite(
            values,
            who,
            pairs.ids,
            groups=groups,
            known=prototypes[name].known if name in prototypes else None,
            prompts=pairs.groups,
            least=settings.least,
            settings={"reward": found[name].what},
        )
        for name, values in right.items()
    }
    values = {name: {"accuracy": one} for name, one in right.items()}
    paired = comparisons(values, against=names[0], groups=who)
    for name in pals:
        mean = f"{name}@mean"
        if mean != names[0]:
            paired += comparisons({mean: values[mean], name: values[name]}, against=mean, groups=who)
    return compared_result(
        "pluralism",
        models,
        corrected(paired),
        pairs.facts(len(kept)) | {"annotators_used": len(set(who))},
        asked.reference,
        {**settings.model_dump(), "max_length": asked.max_length},
        groups=groups,
        prototypes={name: _described(one, set(who)) for name, one in prototypes.items()},
    )


def show(result: Mapping[str, Any]) -> None:
    """Print shares of judgements and of people, the worst, the groups, and the prototypes."""
    console = printer()
    data = result["data"]
    ties = f"; ties left out, which decide nothing: {data['ties']:,}" if data.get("ties") else ""
    of = f"{data['annotators_used']:,} annotators in {data['source']}"
    console.print(f"{result['n']:,} judgements of {of}{ties}", soft_wrap=True)
    table = plain_table("", "judgements", "people, mean", "worst annotator", "worst group")
    for name, found in result["models"].items():
        metrics = found["metrics"]
        cells = [estimate(metrics[key], ".1%") for key in ("accuracy", "macro", "worst_annotator")]
        table.add_row(Text(name), *cells, estimate(metrics["worst_group"], ".1%") if "worst_group" in metrics else "")
    console.print(table)
    console.print("intervals of the worst hold for all annotators (groups) together", style="dim")
    for name, found in result["models"].items():
        worst = (f"{one['annotator']} {one['accuracy']:.0%} of {one['n']}" for one in found["annotators"][:SHOWN])
        console.print(Text(f"{name}  least served: {' · '.join(worst)}"), soft_wrap=True)
    for name, one in result["prototypes"].items():
        weights = " ".join(f"{weight:.2f}" for weight in one["mean"])
        people = ", ".join(f"{count:,} of prototype {number}" for number, count in one["heaviest"].items())
        known = f"{one['known']:,} of {one['annotators']:,} annotators are known"
        console.print(Text(f"{name}  mean weights {weights}; annotators: {people}; {known}"), soft_wrap=True)
    show_comparisons(console, result["comparisons"], "+.1%")


def _pal_folder(name: str) -> Path | None:
    """The folder of a PAL model that is named without ``@WHO``."""
    try:
        folder = reward_folder(name)
    except ValueError:
        return None
    return Path(folder) if folder is not None and is_pal(folder) else None


def _pal(name: str, folder: Path, pairs: Pairs, annotators: Sequence[str]) -> tuple[Margins, Prototypes]:
    """Margins by each annotator's own weights, and these weights."""
    try:
        model = PalRewardModel.from_pretrained(folder, dtype=torch.float32)
    except LOAD_ERRORS as error:
        raise AlignError(f"{name}: {str(error).partition(chr(10))[0]}") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    known = {*model.pal.settings["users"], *model.fitted}
    weights = {
        who: model.choose(f"annotator:{who}" if who in known else "mean").chosen for who in sorted(set(annotators))
    }
    tokenized = tokenize_reward_pairs(pairs.rows, model.tokenizer, model.config.max_length)
    ids, places = tokenized.rows, places_of(pairs.rows, tokenized.rows)
    prompts = [one.prompt_ids for one in ids]
    each = torch.stack([_there(weights[annotators[place]]) for place in places])
    rewards = []
    for side in ("chosen_ids", "rejected_ids"):
        # Equal rows of a prompt and an answer, which several people judged, go through the backbone once.
        answers = [getattr(one, side) for one in ids]
        distinct: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        at = [distinct.setdefault((tuple(p), tuple(a)), len(distinct)) for p, a in zip(prompts, answers, strict=True)]
        states, questions = model.embed_ids(
            [list(p) for p, _ in distinct], [list(a) for _, a in distinct], batch_size=BATCH
        )
        with torch.no_grad():
            rewards.append(model.pal.reward(states[at], each, questions[at]).double().cpu())
    found = torch.stack(rewards, dim=1)
    what = f"PAL, {model.pal.groups} prototypes, each annotator's own reward"
    mean = model.pal.prior("mean").tolist()
    known_here = [who for who in weights if who in known]
    described = Prototypes({who: _there(one).tolist() for who, one in weights.items()}, known_here, mean)
    return Margins(places, found[:, 0] - found[:, 1], found, what, tokenized.faults), described


def _there(weights: Tensor | None) -> Tensor:
    assert weights is not None  # choose says whose they are
    return weights


def _own_groups(pairs: Pairs, annotators: Sequence[str], by: str) -> dict[str, str]:
    """The group of each annotator, by a column that says the same in all of their rows.

    Raises:
        AlignError: two groups of one annotator.
    """
    groups: dict[str, str] = {}
    for who, group in zip(annotators, pairs.column(by), strict=True):
        if groups.setdefault(who, group) != group:
            raise AlignError(
                f"{pairs.table.source}: annotator {who} has {by} {groups[who]} in one row and {group} in another: "
                "a group is of annotators"
            )
    return groups


def _right(scores: Tensor) -> Any:
    values = scores.numpy()
    return np.where(values == 0, 0.5, (values > 0).astype(float))


def _described(one: Prototypes, present: set[str]) -> dict[str, Any]:
    weights = {who: own for who, own in one.weights.items() if who in present}
    heaviest = Counter(int(np.argmax(own)) + 1 for own in weights.values())
    return {
        "mean": one.mean,
        "heaviest": {str(number): heaviest[number] for number in range(1, len(one.mean) + 1)},
        "annotators": len(weights),
        "known": len([who for who in one.known if who in present]),
        "weights": weights,
    }
