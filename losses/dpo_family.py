"""DPO and its kin: losses on pairs that are a logistic function of one margin against a reference.

Notation, soft labels and what raises: see ``pairwise``, which these losses are a part of.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalogue import pairwise_loss
from .checks import NotNegative, Positive, Share, log_ratios
from .laws import MEANS, SUMS, Laws
from .soft_labels import expected, logistic, probability
from .types import LossOutput, PairLogps


@pairwise_loss(
    "dpo",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2305.18290",
    formula="-log sigma(beta (r_w - r_l))",
    purpose="the standard: fits a Bradley-Terry reward that is beta times the log-ratio to the reference",
    laws=Laws(fails={"duplication": SUMS}),
)
def dpo(
    policy: PairLogps,
    reference: PairLogps,
    preference: Tensor | None = None,
    *,
    beta: Positive,
    label_smoothing: Share = 0.0,
) -> LossOutput:
    """Direct preference optimisation (arXiv:2305.18290, Eq. 7); with label smoothing, cDPO.

    ``loss = -q log sigmoid(z) - (1 - q) log sigmoid(-z)`` with ``z = beta * (r_w - r_l)``, ``r = log pi - log pi_ref``
    summed over the completion, and ``q = p (1 - eps) + (1 - p) eps``; with sure labels and no smoothing, q = 1.

    Args:
        policy, reference: totals (nats) and lengths (tokens), each of shape (B,).
        preference: probability that the chosen answer is preferred, (B,); None: it is.
        beta: strength of the pull to the reference, per nat; 0.01-0.5 is usual.
        label_smoothing: eps, the share of labels taken to be wrong, in [0, 0.5). The margin aimed at is then finite;
            ``robust_dpo`` undoes the flips instead.

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * r``.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    margin = chosen - rejected
    right = None
    if preference is not None or label_smoothing:
        p = torch.ones_like(margin) if preference is None else probability(preference, margin)
        right = p * (1 - label_smoothing) + (1 - p) * label_smoothing
    return LossOutput.from_rewards(logistic(margin, right), chosen, rejected)


@pairwise_loss(
    "ln_dpo",
    reference=True,
    default_beta=5.0,
    paper="arXiv:2407.15229",
    formula="-log sigma(beta (r_w/n_w - r_l/n_l))",
    purpose="DPO without its pull to long answers: log-ratios are means per token",
    laws=Laws(fails={"prompt_shift": MEANS}),
)
def ln_dpo(policy: PairLogps, reference: PairLogps, preference: Tensor | None = None, *, beta: Positive) -> LossOutput:
    """Length-normalised DPO (arXiv:2407.15229).

    ``loss = -log sigmoid(beta * (a_w - a_l))`` with ``a = (log pi - log pi_ref) / length``: the mean log-ratio per
    completion token, so that a longer answer does not weigh more for its length. At equal lengths ``n`` it is DPO at
    ``beta / n``.

    Args:
        policy, reference: totals (nats) and lengths (tokens, EOS counted), each of shape (B,).
        preference: probability that the chosen answer is preferred, (B,); None: it is.
        beta: inverse temperature, in tokens per nat; 1-10 is usual (DPO's beta times the typical length).

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * a``.
    """
    chosen, rejected = (beta * ratio for ratio in mean_log_ratios(policy, reference))
    margin = chosen - rejected
    right = None if preference is None else probability(preference, margin)
    return LossOutput.from_rewards(logistic(margin, right), chosen, rejected)


@pairwise_loss(
    "robust_dpo",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2403.00409",
    formula="[-(1-eps) log sigma(z) + eps log sigma(-z)] / (1-2 eps), z = beta (r_w - r_l)",
    purpose="DPO when a known share of the labels is flipped: in expectation, DPO's loss on the clean ones",
    laws=Laws(
        fails={
            "duplication": SUMS,
            "large_beta": "the flips are taken off with a negative weight, and the loss falls without end",
        }
    ),
)
def robust_dpo(
    policy: PairLogps,
    reference: PairLogps,
    preference: Tensor | None = None,
    *,
    beta: Positive,
    label_smoothing: Share = 0.1,
) -> LossOutput:
    """Robust DPO: an unbiased estimate of DPO's loss on labels of which a share is flipped (arXiv:2403.00409).

    ``loss = (-(1 - eps) log sigmoid(z) + eps log sigmoid(-z)) / (1 - 2 eps)`` with ``z = beta * (r_w - r_l)``. Where
    each label was flipped with probability eps, its expectation over the flips is DPO's loss of the label as it was.
    It is not bounded below in a single pair.

    Args:
        policy, reference: totals (nats) and lengths (tokens), each of shape (B,).
        preference: probability that the chosen answer is preferred, as observed, flips included, (B,); None: it is.
        beta: strength of the pull to the reference, per nat; 0.01-0.5 is usual.
        label_smoothing: eps, the share of labels that were flipped, in [0, 0.5); at 0 it is DPO.

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * r``.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    margin = chosen - rejected
    p = torch.ones_like(margin) if preference is None else probability(preference, margin)
    # The weights of the two labels, (p - eps) / (1 - 2 eps) and (1 - p - eps) / (1 - 2 eps), add up to 1.
    right = (p - label_smoothing) / (1 - 2 * label_smoothing)
    return LossOutput.from_rewards(logistic(margin, right), chosen, rejected)


@pairwise_loss(
    "dpop",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2402.13228",
    formula="-log sigma(beta (r_w - r_l - penalty max(0, -r_w)))",
    purpose="DPO-Positive: DPO that is punished where the chosen answer becomes less likely than under the reference",
    laws=Laws(
        fails={
            "prompt_shift": "the penalty sees the chosen answer's log-ratio, not a difference",
            "swap": "the penalty is on the chosen answer alone",
            "duplication": SUMS,
        }
    ),
)
def dpop(
    policy: PairLogps,
    reference: PairLogps,
    preference: Tensor | None = None,
    *,
    beta: Positive,
    penalty: NotNegative = 50.0,
) -> LossOutput:
    """DPO-Positive (arXiv:2402.13228).

    ``loss = -log sigmoid(beta * (r_w - r_l - penalty * max(0, -r_w)))`` with ``r`` summed over the completion.

    Args:
        policy, reference: totals (nats) and lengths (tokens), each of shape (B,).
        preference: probability that the chosen answer is preferred, (B,); None: it is. The penalty is then on
            whichever answer is preferred.
        beta: strength of the pull to the reference, per nat.
        penalty: the paper's lambda, which it takes from 5 to 500; at 0 the loss is DPO.

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * (r_w - penalty * max(0, -r_w))`` and ``beta * r_l``.
    """
    one, other = log_ratios(policy, reference)
    chosen, rejected = (beta * (ratio - penalty * F.relu(-ratio)) for ratio in (one, other))
    loss = expected(-F.logsigmoid(chosen - beta * other), -F.logsigmoid(rejected - beta * one), preference)
    return LossOutput.from_rewards(loss, chosen, beta * other)


@pairwise_loss(
    "r_dpo",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2403.19159",
    formula="-log sigma(beta (r_w - r_l) - alpha (n_w - n_l))",
    purpose="DPO with a price on length: alpha below 0 shortens answers",
    laws=Laws(fails={"duplication": SUMS}),
)
def r_dpo(
    policy: PairLogps, reference: PairLogps, preference: Tensor | None = None, *, beta: Positive, alpha: float = -0.01
) -> LossOutput:
    """DPO regularised in length (arXiv:2403.19159).

    ``loss = -log sigmoid(beta * (r_w - r_l) - alpha * (n_w - n_l))``. The policy that it aims at is
    ``pi_ref exp((reward + alpha * n) / beta)``, normalised: alpha is what a further token is worth. The paper's length
    penalty, which is positive where long answers cost, is ``-alpha``.

    Args:
        policy, reference: totals (nats) and lengths (tokens), each of shape (B,).
        preference: probability that the chosen answer is preferred, (B,); None: it is.
        beta: strength of the pull to the reference, per nat.
        alpha: worth of a token, in units of the reward; below 0 shortens answers, above 0 lengthens them, 0 is DPO.

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * r - alpha * n``.
    """
    one, other = log_ratios(policy, reference)
    # A whole number times a Python float would be float32, whatever the log-probs are.
    chosen = beta * one - alpha * policy.chosen.length.to(one.dtype)
    rejected = beta * other - alpha * policy.rejected.length.to(one.dtype)
    margin = chosen - rejected
    right = None if preference is None else probability(preference, margin)
    return LossOutput.from_rewards(logistic(margin, right), chosen, rejected)


def mean_log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """``r_w / n_w`` and ``r_l / n_l``, nats per token, (B,) each."""
    chosen, rejected = log_ratios(policy, reference)
    return chosen / policy.chosen.length, rejected / policy.rejected.length
