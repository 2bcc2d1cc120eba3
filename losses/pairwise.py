"""Losses on pairs: a prompt, the answer that was preferred and the one that was not.

Notation of the formulas: ``w`` is the chosen answer, ``l`` the rejected one; ``S`` a sum of token log-probs under the
policy and ``R`` under the reference (nats), ``n`` a length in tokens, ``r = S - R`` the log-ratio, ``sigma`` the
logistic function. All losses are unreduced, (B,), and compute in float32 or better whatever the inputs' dtype.
``rewards`` are the loss's own: what its margin is made of, so that a positive margin means that the pair is ranked
right by the model that this loss fits.

Soft labels: ``preference``, (B,), is the probability p that the chosen answer is preferred, and None means that it is
for sure. The loss is then its expectation over the label, ``p loss(w, l) + (1 - p) loss(l, w)``. The two IPO losses
alone have a soft form of their own, the published ``(margin - (p - 1/2) / beta)^2``: it lies below the expectation by
``p (1 - p) / beta^2``, which no parameter moves, so that the gradients are the same.

Every loss raises a ValueError for a setting out of its range, a probability outside [0, 1], a ``preference`` that is
not of shape (B,), and a reference that scores other completions than the policy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalogue import pairwise_loss
from .checks import NotNegative, Positive, check_log_probs, log_ratios, wide
from .complement import log_not
from .dpo_family import dpo, dpop, ln_dpo, mean_log_ratios, r_dpo, robust_dpo
from .laws import MEANS, SUMS, Laws
from .soft_labels import expected, probability
from .types import LossOutput, PairLogps, SequenceLogps, check_type

__all__ = [
    "cpo",
    "dpo",
    "dpop",
    "ipo",
    "ipo_per_token",
    "ln_dpo",
    "orpo",
    "r_dpo",
    "robust_dpo",
    "sft",
    "simpo",
    "slic",
    "slic_hf",
]

# Reasons that several losses share.
_NO_REFERENCE = "it has no reference"
_NO_BETA = "it has no beta"
_LIKELIHOOD = "its likelihood term sees the chosen answer alone"
_OWN_TARGET = "the margin aimed at is 1/(2 beta), whatever the margin is"


@pairwise_loss(
    "ipo",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2310.12036",
    formula="(r_w - r_l - 1/(2 beta))^2",
    purpose="a bounded target for the margin, so that certain labels cannot drive it to infinity (the paper's form)",
    laws=Laws(fails={"duplication": SUMS, "small_beta": _OWN_TARGET, "large_beta": _OWN_TARGET}),
)
def ipo(policy: PairLogps, reference: PairLogps, preference: Tensor | None = None, *, beta: Positive) -> LossOutput:
    """Identity preference optimisation, the paper's form on sequence sums (arXiv:2310.12036, Eq. 17).

    ``loss = (r_w - r_l - 1 / (2 * beta))^2`` with ``r`` summed over the completion; with soft labels
    ``(r_w - r_l - (p - 1/2) / beta)^2``. TRL's ``ipo`` is another loss: it divides ``r`` by the length (here
    ``ipo_per_token``).

    Args:
        policy, reference: totals (nats) and lengths (tokens), each of shape (B,).
        preference: probability that the chosen answer is preferred, (B,); None: it is.
        beta: the paper's tau: the margin aimed at is ``1 / (2 * beta)`` nats.

    Returns:
        Unreduced loss (B,), in nats squared, and the implicit rewards ``beta * r``; the aim is a margin of p - 1/2.
    """
    chosen, rejected = log_ratios(policy, reference)
    return LossOutput.from_rewards(_squared(chosen - rejected, preference, beta), beta * chosen, beta * rejected)


@pairwise_loss(
    "ipo_per_token",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2310.12036",
    formula="(r_w/n_w - r_l/n_l - 1/(2 beta))^2",
    purpose="IPO on mean log-ratios per token, as TRL's ipo has it; not the paper's loss",
    laws=Laws(fails={"prompt_shift": MEANS, "small_beta": _OWN_TARGET, "large_beta": _OWN_TARGET}),
)
def ipo_per_token(
    policy: PairLogps, reference: PairLogps, preference: Tensor | None = None, *, beta: Positive
) -> LossOutput:
    """IPO on mean log-ratios per token: what TRL calls ``ipo``. The paper's form is ``ipo``.

    ``loss = (r_w / n_w - r_l / n_l - 1 / (2 * beta))^2``; with soft labels, ``(p - 1/2) / beta`` is taken off.

    Args:
        policy, reference: totals (nats) and lengths (tokens), each of shape (B,).
        preference: probability that the chosen answer is preferred, (B,); None: it is.
        beta: the margin aimed at is ``1 / (2 * beta)`` nats per token.

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * r / n``; the aim is a margin of p - 1/2.
    """
    chosen, rejected = mean_log_ratios(policy, reference)
    return LossOutput.from_rewards(_squared(chosen - rejected, preference, beta), beta * chosen, beta * rejected)


@pairwise_loss(
    "slic",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2309.06657",
    formula="max(0, 1 - beta (r_w - r_l))",
    purpose="the hinge on log-ratios (TRL's hinge): pairs beyond the margin stop pushing",
    laws=Laws(fails={"duplication": SUMS}),
)
def slic(policy: PairLogps, reference: PairLogps, preference: Tensor | None = None, *, beta: Positive) -> LossOutput:
    """SLiC in its reference form: the hinge on log-ratios (arXiv:2309.06657; TRL's ``hinge``).

    This is the hinge-norm loss of the RSO paper; SLiC-HF itself, without a reference, is ``slic_hf``.

    ``loss = max(0, 1 - beta * (r_w - r_l))`` with ``r`` summed over the completion. The margin is ``1 / beta`` nats.

    Args:
        policy, reference: totals (nats) and lengths (tokens), each of shape (B,).
        preference: probability that the chosen answer is preferred, (B,); None: it is.
        beta: reciprocal margin, per nat.

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * r``.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    margin = chosen - rejected
    loss = expected(F.relu(1 - margin), F.relu(1 + margin), preference)
    return LossOutput.from_rewards(loss, chosen, rejected)


@pairwise_loss(
    "slic_hf",
    reference=False,
    default_beta=None,
    paper="arXiv:2305.10425",
    formula="max(0, delta - (S_w - S_l)) - sft_weight S_w",
    purpose="SLiC-HF: a hinge on the log-probs themselves; its likelihood term stands for the reference",
    laws=Laws(
        fails={"prompt_shift": _LIKELIHOOD, "swap": _LIKELIHOOD, "duplication": SUMS},
        not_applicable={"reference_shift": _NO_REFERENCE, "small_beta": _NO_BETA, "large_beta": _NO_BETA},
    ),
)
def slic_hf(
    policy: PairLogps, preference: Tensor | None = None, *, delta: NotNegative = 1.0, sft_weight: NotNegative = 0.1
) -> LossOutput:
    """SLiC-HF with the chosen answer as the one to imitate (arXiv:2305.10425).

    ``loss = max(0, delta - (S_w - S_l)) - sft_weight * S_w``, both terms on sums over the completion.

    Args:
        policy: totals (nats) and lengths (tokens), each of shape (B,).
        preference: probability that the chosen answer is preferred, (B,); None: it is. With it the answer to imitate
            is the preferred one too.
        delta: margin, nats.
        sft_weight: weight of the negative log-prob of the answer to imitate.

    Returns:
        Unreduced loss (B,), nats, and the log-probs ``S`` as rewards.
    """
    check_type("policy", policy, PairLogps)
    chosen, rejected = wide(policy.chosen.total), wide(policy.rejected.total)
    loss = expected(
        F.relu(delta - (chosen - rejected)) - sft_weight * chosen,
        F.relu(delta - (rejected - chosen)) - sft_weight * rejected,
        preference,
    )
    return LossOutput.from_rewards(loss, chosen, rejected)


@pairwise_loss(
    "simpo",
    reference=False,
    default_beta=2.0,
    paper="arXiv:2405.14734",
    formula="-log sigma(beta (S_w/n_w - S_l/n_l) - gamma)",
    purpose="no reference model: mean log-probs themselves are the reward, with a target margin",
    laws=Laws(fails={"prompt_shift": MEANS}, not_applicable={"reference_shift": _NO_REFERENCE}),
)
def simpo(
    policy: PairLogps, preference: Tensor | None = None, *, beta: Positive, gamma: NotNegative = 1.0
) -> LossOutput:
    """SimPO (arXiv:2405.14734, Eq. 6): ``loss = -log sigmoid(beta * (S_w / n_w - S_l / n_l) - gamma)``.

    Args:
        policy: totals (nats) and lengths (tokens), each of shape (B,).
        preference: probability that the chosen answer is preferred, (B,); None: it is. The target margin then counts
            for whichever answer is preferred.
        beta: scale of the mean log-prob, in tokens per nat; 2-10 is usual.
        gamma: target margin, in units of the reward, 0 or more; about half of beta is usual.

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * S / n``.
    """
    check_type("policy", policy, PairLogps)
    chosen, rejected = beta * _mean(policy.chosen), beta * _mean(policy.rejected)
    margin = chosen - rejected
    loss = expected(-F.logsigmoid(margin - gamma), -F.logsigmoid(-margin - gamma), preference)
    return LossOutput.from_rewards(loss, chosen, rejected)


@pairwise_loss(
    "cpo",
    reference=False,
    default_beta=0.1,
    paper="arXiv:2401.08417",
    formula="-log sigma(beta (S_w - S_l)) - sft_weight S_w/n_w",
    purpose="DPO with the reference left out, and a likelihood term in its stead",
    laws=Laws(
        fails={
            "prompt_shift": _LIKELIHOOD,
            "swap": _LIKELIHOOD,
            "small_beta": "its likelihood term does not depend on beta",
            "large_beta": "its likelihood term does not depend on beta",
            "duplication": SUMS,
        },
        not_applicable={"reference_shift": _NO_REFERENCE},
    ),
)
def cpo(
    policy: PairLogps, preference: Tensor | None = None, *, beta: Positive, sft_weight: NotNegative = 1.0
) -> LossOutput:
    """Contrastive preference optimisation (arXiv:2401.08417).

    ``loss = -log sigmoid(beta * (S_w - S_l)) - sft_weight * S_w / n_w``: DPO's with a uniform reference, and the mean
    negative log-prob per token of the chosen answer (TRL's, pooled over the tokens of a batch, differs in the weights
    of its rows).

    Args:
        policy: totals (nats) and lengths (tokens), each of shape (B,).
        preference: probability that the chosen answer is preferred, (B,); None: it is.
        beta: inverse temperature, per nat.
        sft_weight: weight of the likelihood term.

    Returns:
        Unreduced loss (B,) and the implicit rewards ``beta * S``.
    """
    check_type("policy", policy, PairLogps)
    chosen, rejected = beta * wide(policy.chosen.total), beta * wide(policy.rejected.total)
    margin = chosen - rejected
    loss = expected(
        -F.logsigmoid(margin) - sft_weight * _mean(policy.chosen),
        -F.logsigmoid(-margin) - sft_weight * _mean(policy.rejected),
        preference,
    )
    return LossOutput.from_rewards(loss, chosen, rejected)


@pairwise_loss(
    "orpo",
    reference=False,
    default_beta=None,
    paper="arXiv:2403.07691",
    formula="-sft_weight S_w/n_w - odds_weight log sigma(logit P_w - logit P_l), P = exp(S/n)",
    purpose="fine-tuning and preference in one step: likelihood, and the odds of chosen against rejected",
    laws=Laws(
        fails={"prompt_shift": _LIKELIHOOD, "swap": _LIKELIHOOD},
        not_applicable={"reference_shift": _NO_REFERENCE, "small_beta": _NO_BETA, "large_beta": _NO_BETA},
    ),
)
def orpo(
    policy: PairLogps,
    preference: Tensor | None = None,
    *,
    odds_weight: NotNegative = 0.1,
    sft_weight: NotNegative = 1.0,
) -> LossOutput:
    """Odds-ratio preference optimisation (arXiv:2403.07691).

    ``loss = -sft_weight * S_w / n_w - odds_weight * log sigmoid(logit P_w - logit P_l)`` with ``P = exp(S / n)``, the
    geometric mean of the tokens' probabilities, and ``logit P = log P - log(1 - P)``.

    In the odds a mean log-prob is at most -1e-7 (float32; -1e-15 in float64), since a certain answer has no finite
    odds. The gradient there is that at the limit, not 0 (straight-through), so that a rejected answer which the policy
    is sure of is still pushed down.

    Args:
        policy: totals (nats, 0 at most) and lengths (tokens), each of shape (B,).
        preference: probability that the chosen answer is preferred, (B,); None: it is.
        odds_weight: the paper's lambda (TRL's beta): weight of the odds-ratio term.
        sft_weight: weight of the likelihood term, 1 in the paper.

    Returns:
        Unreduced loss (B,) and the log-odds as rewards.

    Raises:
        ValueError: a mean log-prob is over 0 by more than 1e-3 (a probability over 1).
    """
    check_type("policy", policy, PairLogps)
    check_log_probs("policy.chosen", policy.chosen)
    check_log_probs("policy.rejected", policy.rejected)
    chosen, rejected = _log_odds(policy.chosen), _log_odds(policy.rejected)
    margin = chosen - rejected
    loss = expected(
        -odds_weight * F.logsigmoid(margin) - sft_weight * _mean(policy.chosen),
        -odds_weight * F.logsigmoid(-margin) - sft_weight * _mean(policy.rejected),
        preference,
    )
    return LossOutput.from_rewards(loss, chosen, rejected)


@pairwise_loss(
    "sft",
    reference=False,
    default_beta=None,
    paper="arXiv:2404.19733",
    formula="-S_w/n_w",
    purpose="likelihood of the chosen answer; a term to combine with others, so that it does not fall",
    ranks=False,
    laws=Laws(
        fails={"prompt_shift": "it sees the chosen answer alone", "swap": "it sees the chosen answer alone"},
        not_applicable={"reference_shift": _NO_REFERENCE, "small_beta": _NO_BETA, "large_beta": _NO_BETA},
    ),
)
def sft(policy: PairLogps, preference: Tensor | None = None) -> LossOutput:
    """Negative mean log-prob per token of the chosen answer (the NLL term of arXiv:2404.19733).

    Args:
        policy: totals (nats) and lengths (tokens), each of shape (B,).
        preference: probability that the chosen answer is preferred, (B,); None: it is. Each answer is then learnt in
            proportion to the probability that it is the preferred one.

    Returns:
        Unreduced loss (B,), nats per token, and the mean log-probs as rewards; in a combination with a loss that
        ranks answers they are left out.
    """
    check_type("policy", policy, PairLogps)
    chosen, rejected = _mean(policy.chosen), _mean(policy.rejected)
    return LossOutput.from_rewards(expected(-chosen, -rejected, preference), chosen, rejected)


def _mean(answer: SequenceLogps) -> Tensor:
    """``S / n`` in float32 or better, (B,)."""
    return wide(answer.total) / answer.length


def _log_odds(answer: SequenceLogps) -> Tensor:
    """``log P - log(1 - P)`` of ``P = exp(S / n)``, (B,)."""
    mean = _mean(answer)
    return mean - log_not(mean)


def _squared(margin: Tensor, preference: Tensor | None, beta: float) -> Tensor:
    """``(margin - (p - 1/2) / beta)^2``; None: p is 1."""
    p = torch.ones_like(margin) if preference is None else probability(preference, margin)
    return (margin - (p - 0.5) / beta) ** 2
