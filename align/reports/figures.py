"""Which drawings a run's report has: curves of what was logged, histograms over the rows of its evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .drawing import Picture, Series, bars, curve, histogram
from .record import RunRecord

LONGEST_NAME = 24  # characters of a bar's name

CURVES: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Loss",
        "",
        "What training minimises, as the recipe defines it.",
        (("training", "loss"), ("held-out", "eval_loss")),
    ),
    (
        "Accuracy",
        "",
        "Share of pairs whose chosen answer has the higher reward; 0.5 is chance.",
        (("training", "rewards/accuracies"), ("held-out", "eval_rewards/accuracies")),
    ),
    (
        "Accuracy",
        "",
        "Share of answers on their thumb's side of the reward's threshold (bco: the shift; kto: 0); 0.5 is chance.",
        (("training", "thumbs/accuracy"), ("held-out", "eval_thumbs/accuracy")),
    ),
    (
        "Reward shift",
        "",
        "BCO's delta: the point between the rewards of thumbs up and those of thumbs down.",
        (("shift", "bco/shift"),),
    ),
    ("Reward", "", "Mean over the answers that the model drew in training.", (("training", "reward"),)),
    (
        "Good answers",
        "",
        "Share of the answers drawn in training that reach the references of all rewards.",
        (("training", "good/all"),),
    ),
    (
        "Win rate",
        "",
        "Online training: held-out answers preferred to those before training, by the annotator; 0.5 is no change.",
        (("held-out", "eval_win_rate"),),
    ),
    (
        "KL",
        "nats per answer",
        "Online training: log-ratio to the reference of the answers that were learnt from, and of the policy's own to "
        "held-out prompts, where its mean is the KL.",
        (("training", "kl/k1"), ("held-out", "eval_kl")),
    ),
    (
        "Answer length",
        "tokens",
        "Online training: answers that were learnt from, and the policy's own to held-out prompts.",
        (("training", "length/tokens"), ("held-out", "eval_length")),
    ),
    (
        "Entropy",
        "nats per token",
        "Of the policy, at the tokens of these answers.",
        (("training", "entropy"), ("held-out", "eval_entropy")),
    ),
    (
        "KL",
        "nats",
        "grpo: to the model before training, a token. kto: its reference point, the mean log-ratio of other answers.",
        (("training", "kl"),),
    ),
    (
        "Margin",
        "",
        "Reward of chosen answers (thumbs up) less that of rejected ones (thumbs down).",
        (("training", "rewards/margins"), ("held-out", "eval_rewards/margins")),
    ),
    (
        "Log-prob change",
        "nats per answer",
        "Change from the reference, training data. Chosen below 0: the preferred answers became less likely too.",
        (("chosen", "displacement/chosen_delta"), ("rejected", "displacement/rejected_delta")),
    ),
    (
        "Log-prob change, per token",
        "nats per token",
        "Change from the reference, training data, the mean over answers of each answer's own mean.",
        (
            ("chosen", "displacement/chosen_delta_per_token"),
            ("rejected", "displacement/rejected_delta_per_token"),
        ),
    ),
    (
        "Chosen answers that fell",
        "",
        "Share of the chosen answers that are less likely than under the reference.",
        (("training", "displacement/frac_chosen_down"), ("held-out", "eval_displacement/frac_chosen_down")),
    ),
    (
        "Largest fall",
        "nats",
        "Of a chosen answer, from the reference, among those of a log's batches; 0 where none fell.",
        (("training", "displacement/largest_fall"), ("held-out", "eval_displacement/largest_fall")),
    ),
    (
        "Token accuracy",
        "",
        "Share of answer tokens that were the likeliest.",
        (("training", "mean_token_accuracy"), ("held-out", "eval_mean_token_accuracy")),
    ),
    ("Gradient norm", "", "Before clipping.", (("training", "grad_norm"),)),
)


def training_pictures(record: RunRecord) -> list[Picture]:
    """Curves of what was logged; a curve without a single value is left out."""
    pictures = []
    for title, label, caption, names in CURVES:
        series = [s for name, key in names if (s := logged(record.metrics, name, key)) is not None]
        if title == "Token accuracy" and any("rewards/accuracies" in row for row in record.metrics):
            continue  # says nothing about pairs
        if series:
            pictures.append(curve(title, label, caption, series))
    return pictures


def evaluation_pictures(evals: Mapping[str, Mapping[str, Any]]) -> list[Picture]:
    """Histograms over the rows of a run's own evaluations, by suite."""
    thumbs, preference, displacement, generation = (
        evals.get(suite, {}).get("rows", []) for suite in ("thumbs", "preference", "displacement", "generation")
    )
    reward = [row for row in evals.get("reward", {}).get("rows", []) if "chosen_reward" in row]
    wanted = (
        ("Rewards of held-out pairs", "implicit reward", "pairs", preference, "chosen_reward", "rejected_reward"),
        ("Rewards of held-out answers", "reward", "pairs", reward, "chosen_reward", "rejected_reward"),
        ("Log-prob change, held-out", "nats per answer", "pairs", displacement, "chosen_delta", "rejected_delta"),
    )
    pictures = [
        histogram(title, label, f"{len(rows):,} {what}.", [_column(rows, "chosen", a), _column(rows, "rejected", b)])
        for title, label, what, rows, a, b in wanted
        if rows
    ]
    if gained := evals.get("displacement", {}).get("gained"):
        pictures.append(gained_tokens(gained))
    if thumbs:
        sides = [
            Series(name, finite([row["reward"] for row in thumbs if row["up"] is up]))
            for name, up in (("thumbs up", True), ("thumbs down", False))
        ]
        pictures.append(
            histogram("Rewards of held-out answers", "implicit reward", f"{len(thumbs):,} answers.", sides)
        )
    for title, label, key in (("Scores of the answers", "score", "reward"), ("Answer length", "tokens", "tokens")):
        if generation:
            sides = [Series(side, finite([row[side][key] for row in generation])) for side in ("before", "after")]
            pictures.append(histogram(title, label, f"{len(generation):,} held-out prompts.", sides))
    return pictures


def gained_tokens(gained: Sequence[Mapping[str, Any]], model: str = "") -> Picture:
    """Where probability went at the beginning of an answer; of which model, where there are several."""
    of = f" Under {model}." if model else ""
    return bars(
        "Tokens that gained, held-out",
        "probability as an answer's first token",
        f"Where probability went: the tokens that gained most at the beginning of an answer, mean over prompts.{of}",
        [repr(token["token"])[:LONGEST_NAME] for token in gained],  # some vocabularies have whole lines as one token
        [Series(side, [token[side] for token in gained]) for side in ("before", "after")],
    )


def logged(rows: Sequence[Mapping[str, Any]], name: str, key: str) -> Series | None:
    """A column of the metrics by step; None without a value."""
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return Series(name, [y for _, y in points], [x for x, _ in points]) if points else None


def _column(rows: Sequence[Mapping[str, Any]], name: str, key: str) -> Series:
    return Series(name, finite([row[key] for row in rows]))


def finite(values: Sequence[float | None]) -> list[float]:
    """The values that are numbers."""
    return [float(v) for v in values if v is not None and np.isfinite(v)]
