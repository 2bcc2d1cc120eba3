"""``align train --preflight``: what a sample of the pairs says of likelihood displacement, and a filter to paste."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.config.schema import FilterRule, Recipe
from align.data.splits import Split
from align.errors import ConfigError

from .filter import EQUAL, SHORT, describe
from .filtered import Filtered
from .select import places
from .shards import Line
from .training import TrainingFilter, can_score, only, policy_scorer, score_pairs

COLUMN = "ches_ln"
BINS, WIDTH = 10, 40
TAIL = 1.6449 / 0.6745
"""From the median to where 5 % of a normal spread lie over, in distances of the median from the quartile."""

ENOUGH = 100
"""Pairs. A tail seems to stand out in 46 % of draws of 20 from a normal spread, 19 % of 100 and 5 % of 256."""
CHOICE = 0.9

THUMB = [
    "(a rule of thumb: a spread does not tell how far answers will fall. In the study of docs/results/ches.md they",
    "fell in the tenth of highest CHES of the quickstart's pairs, and nowhere on HH harmless, in the mean; a smaller",
    "share is safer and leaves less to learn, and the paper kept 5 %)",
]


def preflight(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, split: Split, rows: int) -> str:
    """Score a sample with the model of the recipe, and say what to expect.

    Args:
        split: the training data, all of it.
        rows: how many pairs to score; drawn by the recipe's seed.

    Raises:
        ConfigError: the run does not train a policy on pairs.
        AlignError: the model cannot be loaded, or too many pairs cannot be scored.
    """
    if not can_score(recipe):
        what = f"scores pairs for a policy, and method: {recipe.method} trains on something else; leave it out"
        raise ConfigError("align train", [("--preflight", what)])
    sample = _sample(split, rows, int(recipe.training.get("seed", 0)))
    chosen = _by(recipe, sample, FilterRule(keep=1.0))
    lines: dict[str, Line] = {}
    made = f"from its column {COLUMN}"
    if chosen.scored:
        scorer = policy_scorer(recipe, tokenizer, [COLUMN])
        made = f"scored with {recipe.model.name} in {str(scorer.model.dtype).removeprefix('torch.')}"
        lines = score_pairs(scorer, [row for row, _ in chosen.rows], recipe)
    scored = chosen.judged(lines)
    values = np.array([one.scores[COLUMN] for one in scored.table.candidates])
    said = [
        f"{len(chosen.rows):,} of {len(split.tokenized.rows):,} pairs of {recipe.data.train}, {made}",
        "",
        f"{COLUMN}: the higher, the more a chosen answer is expected to lose with its rejected one",
        *_histogram(values),
        *_facts(scored, split, values),
        "",
        *_recommendation(recipe, sample, split, lines, scored),
    ]
    return "\n".join(said)


def _sample(split: Split, rows: int, seed: int) -> Split:
    every = split.tokenized.rows
    places = sorted(random.Random(seed).sample(range(len(every)), min(rows, len(every))))
    return only(split, [every[place] for place in places])


def _by(recipe: Recipe, sample: Split, rule: FilterRule) -> TrainingFilter:
    data = recipe.data.model_copy(update={"filter": {COLUMN: rule}})
    return TrainingFilter(recipe.model_copy(update={"data": data}), sample)


def _histogram(values: np.ndarray[Any, Any]) -> list[str]:
    low, high = np.quantile(values, [0.01, 0.99])
    if low == high:
        return [f"  {low:.4g} for every pair"]
    counts, edges = np.histogram(np.clip(values, low, high), bins=BINS, range=(low, high))
    names = [f"{start:.4g} to {stop:.4g}" for start, stop in pairwise(edges)]
    names = [f"to {edges[1]:.4g}", *names[1:-1], f"over {edges[-2]:.4g}"]
    width = max(map(len, names))
    return [
        f"  {name:>{width}}  {'█' * round(WIDTH * count / counts.max())} {count:,}"
        for name, count in zip(names, counts, strict=True)
    ]


def _facts(scored: Filtered, split: Split, values: np.ndarray[Any, Any]) -> list[str]:
    candidates = scored.table.candidates
    ends = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    names = ("least", "5 %", "median", "95 %", "most")
    halves = np.array_split(np.argsort(values, kind="stable"), 2)
    tokens = {name: np.array([one.lengths[name] for one in candidates]) for name in ("chosen", "rejected")}
    lengths = [
        f"{name} {' and '.join(f'{part[half].mean():.0f}' for half in halves if len(half))}"
        for name, part in tokens.items()
    ]
    identical, unscored = sum(fault.reason == EQUAL for fault in split.table.faults), len(scored.table.faults)
    repeated = split.table.counts["duplicates"]
    return [
        "  " + " · ".join(f"{name} {value:.4g}" for name, value in zip(names, ends, strict=True)),
        *_tail(values),
        f"  mean tokens in the lower and in the higher half: {', '.join(lengths)}",
        f"  one-token answers {_short(scored):,} (the score says little there) · without a score {unscored:,}",
        f"  all of the data: repeated pairs {repeated:,} · pairs of equal answers {identical:,}",
    ]


def _tail(values: np.ndarray[Any, Any]) -> list[str]:
    """How much of the spread is the highest fifth's; what lies over the 95 % point is counted as on it."""
    middle, highest = np.median(values), np.quantile(values, 0.95, method="lower")
    over = np.sort(np.maximum(np.minimum(values, highest) - middle, 0))
    if not over.any():
        return []
    top = 100 * over[-math.ceil(len(over) / 5) :].sum() / over.sum()
    return [
        f"  the highest fifth of the pairs has {top:.0f} % of all that lies over the median; of a normal spread, 69 %"
    ]


def _short(scored: Filtered) -> int:
    return sum(one.short == SHORT for one in scored.table.candidates)


class _UpperTail(NamedTuple):
    """The pairs over ``cut``, where 5 % of a normal spread with the same median and lower quartile lie.

    It stands out where it has twice as many. No single pair moves that point.
    """

    cut: float
    below: int
    pairs: int

    @classmethod
    def of(cls, values: np.ndarray[Any, Any]) -> _UpperTail:
        quarter, middle = np.quantile(values, [0.25, 0.5])
        cut = middle + TAIL * (middle - quarter)
        return cls(cut, int((values <= cut).sum()), len(values))

    @property
    def stands_out(self) -> bool:
        return 10 * (self.pairs - self.below) >= self.pairs

    @property
    def share_below(self) -> float:
        """With the digits that it takes to keep the pairs below, neither one less nor one more."""
        scale: int = 10 ** len(str(self.pairs))
        return math.ceil(self.below * scale / self.pairs) / scale

    def __str__(self) -> str:
        over = 100 * (1 - self.below / self.pairs)
        return f"over {self.cut:.4g} lie {over:.0f} % of the pairs; of a normal spread with the same lower half, 5 %"


def _recommendation(
    recipe: Recipe, sample: Split, split: Split, lines: dict[str, Line], scored: Filtered
) -> list[str]:
    """A share that leaves out the upper tail; where none stands out, or pairs are few, one that is a mere choice."""
    candidates = scored.table.candidates
    if 2 * _short(scored) > len(candidates):
        return ["no filter is recommended: most answers are single tokens, of which the score says little"]
    tail = _UpperTail.of(np.array([one.scores[COLUMN] for one in candidates]))
    choice = f"a choice and no recommendation, to paste in the recipe: without the highest {100 * (1 - CHOICE):.0f} %"
    if tail.pairs < ENOUGH:
        more = "; --preflight-rows scores more" if len(split.tokenized.rows) >= ENOUGH else ""
        why = f"no filter is recommended: under {ENOUGH} pairs, a tail that stands out is often chance{more}"
        said, share = [why, *THUMB, choice], CHOICE
    elif not tail.stands_out:
        said, share = ["no filter is recommended: no tail stands out", str(tail), *THUMB, choice], CHOICE
    else:
        what = "recommended, to paste in the recipe: without the tail that stands out"
        said, share = [what, str(tail), *THUMB], tail.share_below
    return [*said, *_to_paste(recipe, sample, split, lines, scored, FilterRule(keep=share))]


def _to_paste(
    recipe: Recipe, sample: Split, split: Split, lines: dict[str, Line], scored: Filtered, rule: FilterRule
) -> list[str]:
    kept = _by(recipe, sample, rule).judged(lines)
    changes = []
    for field in scored.fields:
        before, after = kept.lengths(field)
        changes.append(f"{field} {fmean(before):.0f} -> {fmean(after):.0f}")
    said = [
        "  data:",
        f"    filter: {{{COLUMN}: {{keep: {rule.keep}}}}}",
        f"it keeps {places(len(split.tokenized.rows), rule)[1]:,} of {len(split.tokenized.rows):,} pairs; "
        f"in the sample, mean tokens {', '.join(changes)}",
    ]
    if recipe.data.filter is not None:
        said.append(f"the recipe filters already, which is not counted above: {describe(recipe.data.filter)}")
    return said
