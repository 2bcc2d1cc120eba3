"""Goals suite: what became of each reward of a combination, and how many answers are good in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .kl import LogRatios
from .result import suite_result
from .sampling import Sample
from .statistics import Estimate, bootstrap_interval, share_interval

FloatArray = NDArray[np.float64]
Sides = tuple[ArrayLike, ArrayLike]
"""Before and after, one value a prompt each."""
GOOD = "good_"
"""What metrics of shares of answers begin with."""


def goals_suite(
    prompts: Sequence[str],
    before: Sequence[Sample],
    after: Sequence[Sample],
    rewards: Mapping[str, Sides],
    good: Mapping[str, Sides],
    *,
    kl: LogRatios | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What changed in the answers to N prompts, reward by reward.

    A large mean can hide answers that are bad in one reward: the share that is good in all of them cannot.

    Args:
        prompts: as they are to be shown.
        before, after: answers of the reference and of the policy, drawn with the same seed and settings.
        rewards: by name, of the answers before and after, (N,) each; NaN where a rule gave none, which is left out of
            that metric and its n.
        good: by name, whether they reach that reward's reference, 1 or 0, (N,) each, NaN likewise; ``all``: whether
            they reach every one.
        kl: log-ratios of ``after``, drawn at temperature 1; see :mod:`align.evals.kl`.

    Returns:
        Metrics, intervals by prompt: ``NAME_before``, ``NAME_after`` and ``NAME_change`` (paired) of each reward;
        ``good_NAME_*`` (shares of answers); ``length_*`` (tokens); ``kl_to_reference`` (nats an answer).
        Rows ``{prompt, before, after, kl}``, answers as ``{text, tokens, finished, rewards, good}``.

    Raises:
        ValueError: counts that differ, or a reward that is infinite.
    """
    if not len(prompts) == len(before) == len(after):
        raise ValueError(
            f"{len(prompts)} prompts, {len(before)} answers before, {len(after)} after: one each per prompt"
        )
    scored = {name: _arrays(name, sides, len(prompts)) for name, sides in rewards.items()}
    judged = {name: _arrays(GOOD + name, sides, len(prompts)) for name, sides in good.items()}
    metrics: dict[str, Estimate] = {}
    for name, values in [*((GOOD + name, values) for name, values in judged.items()), *scored.items()]:
        metrics |= _sides(name, values)
    metrics["length_before"], metrics["length_after"] = (
        bootstrap_interval([len(answer.tokens) for answer in answers]) for answers in (before, after)
    )
    if kl is not None:
        metrics["kl_to_reference"] = bootstrap_interval(kl.nats)
    rows = [
        {
            "prompt": prompt,
            **{
                name: {
                    "text": answers[row].text,
                    "tokens": len(answers[row].tokens),
                    "finished": answers[row].finished,
                    "rewards": {
                        key: None if np.isnan(values[side, row]) else float(values[side, row])
                        for key, values in scored.items()
                    },
                    "good": {
                        key: bool(values[side, row] == 1)
                        for key, values in judged.items()
                        if not np.isnan(values[side, row])
                    },
                }
                for side, (name, answers) in enumerate((("before", before), ("after", after)))
            },
            "kl": None if kl is None else kl.nats[row],
        }
        for row, prompt in enumerate(prompts)
    ]
    return suite_result("goals", metrics, rows, settings)


def _arrays(name: str, sides: Sides, count: int) -> FloatArray:
    before, after = (np.asarray(side, dtype=np.float64) for side in sides)
    if not len(before) == len(after) == count:
        raise ValueError(f"{name}: {len(before)} values before and {len(after)} after, for {count} prompts")
    return np.stack([before, after])


def _sides(name: str, values: FloatArray) -> dict[str, Estimate]:
    before, after = values
    found = {"before": before, "after": after, "change": after - before}
    there = {key: values[~np.isnan(values)] for key, values in found.items()}
    return {
        f"{name}_{key}": (share_interval if key != "change" and name.startswith(GOOD) else bootstrap_interval)(values)
        for key, values in there.items()
        if len(values)
    }
