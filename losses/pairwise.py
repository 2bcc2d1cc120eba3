"""Losses on pairs: a prompt, the answer that was preferred and the one that was not.

Notation of the formulas: ``w`` is the chosen answer, ``l`` the rejected one; ``S`` a sum of token log-probs under the
policy and ``R`` under the reference (nats), ``n`` a length in tokens, ``r = S - R`` the log-ratio, ``sigma`` the
logistic function. All losses are unreduced, (B,), and compute in float32 or better whatever the inputs' dtype.
``rewards`` are the loss's own: what its margin is made of, so that a positive margin means that the pair is ranked
right by the model that this loss fits.
"""

from __future__ import annotations

import torch.nn.functional as F

from .catalogue import pairwise_loss
from .checks import check_not_negative, check_positive, log_ratio, wide
from .types import LossOutput, PairLogps


@pairwise_loss(
    "dpo",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2305.18290",
    formula="-log sigma(beta (r_w - r_l))",
    purpose="the standard: fits a Bradley-Terry reward that is beta times the log-ratio to the reference",
)
def dpo(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """Direct preference optimisation (arXiv:2305.18290, Eq. 7).

    ``loss = -log sigmoid(beta * (r_w - r_l))`` with ``r = log pi - log pi_ref`` summed over the completion.

    Args:
        policy, reference: totals (nats) and lengths (tokens), each of shape (B,).
        beta: strength of the pull to the reference, per nat; 0.01-0.5 is usual.

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * r``.

    Raises:
        ValueError: beta is not positive, or policy and reference score different completions.
    """
    check_positive("beta", beta)
    chosen = beta * log_ratio(policy.chosen, reference.chosen)
    rejected = beta * log_ratio(policy.rejected, reference.rejected)
    return LossOutput.from_rewards(-F.logsigmoid(chosen - rejected), chosen, rejected)


@pairwise_loss(
    "ln_dpo",
    reference=True,
    default_beta=5.0,
    paper="arXiv:2407.15229",
    formula="-log sigma(beta (r_w/n_w - r_l/n_l))",
    purpose="DPO without its pull to long answers: log-ratios are means per token",
)
def ln_dpo(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """Length-normalised DPO (arXiv:2407.15229).

    ``loss = -log sigmoid(beta * (a_w - a_l))`` with ``a = (log pi - log pi_ref) / length``: the mean log-ratio per
    completion token, so that a longer answer does not weigh more for its length. At equal lengths ``n`` it is DPO at
    ``beta / n``.

    Args:
        policy, reference: totals (nats) and lengths (tokens, EOS counted), each of shape (B,).
        beta: inverse temperature, in tokens per nat; 1-10 is usual (DPO's beta times the typical length).

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * a``.

    Raises:
        ValueError: beta is not positive, or policy and reference score different completions.
    """
    check_positive("beta", beta)
    chosen = beta * log_ratio(policy.chosen, reference.chosen) / policy.chosen.length
    rejected = beta * log_ratio(policy.rejected, reference.rejected) / policy.rejected.length
    return LossOutput.from_rewards(-F.logsigmoid(chosen - rejected), chosen, rejected)


@pairwise_loss(
    "ipo",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2310.12036",
    formula="(r_w - r_l - 1/(2 beta))^2",
    purpose="a bounded target for the margin, so that certain labels cannot drive it to infinity (the paper's form)",
)
def ipo(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """Identity preference optimisation, the paper's form on sequence sums (arXiv:2310.12036, Eq. 17).

    ``loss = (r_w - r_l - 1 / (2 * beta))^2`` with ``r`` summed over the completion. TRL's ``ipo`` is another loss: it
    divides ``r`` by the length (here ``ipo_per_token``).

    Args:
        policy, reference: totals (nats) and lengths (tokens), each of shape (B,).
        beta: the paper's tau: the margin aimed at is ``1 / (2 * beta)`` nats.

    Returns:
        Unreduced loss (B,), in nats squared, and the implicit rewards ``beta * r``; the aim is a margin of 1/2.

    Raises:
        ValueError: beta is not positive, or policy and reference score different completions.
    """
    check_positive("beta", beta)
    chosen = log_ratio(policy.chosen, reference.chosen)
    rejected = log_ratio(policy.rejected, reference.rejected)
    return LossOutput.from_rewards((chosen - rejected - 0.5 / beta) ** 2, beta * chosen, beta * rejected)


@pairwise_loss(
    "ipo_per_token",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2310.12036",
    formula="(r_w/n_w - r_l/n_l - 1/(2 beta))^2",
    purpose="IPO on mean log-ratios per token, as TRL's ipo has it; not the paper's loss",
)
def ipo_per_token(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """IPO on mean log-ratios per token: what TRL calls ``ipo``. The paper's form is ``ipo``.

    ``loss = (r_w / n_w - r_l / n_l - 1 / (2 * beta))^2``.

    Args:
        policy, reference: totals (nats) and lengths (tokens), each of shape (B,).
        beta: the margin aimed at is ``1 / (2 * beta)`` nats per token.

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * r / n``; the aim is a margin of 1/2.

    Raises:
        ValueError: beta is not positive, or policy and reference score different completions.
    """
    check_positive("beta", beta)
    chosen = log_ratio(policy.chosen, reference.chosen) / policy.chosen.length
    rejected = log_ratio(policy.rejected, reference.rejected) / policy.rejected.length
    return LossOutput.from_rewards((chosen - rejected - 0.5 / beta) ** 2, beta * chosen, beta * rejected)


@pairwise_loss(
    "slic",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2309.06657",
    formula="max(0, 1 - beta (r_w - r_l))",
    purpose="the hinge on log-ratios (TRL's hinge): pairs beyond the margin stop pushing",
)
def slic(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """SLiC in its reference form: the hinge on log-ratios (arXiv:2309.06657, Sec. 3.2; TRL's ``hinge``).

    This is the hinge-norm loss of the RSO paper; SLiC-HF itself (arXiv:2305.10425) has no reference and adds an SFT
    term.

    ``loss = max(0, 1 - beta * (r_w - r_l))`` with ``r`` summed over the completion. The margin is ``1 / beta`` nats.

    Args:
        policy, reference: totals (nats) and lengths (tokens), each of shape (B,).
        beta: reciprocal margin, per nat.

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * r``.

    Raises:
        ValueError: beta is not positive, or policy and reference score different completions.
    """
    check_positive("beta", beta)
    chosen = beta * log_ratio(policy.chosen, reference.chosen)
    rejected = beta * log_ratio(policy.rejected, reference.rejected)
    return LossOutput.from_rewards(F.relu(1 - (chosen - rejected)), chosen, rejected)


@pairwise_loss(
    "simpo",
    reference=False,
    default_beta=2.0,
    paper="arXiv:2405.14734",
    formula="-log sigma(beta (S_w/n_w - S_l/n_l) - gamma)",
    purpose="no reference model: mean log-probs themselves are the reward, with a target margin",
)
def simpo(policy: PairLogps, *, beta: float, gamma: float = 1.0) -> LossOutput:
    """SimPO (arXiv:2405.14734, Eq. 6): ``loss = -log sigmoid(beta * (S_w / n_w - S_l / n_l) - gamma)``.

    Args:
        policy: totals (nats) and lengths (tokens), each of shape (B,).
        beta: scale of the mean log-prob, in tokens per nat; 2-10 is usual.
        gamma: target margin, in units of the reward; about half of beta is usual.

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * S / n``.

    Raises:
        ValueError: beta is not positive, or gamma is negative.
    """
    check_positive("beta", beta)
    check_not_negative("gamma", gamma)
    chosen = beta * wide(policy.chosen.total) / policy.chosen.length
    rejected = beta * wide(policy.rejected.total) / policy.rejected.length
    return LossOutput.from_rewards(-F.logsigmoid(chosen - rejected - gamma), chosen, rejected)


@pairwise_loss(
    "sft",
    reference=False,
    default_beta=None,
    paper="arXiv:2404.19733",
    formula="-S_w/n_w",
    purpose="likelihood of the chosen answer; a term to combine with others, so that it does not fall",
    ranks=False,
)
def sft(policy: PairLogps) -> LossOutput:
    """Negative mean log-prob per token of the chosen answer (the NLL term of arXiv:2404.19733, Eq. 1).

    Args:
        policy: totals (nats) and lengths (tokens), each of shape (B,).

    Returns:
        Unreduced loss (B,), nats per token, and the mean log-probs as rewards; in a combination with a loss that
        ranks answers they are left out.
    """
    chosen = wide(policy.chosen.total) / policy.chosen.length
    rejected = wide(policy.rejected.total) / policy.rejected.length
    return LossOutput.from_rewards(-chosen, chosen, rejected)
