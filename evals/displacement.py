"""Displacement suite: where training moved the log-probs of held-out answers (arXiv 2410.08847).

A pairwise loss can widen the margin while both answers become less likely; the probability then goes to answers that
nobody compared. These numbers show it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align.losses.types import PairLogps, SequenceLogps

from .result import suite_result
from .statistics import Estimate, bootstrap_interval, share_interval

MEANS = (
    "chosen_delta",
    "chosen_delta_per_token",
    "rejected_delta",
    "rejected_delta_per_token",
    "frac_chosen_down",
)
"""Metrics that are means over pairs."""
COMPARED = ("chosen_delta_per_token", "rejected_delta_per_token", "frac_chosen_down")
"""Those that models are compared on: a change in nats an answer says little beside one a token."""
GAINED = 10


def displacement_suite(
    policy: PairLogps,
    reference: PairLogps,
    row_ids: Sequence[str],
    *,
    groups: Sequence[Hashable] | None = None,
    gained: Sequence[Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Change of the log-probs of N held-out pairs, ``log pi - log pi_ref`` in nats.

    Args:
        policy, reference: log-probs of the same pairs under the two models.
        row_ids: one per pair, kept in the rows.
        groups: the prompt of each pair, where a prompt has several: they are resampled together.
        gained: from ``gained_tokens``, kept in the result.
        settings: kept in the result.

    Returns:
        Metrics ``chosen_delta`` and ``rejected_delta`` (nats per answer, mean over pairs), both ``_per_token`` (nats
        per token of an answer, mean over pairs), ``frac_chosen_down`` (share of pairs whose chosen answer fell)
        and ``largest_fall`` (nats that the chosen answer which fell most has lost, 0 when none fell; an extreme has
        no bootstrap interval); rows ``{row_id, chosen_delta, rejected_delta, chosen_tokens, rejected_tokens}``.

    Raises:
        ValueError: the two models scored different pairs, or the row ids do not match them.
    """
    columns = displacement_values(policy, reference)
    chosen, rejected = columns["chosen_delta"], columns["rejected_delta"]
    if len(row_ids) != len(chosen):
        raise ValueError(f"{len(chosen)} pairs and {len(row_ids)} row ids")
    metrics = {name: bootstrap_interval(columns[name], groups=groups) for name in MEANS}
    metrics["frac_chosen_down"] = share_interval(columns["frac_chosen_down"], groups=groups)
    metrics["largest_fall"] = Estimate(max(0.0, -float(chosen.min())), None, None, len(chosen))
    lengths = (side.length.tolist() for side in (policy.chosen, policy.rejected))
    rows = [
        {
            "row_id": row_id,
            "chosen_delta": float(up),
            "rejected_delta": float(down),
            "chosen_tokens": long,
            "rejected_tokens": short,
        }
        for row_id, up, down, long, short in zip(row_ids, chosen, rejected, *lengths, strict=True)
    ]
    result = suite_result("displacement", metrics, rows, settings, groups=groups)
    return result if gained is None else {**result, "gained": [dict(token) for token in gained]}


def displacement_values(policy: PairLogps, reference: PairLogps) -> dict[str, NDArray[np.float64]]:
    """What ``MEANS`` are the means of, by pair, (N,): to compare models on.

    Args:
        policy, reference: log-probs of the same pairs under the two models.

    Raises:
        ValueError: the models scored different pairs.
    """
    chosen, chosen_tokens = _change(policy.chosen, reference.chosen, "chosen")
    rejected, rejected_tokens = _change(policy.rejected, reference.rejected, "rejected")
    values = (chosen, chosen / chosen_tokens, rejected, rejected / rejected_tokens, (chosen < 0).astype(np.float64))
    return dict(zip(MEANS, values, strict=True))


def largest_decreases(steps: Sequence[SequenceLogps]) -> NDArray[np.float64]:
    """``max over a < b of pi_a(y | x) - pi_b(y | x)`` of each answer over the steps of a run, (N,), 0 where none fell.

    The measure of arXiv:2410.08847, section 3, in probability; of long answers it is next to 0 whatever happens.

    Args:
        steps: log-probs of the same answers at two or more steps, in their order.
    """
    if len(steps) < 2:
        raise ValueError(f"{len(steps)} step: a decrease is between two")
    probability = np.exp(np.stack([step.total.detach().double().cpu().numpy() for step in steps]))
    highest = np.maximum.accumulate(probability, axis=0)
    decreases: NDArray[np.float64] = (highest - probability).max(axis=0)
    return decreases


def gained_tokens(before: Tensor, after: Tensor, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    """The tokens that gained most probability, most first; fewer than ``GAINED`` where fewer gained.

    They are chosen for their gain, so it is a little larger here than it would be on other prompts.

    Args:
        before, after: probabilities of every token at one place, means over prompts, (V,).
        decode: token ids to text.

    Returns:
        ``{id, token, before, after}`` each.
    """
    if before.shape != after.shape:
        raise ValueError(f"{tuple(before.shape)} and {tuple(after.shape)}: models of different vocabularies")
    gain, ids = torch.topk(after - before, min(GAINED, len(before)))
    return [
        {"id": token, "token": decode([token]), "before": float(before[token]), "after": float(after[token])}
        for token in ids[gain > 0].tolist()
    ]


def _change(
    policy: SequenceLogps, reference: SequenceLogps, side: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """``log pi - log pi_ref`` (B,) in nats and the lengths (B,) in tokens."""
    lengths = policy.length.cpu().numpy().astype(np.int64)
    if not np.array_equal(lengths, reference.length.cpu().numpy()):
        raise ValueError(f"policy and reference scored different {side} answers: their token counts differ")
    change = policy.total.detach().double().cpu() - reference.total.detach().double().cpu()
    return change.numpy(), lengths
