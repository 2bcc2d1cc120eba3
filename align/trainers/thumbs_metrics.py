"""What is logged of a batch of answers with thumbs: sums that processes can add up, and their means by TRL's names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from align.losses import SequenceLogps
from align.losses.logprobs import TokenLogps
from align.losses.rows import PADDING, Rows
from align.losses.types import UnpairedLogps

_NAMES = {
    "rewards": "rewards/{}",
    "logps": "logps/{}",
    "length": "length/{}_tokens",
    "delta": "displacement/{}_delta",
}


def batch_sums(
    rows: Rows,
    tokens: TokenLogps,
    policy: UnpairedLogps,
    reference: SequenceLogps | None,
    rewards: Tensor,
    weight: Tensor | None,
    threshold: float,
) -> dict[str, Tensor]:
    """Scalars by name; those of one thumb end in ``chosen`` (up) or ``rejected`` (down).

    Args:
        rewards: of the answers, (B,); those above ``threshold`` speak for a thumb up, and equal ones for half of one.
        weight: of the answers, (B,), or None.
    """
    label, sequence = policy.label, policy.sequence
    per_row = {
        "rewards": rewards,
        "logps": sequence.total,
        "length": sequence.length,
        "rows": torch.ones_like(rewards),
    }
    if reference is not None:
        per_row["delta"] = sequence.total - reference.total
    if weight is not None:
        per_row["weight"] = weight
    sums = {
        f"{name} {thumb}": value.detach().float()[which].sum()
        for thumb, which in (("chosen", label), ("rejected", ~label))
        for name, value in per_row.items()
    }
    right = torch.where(label, rewards > threshold, rewards < threshold) + 0.5 * (rewards == threshold)
    return sums | {
        "right": right.float().sum(),
        "entropy": tokens.entropy.float().sum(),
        "scored": tokens.logps.new_tensor(len(tokens.logps), dtype=torch.float32),
        "seen": (rows.segments != PADDING).float().sum(),
    }


def named_means(total: Mapping[str, float]) -> dict[str, float]:
    """Means by the names that are logged; those of a thumb that the batch lacks are left out."""
    found: dict[str, float] = {}
    for thumb in ("chosen", "rejected"):
        if count := total[f"rows {thumb}"]:
            found |= {
                logged.format(thumb): total[f"{name} {thumb}"] / count
                for name, logged in _NAMES.items()
                if f"{name} {thumb}" in total
            }
    if total["rows chosen"] and total["rows rejected"]:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    if "weight rejected" in total and total["rows rejected"]:
        found["bco/weight_down"] = total["weight rejected"] / total["rows rejected"]
    found["thumbs/accuracy"] = total["right"] / (total["rows chosen"] + total["rows rejected"])
    found["entropy"] = total["entropy"] / total["scored"]
    return found
