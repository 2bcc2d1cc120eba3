"""Answers of several models to the same prompts, each against a baseline's: what the ``generation`` suite reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .generation import distinct_estimate, repetition
from .kl import LogRatios
from .length_control import length_controlled
from .result import suite_result
from .sampling import Sample
from .statistics import CLEAR, EVEN, Estimate, bootstrap_interval, holm, paired_difference, paired_p, share_interval


def compare_answers(
    row_ids: Sequence[str],
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[Sample]],
    baseline: str,
    preferences: Mapping[str, Sequence[float | None]],
    rewards: Mapping[str, Sequence[float]] | None = None,
    kl: Mapping[str, LogRatios] | None = None,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """What became of the answers to N prompts.

    Args:
        row_ids, prompts: of the prompts.
        answers: of each model, the baseline's among them.
        baseline: name of the model that the others are compared with.
        preferences: of each other model, the probability that its answer is preferred to the baseline's; None where
            the pair was set aside.
        rewards: of each model's answers, where there is a reward.
        kl: of each other model to the baseline, of answers drawn at temperature 1, where it can be had.

    Returns:
        By model ``suite_result`` of ``generation``. Metrics, intervals by prompt: ``win_rate`` (mean probability),
        ``ties`` (share of prompts at 1/2), ``length_controlled_win_rate`` (``length_control``; characters),
        ``set_aside`` (share of prompts), ``reward``, ``reward_change``, ``kl_to_reference`` and
        ``kl_to_reference_per_token``, ``length`` (tokens), ``unfinished``, ``repetition`` and
        ``distinct_1`` to ``distinct_3``. The baseline has those that are not of a comparison. And every model against
        the baseline in reward, length, unfinished, repetition and win rate (against 1/2), as
        ``statistics.comparisons`` has them.

    Raises:
        ValueError: counts that differ, or a model whose pairs were all set aside.
    """
    for name, own in answers.items():
        if len(own) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(own)} answers of {name}: one each")
    before = answers[baseline]
    models, values, wins = {}, {}, {}
    for name, own in answers.items():
        scores = None if rewards is None else np.asarray(rewards[name], dtype=np.float64)
        columns = _columns(own, scores)
        metrics = {metric: bootstrap_interval(column) for metric, column in columns.items()}
        metrics["unfinished"] = share_interval(columns["unfinished"])
        for n in (1, 2, 3):
            metrics[f"distinct_{n}"] = distinct_estimate([answer.tokens for answer in own], n)
        rows = [
            {"row_id": row_id, "prompt": prompt, "text": answer.text, "tokens": len(answer.tokens)}
            | {"finished": answer.finished, "repetition": repetition(answer.tokens)}
            for row_id, prompt, answer in zip(row_ids, prompts, own, strict=True)
        ]
        _enter(rows, "reward", None if scores is None else scores.tolist())
        if name != baseline:
            given = preferences[name]
            judged = [row for row, value in enumerate(given) if value is not None]
            if not judged:
                raise ValueError(f"{name}: all its pairs with {baseline} were set aside, so there is no win rate")
            wins[name] = np.array([given[row] for row in judged], dtype=np.float64)
            metrics = {**_wins(wins[name], own, before, judged), **metrics}
            _enter(rows, "preference", given)
            if scores is not None and rewards is not None:
                metrics["reward_change"] = paired_difference(rewards[baseline], scores)
                _enter(rows, "reward_change", (scores - np.asarray(rewards[baseline], dtype=np.float64)).tolist())
            ratios = (kl or {}).get(name)
            if ratios is not None:
                metrics["kl_to_reference"] = bootstrap_interval(ratios.nats)
                metrics["kl_to_reference_per_token"] = bootstrap_interval(ratios.nats, per=ratios.tokens)
                _enter(rows, "kl", ratios.nats)
        values[name] = columns
        models[name] = suite_result("generation", metrics, rows, None)
    pairs = [("win_rate", name, baseline, np.full_like(own, EVEN), own) for name, own in wins.items()]
    for name in wins:
        pairs += [(metric, name, baseline, values[baseline][metric], own) for metric, own in values[name].items()]
    compared = paired(pairs)
    for entry in compared:
        if entry["metric"] == "win_rate":  # which has an interval where all answers win, or none, too
            own_rate = models[entry["model"]]["metrics"]["win_rate"]
            entry |= {end: None if own_rate[end] is None else own_rate[end] - EVEN for end in ("low", "high")}
    return models, compared


def _columns(answers: Sequence[Sample], scores: NDArray[np.float64] | None) -> dict[str, NDArray[np.float64]]:
    found = {} if scores is None else {"reward": scores}
    return found | {
        "length": np.array([len(answer.tokens) for answer in answers], dtype=np.float64),
        "unfinished": np.array([not answer.finished for answer in answers], dtype=np.float64),
        "repetition": np.array([repetition(answer.tokens) for answer in answers]),
    }


def _wins(
    preferences: NDArray[np.float64], own: Sequence[Sample], before: Sequence[Sample], judged: Sequence[int]
) -> dict[str, Estimate]:
    lengths = [[len(side[row].text) for row in judged] for side in (own, before)]
    controlled = length_controlled(preferences, *lengths)
    aside = np.ones(len(own))
    aside[list(judged)] = 0
    return {
        "win_rate": share_interval(preferences),
        **({} if controlled is None else {"length_controlled_win_rate": controlled}),
        "ties": share_interval(preferences == EVEN),
        "set_aside": share_interval(aside),
    }


def _enter(rows: Sequence[dict[str, Any]], name: str, values: Sequence[Any] | None) -> None:
    for row, value in zip(rows, values or (), strict=False):
        row[name] = value


def paired(
    found: Iterable[tuple[str, str, str, NDArray[np.float64], NDArray[np.float64]]],
) -> list[dict[str, Any]]:
    """Comparisons as ``statistics.comparisons`` has them, each on rows of its own; Holm over all together.

    Args:
        found: metric, model, what it is compared with, and the values of both, (N,), that one's first.
    """
    entries: list[dict[str, Any]] = []
    p_values = []
    for metric, model, against, before, after in found:
        p_values.append(paired_p(before, after))
        difference = paired_difference(before, after).as_dict()
        entries.append({"metric": metric, "model": model, "against": against, **difference, "p": p_values[-1]})
    for entry, p in zip(entries, holm(p_values), strict=True):
        entry |= {"p_holm": p, "clear": p < CLEAR}
    return entries
