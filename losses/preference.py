"""Losses that train reward and preference models: on the scores of a pair's answers, or on rated attributes.

Notation of the formulas: ``r`` is a reward model's score, ``w`` the chosen answer and ``l`` the rejected one, ``m``
the strength of a preference, ``sigma`` the logistic function. All losses are unreduced and compute in float32 or
better. Beside this file, and re-exported here: ``gpm`` (skew-symmetric scores of embeddings), ``pal`` (per-user
models).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalogue import reward_loss
from .checks import check_none_negative, check_shape, wide
from .general_preference import gpm, gpm_scale, gpm_score, unit_norm
from .laws import SCORES, SINGLE, Laws
from .pal import pal_cross_entropy, pal_delta, pal_hinge, pal_logistic, pal_logits, token_weighted
from .soft_labels import expected
from .types import LossOutput, check_bounded, check_type, first

__all__ = [
    "MASKED",
    "bradley_terry",
    "centering",
    "chosen_by_strength",
    "gpm",
    "gpm_scale",
    "gpm_score",
    "margin_bradley_terry",
    "pal_cross_entropy",
    "pal_delta",
    "pal_hinge",
    "pal_logistic",
    "pal_logits",
    "regression",
    "scaled_bradley_terry",
    "token_weighted",
    "unit_norm",
]

MASKED = -100
"""The label of an attribute that nobody rated."""


def chosen_by_strength(first_score: Tensor, second_score: Tensor, strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen and rejected scores from signed strengths (arXiv:2410.01257): negative where the first answer is better.

    A strength of 0 is a tie, which has no chosen answer: its row is left out, or Bradley-Terry would give it the full
    weight of a sure preference for one of the two.

    Args:
        first_score, second_score: scores of the two answers, (B,).
        strength: -3 (the first is much better) to 3 (the second is), (B,).

    Returns:
        Scores of the chosen and of the rejected answers, and ``|strength|``: (N,) each, N the rows that are no tie.

    Raises:
        ValueError: sizes that differ, a number that is not finite, or a strength outside [-3, 3].
    """
    first_score, second_score = _scores("first_score", first_score, "second_score", second_score)
    check_shape("strength", strength, first_score.shape, "one a pair")
    check_bounded("strength", strength)
    over = strength.abs() > 3
    if bool(over.any()):
        raise ValueError(f"strength{first(over)} is {float(strength[over][0])}: a strength is in [-3, 3]")
    kept = strength != 0
    first_score, second_score, strength = first_score[kept], second_score[kept], wide(strength)[kept]
    chosen = torch.where(strength < 0, first_score, second_score)
    rejected = torch.where(strength < 0, second_score, first_score)
    return chosen, rejected, strength.abs()


@reward_loss(
    "bradley_terry",
    reference=False,
    default_beta=None,
    paper="arXiv:2203.02155",
    formula="-log sigma(r_w - r_l)",
    purpose="the standard reward model: the difference of scores is the log-odds of the preference",
    laws=Laws(not_applicable=SCORES),
)
def bradley_terry(chosen: Tensor, rejected: Tensor, preference: Tensor | None = None) -> LossOutput:
    """Bradley-Terry (arXiv:2203.02155): ``loss = -log sigmoid(r_w - r_l)``.

    Args:
        chosen, rejected: scores of the two answers, (B,).
        preference: probability that the chosen answer is preferred, (B,); None: it is.

    Returns:
        Unreduced loss (B,), and the scores as rewards.

    Raises:
        ValueError: sizes that differ, a score that is not finite, or a preference outside [0, 1].
    """
    chosen, rejected = _scores("chosen", chosen, "rejected", rejected)
    delta = chosen - rejected
    loss = expected(-F.logsigmoid(delta), -F.logsigmoid(-delta), preference)
    return LossOutput.from_rewards(loss, chosen, rejected)


@reward_loss(
    "margin_bradley_terry",
    reference=False,
    default_beta=None,
    paper="arXiv:2307.09288",
    formula="-log sigma(r_w - r_l - m)",
    purpose="Bradley-Terry that asks for a wider gap where the preference is stronger",
    laws=Laws(not_applicable=SCORES),
)
def margin_bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor, preference: Tensor | None = None
) -> LossOutput:
    """Bradley-Terry with a margin (arXiv:2307.09288): ``loss = -log sigmoid(r_w - r_l - m)``.

    Its scores are no longer log-odds. Where a share e of the labels is wrong and a wrong one asks for the margin too,
    the best gap d solves ``(1 - e) sigmoid(m - d) = e sigmoid(m + d)``; it would be the log-odds plus m if a wrong
    label turned the margin with it.

    Args:
        chosen, rejected: scores of the two answers, (B,).
        margin: m, in the units of the score, not negative, detached here, (B,). A tie is not a pair of margin 0: leave
            it out, or give it the preference 1/2.
        preference: probability that the chosen answer is preferred, (B,); None: it is.

    Returns:
        Unreduced loss (B,), and the scores as rewards.

    Raises:
        ValueError: sizes that differ, a number that is not finite, a negative margin, or a preference outside [0, 1].
    """
    chosen, rejected = _scores("chosen", chosen, "rejected", rejected)
    m = _strength("margin", margin, chosen.shape)
    delta = chosen - rejected
    loss = expected(-F.logsigmoid(delta - m), -F.logsigmoid(-delta - m), preference)
    return LossOutput.from_rewards(loss, chosen, rejected)


@reward_loss(
    "scaled_bradley_terry",
    reference=False,
    default_beta=None,
    paper="arXiv:2410.01257",
    formula="-m log sigma(r_w - r_l)",
    purpose="Bradley-Terry that counts a pair m times for its strength; the scores stay log-odds",
    laws=Laws(not_applicable=SCORES),
)
def scaled_bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    strength: Tensor,
    preference: Tensor | None = None,
    *,
    normalize_weights: bool = False,
) -> LossOutput:
    """Scaled Bradley-Terry (arXiv:2410.01257): ``loss = -m log sigmoid(r_w - r_l)``, as if the pair came m times.

    Args:
        chosen, rejected: scores of the two answers, (B,).
        strength: m, not negative, detached here, (B,); 0 gives the pair no weight.
        preference: probability that the chosen answer is preferred, (B,); None: it is.
        normalize_weights: divide by the mean strength of this batch, so that strengths do not act as a greater
            learning rate. A batch in parts (accumulation, several processes) wants the mean of the whole: divide there
            instead.

    Returns:
        Unreduced loss (B,), and the scores as rewards.

    Raises:
        ValueError: sizes that differ, a number that is not finite, a negative strength, a preference outside [0, 1],
            or all strengths 0 when they are to be normalised.
    """
    chosen, rejected = _scores("chosen", chosen, "rejected", rejected)
    m = _strength("strength", strength, chosen.shape)
    if normalize_weights:
        if not bool((m > 0).any()):
            raise ValueError("strength is 0 in every row: there is no weight to normalise")
        m = m / m.max()  # or the mean of the tiniest would round to 0
        m = m / m.mean()
    delta = chosen - rejected
    loss = m * expected(-F.logsigmoid(delta), -F.logsigmoid(-delta), preference)
    return LossOutput.from_rewards(loss, chosen, rejected)


@reward_loss(
    "regression",
    reference=False,
    default_beta=None,
    paper="arXiv:2410.01257",
    formula="mean over rated attributes of (o_a - l_a)^2",
    purpose="reward models on ratings of attributes (helpfulness, correctness, ...), some of which may be missing",
    ranks=False,
    laws=Laws(
        fails={"prompt_shift": "ratings are absolute"},
        not_applicable={"swap": SINGLE, **SCORES},
    ),
)
def regression(predictions: Tensor, labels: Tensor) -> LossOutput:
    """Squared error on the attributes that were rated (arXiv:2410.01257; the heads of SteerLM).

    ``loss = sum_a k_a (o_a - l_a)^2 / sum_a k_a`` with ``k_a = 1[l_a != -100]``, row by row. The published batch mean
    weighs by attribute, not by row: ``(out.loss * n).sum() / n.sum()`` with ``n = out.metrics["attributes"]``.

    Args:
        predictions: one output for each attribute, in the units of the ratings, (B, A).
        labels: ratings, -100 where there is none, (B, A).

    Returns:
        Unreduced loss (B,), the predictions of the row's attributes in the place of rewards (B, A), and the number of
        rated attributes as the metric ``attributes`` (B,).

    Raises:
        ValueError: shapes that differ, a number that is not finite, or a row in which nothing was rated.
    """
    check_type("predictions", predictions, Tensor)
    if predictions.ndim != 2:
        raise ValueError(f"predictions has shape {tuple(predictions.shape)} and must have (B, A): one an attribute")
    check_shape("labels", labels, predictions.shape, "one an attribute")
    check_bounded("predictions", predictions)
    check_bounded("labels", labels)
    rated = labels != MASKED
    unrated = ~rated.any(1)
    if bool(unrated.any()):
        raise ValueError(f"labels{first(unrated)} is {MASKED} throughout: a row has at least one rated attribute")
    outputs = wide(predictions)
    squares = torch.where(rated, (outputs - wide(labels)) ** 2, 0.0)
    count = rated.sum(1).to(squares.dtype)
    return LossOutput(squares.sum(1) / count, outputs.detach(), {"attributes": count})


@reward_loss(
    "centering",
    reference=False,
    default_beta=None,
    paper="arXiv:2312.09244",
    formula="(r_w + r_l)^2",
    purpose="a term to combine with others: it pins the constant that pairs leave free, so that scores centre on 0",
    ranks=False,
    laws=Laws(
        fails={
            "prompt_shift": "to take that freedom away is its purpose",
            "swap": "a function of the sum, not of the margin",
        },
        not_applicable=SCORES,
    ),
)
def centering(chosen: Tensor, rejected: Tensor) -> LossOutput:
    """Centring of scores (arXiv:2312.09244): ``loss = (r_w + r_l)^2``; it is usual to weigh it 0.01.

    Args:
        chosen, rejected: scores of the two answers, (B,).

    Returns:
        Unreduced loss (B,), and the scores as rewards.

    Raises:
        ValueError: sizes that differ, or a score that is not finite.
    """
    chosen, rejected = _scores("chosen", chosen, "rejected", rejected)
    return LossOutput.from_rewards((chosen + rejected) ** 2, chosen, rejected)


def _scores(first_name: str, first_score: Tensor, second_name: str, second_score: Tensor) -> tuple[Tensor, Tensor]:
    check_type(first_name, first_score, Tensor)
    if first_score.ndim != 1:
        raise ValueError(f"{first_name} has shape {tuple(first_score.shape)} and must have (B,): one score an answer")
    check_shape(second_name, second_score, first_score.shape, "one score an answer")
    check_bounded(first_name, first_score)
    check_bounded(second_name, second_score)
    return wide(first_score), wide(second_score)


def _strength(name: str, values: Tensor, shape: torch.Size) -> Tensor:
    check_shape(name, values, shape, "one a pair")
    check_bounded(name, values)
    check_none_negative(name, values)
    return wide(values).detach()
