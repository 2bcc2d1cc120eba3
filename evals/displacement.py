"""Displacement suite: where training moved the log-probs of held-out answers (arXiv 2410.08847).

A pairwise loss can widen the margin while both answers become less likely; the probability then goes to answers that
nobody compared. These numbers show it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.losses.types import PairLogps, SequenceLogps

from .result import suite_result
from .statistics import Estimate, bootstrap_interval


def displacement_suite(
    policy: PairLogps,
    reference: PairLogps,
    row_ids: Sequence[str],
    *,
    groups: Sequence[Hashable] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Change of the log-probs of N held-out pairs, ``log pi - log pi_ref`` in nats.

    Args:
        policy, reference: log-probs of the same pairs under the two models.
        row_ids: one per pair, kept in the rows.
        groups: the prompt of each pair, where a prompt has several: they are resampled together.
        settings: kept in the result.

    Returns:
        Metrics ``chosen_delta`` and ``rejected_delta`` (nats per answer, mean over pairs), ``chosen_delta_per_token``
        (nats per token of an answer, mean over pairs), ``frac_chosen_down`` (share of pairs whose chosen answer fell)
        and ``largest_fall`` (nats that the chosen answer which fell most has lost, 0 when none fell; an extreme has
        no bootstrap interval); rows ``{row_id, chosen_delta, rejected_delta, chosen_tokens, rejected_tokens}``.

    Raises:
        ValueError: the two models scored different pairs, or the row ids do not match them.
    """
    chosen, chosen_tokens = _change(policy.chosen, reference.chosen, "chosen")
    rejected, rejected_tokens = _change(policy.rejected, reference.rejected, "rejected")
    if len(row_ids) != len(chosen):
        raise ValueError(f"{len(chosen)} pairs and {len(row_ids)} row ids")
    metrics = {
        "chosen_delta": bootstrap_interval(chosen, groups=groups),
        "chosen_delta_per_token": bootstrap_interval(chosen / chosen_tokens, groups=groups),
        "rejected_delta": bootstrap_interval(rejected, groups=groups),
        "frac_chosen_down": bootstrap_interval(chosen < 0, groups=groups),
        "largest_fall": Estimate(max(0.0, -float(chosen.min())), None, None, len(chosen)),
    }
    columns = zip(row_ids, chosen, rejected, chosen_tokens, rejected_tokens, strict=True)
    rows = [
        {
            "row_id": row_id,
            "chosen_delta": float(up),
            "rejected_delta": float(down),
            "chosen_tokens": int(long),
            "rejected_tokens": int(short),
        }
        for row_id, up, down, long, short in columns
    ]
    return suite_result("displacement", metrics, rows, settings)


def _change(
    policy: SequenceLogps, reference: SequenceLogps, side: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """``log pi - log pi_ref`` (B,) in nats and the lengths (B,) in tokens."""
    lengths = policy.length.cpu().numpy().astype(np.int64)
    if not np.array_equal(lengths, reference.length.cpu().numpy()):
        raise ValueError(f"policy and reference scored different {side} answers: their token counts differ")
    change = policy.total.detach().double().cpu() - reference.total.detach().double().cpu()
    return change.numpy(), lengths
