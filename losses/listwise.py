"""Losses on rankings: K answers to a prompt, best first.

Notation as in ``pairwise``: ``r_k`` is the log-ratio of the k-th best answer, ``S_k - R_k``, nats.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalogue import ranking_loss
from .checks import Positive, check_shape, log_ratio
from .laws import SUMS, Laws
from .types import LossOutput, SequenceLogps, check_type, first


@ranking_loss(
    "plackett_luce",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2305.18290",
    formula="-sum_k [beta r_k - logsumexp_{j>=k} beta r_j]",
    purpose="DPO on whole rankings: the best is drawn first, then the best of the rest, and so on",
    laws=Laws(
        fails={"duplication": SUMS},
        not_applicable={"swap": "K answers have no one margin; at K = 2 it is dpo"},
    ),
)
def plackett_luce(
    policy: SequenceLogps, reference: SequenceLogps, answers: Tensor | None = None, *, beta: Positive
) -> LossOutput:
    """DPO under the Plackett-Luce model of rankings (arXiv:2305.18290); with two answers it is ``dpo``.

    ``loss = -sum_k (beta * r_k - logsumexp_{j >= k} beta * r_j)``: the negative log-probability of the ranking. It is
    a sum of K - 1 terms, each of log(K - k + 1) nats at the reference, so that long rankings weigh more.

    Args:
        policy, reference: totals (nats) and lengths (tokens), (B, K), best answer first.
        answers: how many of the K answers in a row are real, (B,), whole numbers, at least 2. The rest is padding,
            whose totals (any number that the carrier takes) and lengths (1) are read by nothing. None: all of them.
        beta: strength of the pull to the reference, per nat; 0.01-0.5 is usual.

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * r``, (B, K); 0 for padding.

    Raises:
        ValueError: beta is not positive, there are fewer than two answers, or policy and reference score different
            completions.
    """
    check_type("policy", policy, SequenceLogps)
    if policy.total.ndim != 2 or policy.total.shape[1] < 2:
        raise ValueError(f"policy has shape {tuple(policy.total.shape)}: a ranking is (B, K) with two answers or more")
    rewards = beta * log_ratio(policy, reference)
    rank = torch.arange(rewards.shape[1], device=rewards.device)
    real = _real(answers, rewards, rank)
    rewards = torch.where(real, rewards, rewards.new_zeros(()))
    # Term k is softplus of the log-sum over the worse answers j of exp(reward_j - reward_k). The last real answer and
    # padding have none worse, and no term; their log-sum is over stand-ins, for one over nothing has a NaN gradient.
    worse = (rank[None, :] > rank[:, None]) & real[:, None, :]  # (B, k, j)
    ends = ~worse.any(-1)
    gaps = rewards[:, None, :] - rewards[:, :, None]
    against = gaps.masked_fill(~(worse | ends[..., None]), -torch.inf).logsumexp(-1)
    loss = (-F.logsigmoid(-against)).masked_fill(ends, 0.0).sum(-1)
    return LossOutput(loss, rewards.detach())


def _real(answers: Tensor | None, rewards: Tensor, rank: Tensor) -> Tensor:
    """Which of the answers are not padding, (B, K)."""
    count, width = rewards.shape
    if answers is None:
        return torch.ones_like(rewards, dtype=torch.bool)
    check_shape("answers", answers, (count,), "the number of real answers of each row")
    if answers.is_floating_point() or answers.dtype == torch.bool:
        raise ValueError(f"answers is {answers.dtype}: it counts answers, in whole numbers")
    bad = (answers < 2) | (answers > width)
    if bool(bad.any()):
        raise ValueError(f"answers{first(bad)} is {int(answers[bad][0])}: a row of {width} ranks 2 to {width} answers")
    return rank < answers[:, None].to(rank.device)
