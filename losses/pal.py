"""PAL: users as mixtures of prototypes. The losses on what its models say of a left and a right answer.

``label`` is -1 where the left answer was preferred and +1 where the right one was. ``delta`` is the left answer's
distance from the user's ideal point less the right one's, so that ``delta > 0`` speaks for the right one.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalogue import reward_loss
from .checks import NotNegative, check_positive, check_shape, wide
from .laws import SCORES, Laws
from .types import LARGEST_DERIVED, LossOutput, as_mask, check_bounded, check_type, first

Weighting = Literal["mean", "cumulative", "last"]


def pal_delta(left: Tensor, right: Tensor, ideal: Tensor, *, squared: bool = False) -> Tensor:
    """Difference of distances ``|left - ideal| - |right - ideal|``; positive where the right answer is nearer.

    Args:
        left, right, ideal: projected answers and the user's ideal point, each (..., D).
        squared: distances squared; then delta is linear in the ideal point.

    Returns:
        Shape (...), in float32 or better. The gradient of a distance of 0 is 0.

    Raises:
        ValueError: shapes that differ, or a number that is not finite.
    """
    check_type("left", left, Tensor)
    check_shape("right", right, left.shape, "as left")
    check_shape("ideal", ideal, left.shape, "as left")
    for name, values in (("left", left), ("right", right), ("ideal", ideal)):
        check_bounded(name, values)
    a = wide(ideal)
    if squared:
        return ((wide(left) - a) ** 2).sum(-1) - ((wide(right) - a) ** 2).sum(-1)
    to_left: Tensor = torch.linalg.vector_norm(wide(left) - a, dim=-1)
    to_right: Tensor = torch.linalg.vector_norm(wide(right) - a, dim=-1)
    return to_left - to_right


def pal_logits(left: Tensor, right: Tensor, user: Tensor, *, scale: float | Tensor, eps: float = 1e-8) -> Tensor:
    """Logits ``min(scale, 100) * cos(answer, user)`` of the left and the right answer, for ``pal_cross_entropy``.

    Args:
        left, right, user: projected answers and the user's vector on this prompt, each (..., D).
        scale: inverse temperature, positive; ``exp`` of a learnt number is usual, 1/0.07 its start.
        eps: least length that is divided by.

    Returns:
        Shape (..., 2), left first, in float32 or better.

    Raises:
        ValueError: shapes that differ, a number that is not finite, or a scale or eps that is not positive.
    """
    check_type("left", left, Tensor)
    check_shape("right", right, left.shape, "as left")
    check_shape("user", user, left.shape, "as left")
    for name, values in (("left", left), ("right", right), ("user", user)):
        check_bounded(name, values)
    if isinstance(scale, Tensor):
        check_shape("scale", scale, (), "one for all")
    check_positive("scale", float(scale.detach()) if isinstance(scale, Tensor) else scale)
    check_positive("eps", eps)
    user = F.normalize(wide(user), dim=-1, eps=eps)
    cosines = [(F.normalize(wide(x), dim=-1, eps=eps) * user).sum(-1) for x in (left, right)]
    most = scale.clamp(max=100.0) if isinstance(scale, Tensor) else min(scale, 100.0)
    return most * torch.stack(cosines, dim=-1)


@reward_loss(
    "pal_hinge",
    reference=False,
    default_beta=None,
    paper="arXiv:2406.08469",
    formula="max(0, 1 - y delta)",
    purpose="per-user preference models by distance from an ideal point; pairs beyond the margin stop pushing",
    laws=Laws(not_applicable={"prompt_shift": "delta is a difference already", **SCORES}),
)
def pal_hinge(delta: Tensor, label: Tensor, *, smoothing: NotNegative = 0.0) -> LossOutput:
    """Hinge on the difference of distances (arXiv:2406.08469).

    ``loss = max(0, 1 - y delta)``. With ``smoothing`` g it is ``(1 - y delta)^2 / (2 g)`` for ``y delta`` in
    [1 - g, 1] and ``1 - y delta - g/2`` under that: no kink.

    Args:
        delta: distance of the left answer less that of the right one, (B,).
        label: -1 where the left answer was preferred, +1 where the right one was, (B,).
        smoothing: width of the quadratic piece, in units of delta; 0 is the hinge.

    Returns:
        Unreduced loss (B,), and the rewards ``y delta / 2`` and ``-y delta / 2``, the preferred answer first.

    Raises:
        ValueError: a label other than -1 and +1, sizes that differ, a number that is not finite, or smoothing < 0.
    """
    if smoothing > 0:
        check_positive("smoothing", smoothing)
    margin = _margin(delta, label)
    short = F.relu(1 - margin)
    # min(short, g) short - min^2 / 2 is short^2 / 2 up to g, and g short - g^2 / 2 beyond it.
    inner = short.clamp(max=smoothing)
    loss = (inner * short - inner**2 / 2) / smoothing if smoothing > 0 else short
    return LossOutput.from_rewards(loss, margin / 2, -margin / 2)


@reward_loss(
    "pal_logistic",
    reference=False,
    default_beta=None,
    paper="arXiv:2406.08469",
    formula="log(1 + exp(-y delta))",
    purpose="per-user preference models by distance from an ideal point; delta is the log-odds of the right answer",
    laws=Laws(not_applicable={"prompt_shift": "delta is a difference already", **SCORES}),
)
def pal_logistic(delta: Tensor, label: Tensor) -> LossOutput:
    """Logistic loss on the difference of distances (arXiv:2406.08469): ``loss = softplus(-y delta)``.

    Args:
        delta: distance of the left answer less that of the right one, (B,).
        label: -1 where the left answer was preferred, +1 where the right one was, (B,).

    Returns:
        Unreduced loss (B,), and the rewards ``y delta / 2`` and ``-y delta / 2``, the preferred answer first.

    Raises:
        ValueError: a label other than -1 and +1, sizes that differ, or a number that is not finite.
    """
    margin = _margin(delta, label)
    return LossOutput.from_rewards(F.softplus(-margin), margin / 2, -margin / 2)


@reward_loss(
    "pal_cross_entropy",
    reference=False,
    default_beta=None,
    paper="arXiv:2406.08469",
    formula="-log softmax(logits)_y",
    purpose="per-user preference models by the angle between answer and user vector",
    laws=Laws(not_applicable=SCORES),
)
def pal_cross_entropy(logits: Tensor, label: Tensor) -> LossOutput:
    """Cross-entropy over the two answers' logits (arXiv:2406.08469), such as those of ``pal_logits``.

    Args:
        logits: the left and the right answer's, (B, 2); the greater is the better.
        label: -1 where the left answer was preferred, +1 where the right one was, (B,).

    Returns:
        Unreduced loss (B,), and the logits as rewards, the preferred answer first.

    Raises:
        ValueError: a label other than -1 and +1, sizes that differ, or a number that is not finite.
    """
    check_type("logits", logits, Tensor)
    if logits.ndim != 2 or logits.shape[1] != 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)} and must have (B, 2): left and right")
    check_bounded("logits", logits)
    right = _labels(label, logits.shape[:1]) > 0
    left_logit, right_logit = wide(logits).unbind(1)
    preferred, other = (
        torch.where(right, right_logit, left_logit),
        torch.where(right, left_logit, right_logit),
    )
    return LossOutput.from_rewards(F.softplus(other - preferred), preferred, other)


def token_weighted(losses: Tensor, mask: Tensor, weighting: Weighting = "cumulative") -> Tensor:
    """One loss a row from losses at every token position from the pair's divergence on (arXiv:2406.08469).

    Args:
        losses: loss at each position, (B, T). What stands where the mask is false is never read, NaN included.
        mask: true from the first token in which the pair differs to its last real one, (B, T).
        weighting: ``mean``; ``cumulative``, in which the j-th of n true positions weighs ``j / (n (n + 1) / 2)``; or
            ``last``, the last true position alone.

    Returns:
        Shape (B,), in float32 or better.

    Raises:
        ValueError: shapes that differ, a row without a true position, a loss that is not finite, or no such weighting.
    """
    check_type("losses", losses, Tensor)
    if losses.ndim != 2:
        raise ValueError(f"losses has shape {tuple(losses.shape)} and must have (B, T)")
    check_shape("mask", mask, losses.shape, "one a position")
    mask = as_mask("mask", mask)
    empty = ~mask.any(1)
    if bool(empty.any()):
        raise ValueError(f"mask{first(empty)} has no true position: a row has at least one")
    losses = torch.where(mask, wide(losses), 0.0)
    check_bounded("losses", losses, LARGEST_DERIVED)
    place = mask.cumsum(1).to(losses.dtype)
    count = place[:, -1:]
    weights = {
        "mean": 1 / count,
        "cumulative": place / (count * (count + 1) / 2),
        "last": (place == count) & mask,
    }
    if not isinstance(weighting, str) or weighting not in weights:
        raise ValueError(f"weighting is {weighting!r}: it is one of {', '.join(weights)}")
    return (weights[weighting] * losses).sum(1)


def _labels(label: Tensor, shape: torch.Size) -> Tensor:
    check_shape("label", label, shape, "one a pair")
    bad = (label != 1) & (label != -1) if label.dtype != torch.bool else torch.ones_like(label)
    if bool(bad.any()):
        raise ValueError(f"label{first(bad)} is {label[bad][0].item()}: -1 is the left answer and +1 the right one")
    return label


def _margin(delta: Tensor, label: Tensor) -> Tensor:
    """``y delta``: positive where the pair is ranked right."""
    check_type("delta", delta, Tensor)
    if delta.ndim != 1:
        raise ValueError(f"delta has shape {tuple(delta.shape)} and must have (B,): one a pair")
    check_bounded("delta", delta, LARGEST_DERIVED)
    return _labels(label, delta.shape) * wide(delta)
