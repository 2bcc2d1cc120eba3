"""Objectives on answers that the policy itself gave: regression to a game's improved policy, and policy gradients.

Notation of the formulas: ``S`` is a sum of token log-probs under the policy (nats), ``R`` the same under the reference
and ``P`` under the previous iterate; ``r = S - R`` and ``h = S - P`` are log-ratios; ``p`` is the probability that an
answer is preferred to its opponent, ``s`` a score. Gradients flow through ``S`` alone: neither through sampling, nor
preferences, scores, ``R`` or ``P``.

Online IPO, DPO and SLiC are the losses of ``align.losses.pairwise`` on pairs from ``all_pairs``: with ``preference``
set to the probabilities of ``all_pair_values`` (soft labels), or to labels drawn from them (``draw_labels``). IPO-MD
is online IPO on answers of the mixture of ``mixture_logps``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .catalogue import selfplay_loss
from .checks import Positive, check_number, check_probability, check_reference, check_shape, log_ratio, wide
from .groups import all_pair_values, all_pairs, mean_scores, pairs_of
from .laws import SINGLE, SUMS, Laws
from .mirror_descent import mdpo
from .types import LossOutput, SequenceLogps, check_bounded, check_type, first

__all__ = [
    "all_pair_values",
    "all_pairs",
    "argmax_labels",
    "draw_labels",
    "gpo",
    "gpo_pointwise",
    "mdpo",
    "mean_scores",
    "mixture_logps",
    "nash_md_pg",
    "sppo",
    "sppo_pointwise",
]


def draw_labels(preference: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Hard labels: 1 with probability ``preference``, else 0.

    For IPO they leave the expected gradient that of the soft labels and add variance (the losses differ by
    ``p (1 - p) / beta^2``, whatever the policy).

    Args:
        preference: probability that the first answer is preferred, any shape.
        generator: where the draws come from.

    Raises:
        ValueError: a probability outside [0, 1].
    """
    check_probability("preference", preference)
    return torch.bernoulli(wide(preference), generator=generator)


def argmax_labels(preference: Tensor) -> Tensor:
    """Hard labels: 1 where ``preference`` is over 1/2, 0 where it is under, 1/2 at a tie.

    They change the game: what is then learnt is the equilibrium of ``1[p > 1/2]``, in which an answer that wins 51
    times of 100 always wins. ``draw_labels`` keeps the game.

    Args:
        preference: probability that the first answer is preferred, any shape.

    Raises:
        ValueError: a probability outside [0, 1].
    """
    check_probability("preference", preference)
    return (1 + torch.sign(wide(preference) - 0.5)) / 2


def mixture_logps(policy: Tensor, reference: Tensor, *, coefficient: float) -> Tensor:
    """Next-token log-probs of the geometric mixture ``pi^(1 - c) mu^c / Z`` (arXiv:2312.00886; IPO-MD's too).

    Sampled one token at a time, which is not the geometric mixture of whole sequences: each step has its own Z. A
    token that either model rules out (-inf) is ruled out, except by a model whose weight is 0.

    Args:
        policy, reference: logits or log-probs of the next token, the vocabulary last, (..., V).
        coefficient: weight c of the reference, in [0, 1]; 0 is the policy itself and 1 the reference.

    Returns:
        Normalised log-probs, nats, (..., V), in float32 or better.

    Raises:
        ValueError: coefficient outside [0, 1], the shapes differ, a logit is NaN or +inf, or no token is left.
    """
    check_number("coefficient", coefficient)
    if not 0 <= coefficient <= 1:
        raise ValueError(f"coefficient is {coefficient}: it must be in [0, 1]")
    check_type("policy", policy, Tensor)
    check_reference("reference", reference, Tensor)
    if policy.shape != reference.shape:
        raise ValueError(
            f"policy and reference have shape {tuple(policy.shape)} and {tuple(reference.shape)}: both give a "
            "probability to every token of one vocabulary"
        )
    for name, logits in (("policy", policy), ("reference", reference)):
        bad = torch.isnan(logits) | (logits == torch.inf)
        if bool(bad.any()):
            raise ValueError(f"{name}{first(bad)} is {float(logits[bad][0])}: a logit is finite or -inf")
    # 0 * -inf is NaN, so that the ends are taken apart.
    if coefficient == 0:
        mixed = wide(policy)
    elif coefficient == 1:
        mixed = wide(reference)
    else:
        mixed = (1 - coefficient) * wide(policy) + coefficient * wide(reference)
    empty = (mixed == -torch.inf).all(-1)
    if bool(empty.any()):
        raise ValueError(f"policy and reference{first(empty)} leave no token that both allow")
    return torch.log_softmax(mixed, -1)


# --- losses ----------------------------------------------------------------------------------------------------------

_SCORED = {"swap": "the target is the scores, which move with their answers; no answer is the chosen one"}
_DIFFERENCES = Laws(
    fails={
        "small_beta": "the target margin (s_i - s_j)/beta grows as beta falls",
        "large_beta": "the target becomes h_i = h_j",
        "duplication": SUMS,
    },
    not_applicable=_SCORED,
)
_POINTWISE = Laws(
    fails={
        "prompt_shift": "the partition constant is dropped, so that each log-ratio has a target of its own",
        "small_beta": "the target s_i/beta grows as beta falls",
        "large_beta": "the target becomes h_i = 0",
        "duplication": SUMS,
    },
    not_applicable=_SCORED,
)


@selfplay_loss(
    "nash_md_pg",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2312.00886",
    formula="-[p - 1/2 - beta r] S, the bracket detached",
    purpose="policy gradient to the equilibrium of the preference game, against answers drawn from a mixture",
    laws=Laws(
        fails={
            "reference_shift": "the value -coefficient * S moves with S; its gradient does not",
            "prompt_shift": "the coefficient holds the log-ratio itself",
            "small_beta": "the gradient becomes that of the preference alone",
            "duplication": SUMS,
            "gradient": "a surrogate: the coefficient is detached",
        },
        not_applicable={"swap": SINGLE, "large_beta": SINGLE},
    ),
)
def nash_md_pg(policy: SequenceLogps, reference: SequenceLogps, preference: Tensor, *, beta: Positive) -> LossOutput:
    """Nash-MD policy gradient (arXiv:2312.00886).

    ``loss = -(p - 1/2 - beta * r).detach() * S`` for an answer y that the policy gave and an opponent y' drawn from
    the mixture of ``mixture_logps``. Only its gradient means something: in expectation it descends
    ``-[P(pi > pi_beta) - beta KL(pi || mu)]``. The log-ratio is the whole answer's; a coefficient per token drops what
    the later tokens say of the earlier ones, and is biased.

    Args:
        policy, reference: totals (nats) and lengths (tokens) of the answers y, each of shape (B,).
        preference: probability that y is preferred to its opponent, (B,).
        beta: the paper's tau: strength of the pull to the reference, in preference per nat.

    Returns:
        Unreduced surrogate (B,), and as reward the coefficient ``p - 1/2 - beta * r``, (B, 1).

    Raises:
        ValueError: beta is not positive, a preference outside [0, 1], or sizes that differ.
    """
    ratio = log_ratio(policy, reference)
    if ratio.ndim != 1:
        raise ValueError(f"policy has shape {tuple(ratio.shape)} and must have (B,): one answer a row")
    check_shape("preference", preference, ratio.shape, "one an answer")
    check_probability("preference", preference)
    coefficient = (wide(preference) - 0.5 - beta * ratio).detach()
    return LossOutput(-coefficient * wide(policy.total), coefficient[:, None])


@selfplay_loss(
    "gpo",
    reference=True,
    default_beta=1e-3,
    paper="arXiv:2410.02197",
    formula="mean over pairs of [h_i - h_j - (s_i - s_j)/beta]^2",
    purpose="one step of the game with unbounded scores, by regression of differences between answers; exact",
    laws=_DIFFERENCES,
)
def gpo(policy: SequenceLogps, previous: SequenceLogps, scores: Tensor, *, beta: Positive) -> LossOutput:
    """General preference optimisation on differences of answers (arXiv:2410.02197, in a form without its constant).

    ``loss = mean over i < j of [h_i - h_j - (s_i - s_j) / beta]^2``. The partition constant of the step's closed form
    ``pi_t exp(s / beta) / Z`` cancels in differences, so that this form reaches it; ``gpo_pointwise`` does not.

    Scores that are estimated from the K answers themselves are means over all K, with the 0 of each against itself
    (``mean_scores(..., include_self=True)``): means over the others alone would have ``s_ij`` in the scores of both i
    and j, and the step would be that of ``beta (K - 1) / K``.

    Args:
        policy, previous: totals (nats) and lengths (tokens) of K answers to each of B prompts, drawn from the previous
            iterate, (B, K).
        scores: mean score of each answer against that iterate, (B, K).
        beta: strength of the pull to the previous iterate, in score per nat.

    Returns:
        Unreduced loss (B,), in nats squared, and the rewards ``beta * h`` (B, K), whose differences aim at those of
        the scores.

    Raises:
        ValueError: beta is not positive, K < 2, a score that is not finite, or sizes that differ.
    """
    ratio, scores = _regressands(policy, previous, scores, beta)
    i, j = pairs_of("policy", ratio)
    miss = ratio - scores / beta
    # Divided before it is summed: a square of 4e36 fits in float32, and the sum of a hundred does not.
    loss = ((miss[:, i] - miss[:, j]) ** 2 / len(i)).sum(-1)
    return LossOutput(loss, (beta * ratio).detach())


@selfplay_loss(
    "gpo_pointwise",
    reference=True,
    default_beta=1e-3,
    paper="arXiv:2410.02197",
    formula="(h_i - s_i/beta)^2",
    purpose="GPO as published, with the constant of the closed form dropped; biased for that",
    laws=_POINTWISE,
)
def gpo_pointwise(policy: SequenceLogps, previous: SequenceLogps, scores: Tensor, *, beta: Positive) -> LossOutput:
    """General preference optimisation as published (arXiv:2410.02197): the paper's dropped-constant form.

    ``loss_i = [h_i - s_i / beta]^2``. The closed form has ``h_i = s_i / beta - log Z``; a normalised policy cannot do
    without ``log Z``, so that this form ends beside it. ``gpo`` has no such bias.

    Args:
        policy, previous: totals (nats) and lengths (tokens) of K answers to each of B prompts, (B, K).
        scores: mean score of each answer against the previous iterate (``mean_scores``), (B, K).
        beta: strength of the pull to the previous iterate, in score per nat.

    Returns:
        Unreduced loss (B, K), in nats squared, and the rewards ``beta * h`` (B, K), which aim at the scores.

    Raises:
        ValueError: beta is not positive, a score that is not finite, or sizes that differ.
    """
    ratio, scores = _regressands(policy, previous, scores, beta)
    return LossOutput((ratio - scores / beta) ** 2, (beta * ratio).detach())


@selfplay_loss(
    "sppo",
    reference=True,
    default_beta=1e-3,
    paper="arXiv:2405.00675",
    formula="mean over pairs of [h_i - h_j - (P_i - P_j)/beta]^2",
    purpose="one step of the game with win rates, by regression of differences between answers; exact",
    laws=_DIFFERENCES,
)
def sppo(policy: SequenceLogps, previous: SequenceLogps, win_rates: Tensor, *, beta: Positive) -> LossOutput:
    """Self-play preference optimisation on differences of answers (arXiv:2405.00675, in a form without its constant).

    ``gpo`` with the bounded score ``P - 1/2``. Near 1/2, ``P - 1/2`` is a quarter of the score ``logit P``, so that
    GPO at 4 times this beta is the like step. With win rates of the K answers against all K of them, 1/2 against
    itself, its gradient is that of IPO with soft labels on their pairs, at the same beta.

    Args:
        policy, previous: totals (nats) and lengths (tokens) of K answers to each of B prompts, (B, K).
        win_rates: mean probability with which each answer beats the previous iterate's, (B, K).
        beta: the reciprocal of the paper's eta, in win rate per nat.

    Returns:
        Unreduced loss (B,), in nats squared, and the rewards ``beta * h`` (B, K).

    Raises:
        ValueError: beta is not positive, K < 2, a win rate outside [0, 1], or sizes that differ.
    """
    return gpo(policy, previous, _centred(policy, win_rates), beta=beta)


@selfplay_loss(
    "sppo_pointwise",
    reference=True,
    default_beta=1e-3,
    paper="arXiv:2405.00675",
    formula="[h_i - (P_i - 1/2)/beta]^2",
    purpose="SPPO as published, with the constant of the closed form set to 1/2; biased for that",
    laws=_POINTWISE,
)
def sppo_pointwise(policy: SequenceLogps, previous: SequenceLogps, win_rates: Tensor, *, beta: Positive) -> LossOutput:
    """Self-play preference optimisation as published (arXiv:2405.00675): the paper's dropped-constant form.

    ``loss_i = [h_i - (P_i - 1/2) / beta]^2``: ``gpo_pointwise`` with the score ``P - 1/2``, and with its bias.

    Args:
        policy, previous: totals (nats) and lengths (tokens) of K answers to each of B prompts, (B, K).
        win_rates: mean probability with which each answer beats the previous iterate's, (B, K).
        beta: the reciprocal of the paper's eta, in win rate per nat.

    Returns:
        Unreduced loss (B, K), in nats squared, and the rewards ``beta * h`` (B, K).

    Raises:
        ValueError: beta is not positive, a win rate outside [0, 1], or sizes that differ.
    """
    return gpo_pointwise(policy, previous, _centred(policy, win_rates), beta=beta)


def _regressands(policy: SequenceLogps, previous: SequenceLogps, scores: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Log-ratios and scores of (B, K), checked; no gradient through the previous iterate, which may be the policy."""
    check_reference("previous", previous, SequenceLogps)
    ratio = log_ratio(policy, SequenceLogps(previous.total.detach(), previous.length), theirs="previous")
    if ratio.ndim != 2:
        raise ValueError(f"policy has shape {tuple(ratio.shape)} and must have (B, K): K answers to each prompt")
    check_shape("scores", scores, ratio.shape, "one an answer")
    check_bounded("scores", scores)
    return ratio, wide(scores).detach()


def _centred(policy: SequenceLogps, win_rates: Tensor) -> Tensor:
    check_type("policy", policy, SequenceLogps)
    check_shape("win_rates", win_rates, policy.total.shape, "one an answer")
    check_probability("win_rates", win_rates)
    return wide(win_rates) - 0.5
