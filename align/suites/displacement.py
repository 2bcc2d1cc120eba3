"""Where runs, their checkpoints and other models moved the log-probs of one pair data set.

Models are loaded one after the other, so that memory holds one at a time. A run stands for its checkpoints, in their
order, and what it ended in. Pairs, token ids and log-probs are those of training and of a run's own evaluations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from align.config.section import Section
from align.data.rows import PairRow
from align.data.splits import Split, read_split
from align.data.tokenize import TokenizedPair, tokenize_pairs
from align.errors import AlignError
from align.evals.displacement import (
    COMPARED,
    displacement_suite,
    displacement_values,
    gained_tokens,
    largest_decreases,
)
from align.evals.result import compared_result
from align.evals.statistics import bootstrap_interval, comparisons
from align.heldout import first_tokens, pair_logps
from align.losses import PairLogps
from align.losses.layouts import layout_of
from align.models.load import LoadedModel, load_run

from .asked import Asked, tell_faults
from .models import computing_in, let_score, load_reference, name_of, precision, reference_of, steps_of
from .pairs import texts_of
from .shown import estimate, printer, show_comparisons

SHOWN = 5  # tokens


@dataclass(frozen=True)
class Measured:
    """What one model says of the pairs.

    Attributes:
        logps: of both answers of each.
        first: probability of each token as an answer's first, mean over prompts, (V,).
    """

    logps: PairLogps
    first: torch.Tensor


class Settings(Section):
    """It has none of its own."""


def run(asked: Asked, settings: Settings) -> dict[str, Any]:
    """Where each model moved the log-probs of the pairs, against one reference.

    Args:
        asked: models (of a run, its complete checkpoints and its end), and pairs.
        settings: none.

    Returns:
        ``compared_result`` of ``align.evals.displacement``, each model against the first, ``COMPARED``; ``decreases``
        has, of each run with a checkpoint, the largest decrease of the chosen answers' probability between two of its
        steps.

    Raises:
        AlignError: a model cannot be loaded, reads other tokens than the reference, or no row can be used.
    """
    asked.require_policies("displacement")
    models, source = asked.models, asked.source
    steps = {name: steps_of(name) for name in dict.fromkeys(models)}
    names = list(dict.fromkeys(step for several in steps.values() for step in several))
    origin = reference_of(names, asked.reference)
    dtype, compute = precision(names, origin)
    base = load_reference(origin, dtype)
    limit = asked.max_length or getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    split = read_split(source, base.tokenizer, limit, kind="pairs")
    tell_faults(split.faults, split.table.counts["rows"], asked.rejected)
    if not split.tokenized.rows:
        raise AlignError(f"{source}: no pair can be used, so there is nothing to compare")
    pairs: list[TokenizedPair] = split.tokenized.rows  # type: ignore[assignment]
    rows: list[PairRow] = split.used  # type: ignore[assignment]
    ids, groups = [pair.row_id for pair in pairs], [json.dumps(row.prompt) for row in rows]
    reference_name = name_of(origin)
    before = _measure(base, pairs, reference_name, compute)
    decode = base.tokenizer.decode
    del base
    found: dict[str, Any] = {}
    logps: dict[str, PairLogps] = {}
    for name in names:
        loaded = load_run(name, dtype=dtype)
        _check_tokens(name, loaded, split, limit)
        after = _measure(loaded, pairs, name, compute)
        del loaded
        logps[name] = after.logps
        gained = gained_tokens(before.first, after.first, decode)
        found[name] = displacement_suite(after.logps, before.logps, ids, groups=groups, gained=gained)
    values = {name: displacement_values(one, before.logps) for name, one in logps.items()}
    return compared_result(
        "displacement",
        found,
        comparisons(
            {name: {metric: own[metric] for metric in COMPARED} for name, own in values.items()},
            against=names[0],
            groups=groups,
        ),
        {**split.facts, "pairs": texts_of(rows)},
        reference_name,
        {"max_length": limit},
        decreases={
            name: _decreases([before.logps, *(logps[step] for step in several)], groups)
            for name, several in steps.items()
            if len(several) > 1
        },
    )


def show(result: Mapping[str, Any]) -> None:
    """Print the changes, their comparisons, the tokens that gained, and the largest decreases."""
    console = printer()
    data = result["data"]["source"]
    console.print(f"{result['n']:,} pairs of {data} against {result['reference']}: change of log-prob", soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("")
    for column in ("chosen, nats a token", "chosen fell", "largest fall", "rejected"):
        table.add_column(column, justify="right")
    for name, found in result["models"].items():
        metrics = found["metrics"]
        table.add_row(
            Text(name),
            estimate(metrics["chosen_delta_per_token"], "+.3f"),
            estimate(metrics["frac_chosen_down"], ".0%"),
            f"{metrics['largest_fall']['value']:.1f} nats",
            f"{metrics['rejected_delta_per_token']['value']:+.3f}",
        )
    console.print(table)
    show_comparisons(console, result["comparisons"], "+.3f")
    console.print("\nTokens that gained most probability as an answer's first, mean over prompts", style="dim")
    for name, found in result["models"].items():
        tokens = (
            f"{t['token']!r} {100 * t['before']:.1f} → {100 * t['after']:.1f} %" for t in found["gained"][:SHOWN]
        )
        console.print(Text(f"{name}  "), Text(" · ".join(tokens) or "none"), sep="", soft_wrap=True)
    for name, found in result["decreases"].items():
        console.print(
            f"\n{name}: between two of its {found['steps']} steps the probability of a chosen answer fell by at most "
            f"{found['largest']:.2g}, in the mean by {estimate(found['mean'], '.2g')}",
            soft_wrap=True,
        )


def _check_tokens(name: str, loaded: LoadedModel, split: Split, max_length: int | None) -> None:
    """Log-probs of other tokens cannot be compared."""
    rows: Any = split.table.rows
    if tokenize_pairs(rows, loaded.tokenizer, max_length).rows != split.tokenized.rows:
        raise AlignError(
            f"{name} reads other tokens than the reference (another tokenizer or chat template), so that their "
            "log-probs are not of the same answers: compare models of one family"
        )


def _measure(loaded: LoadedModel, pairs: Sequence[TokenizedPair], name: str, compute: torch.dtype) -> Measured:
    model, pad = loaded.model, int(loaded.tokenizer.pad_token_id)
    inner = let_score(model)
    with computing_in(compute, model):
        logps = pair_logps(model, pairs, name, pad_token_id=pad, **layout_of(inner))
        return Measured(logps, first_tokens(model, pairs, pad_token_id=pad))


def _decreases(steps: Sequence[PairLogps], groups: Sequence[str]) -> dict[str, Any]:
    decreases = largest_decreases([step.chosen for step in steps])
    mean = bootstrap_interval(decreases, groups=groups)
    return {"steps": len(steps), "mean": mean.as_dict(), "largest": float(decreases.max())}
