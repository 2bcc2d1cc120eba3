"""The general preference model: answers as vectors, compared by a skew-symmetric form, so that cycles have a score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalogue import reward_loss
from .checks import Positive, check_none_negative, check_positive, check_shape, wide
from .laws import SCORES, Laws
from .soft_labels import expected
from .types import LossOutput, check_bounded, check_type


def unit_norm(embeddings: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Vectors of length 1: ``v / max(|v|, eps)`` along the last dimension, each on its own. A zero vector stays zero.

    Args:
        embeddings: shape (..., D).
        eps: least length that is divided by.

    Raises:
        ValueError: an element is NaN or infinite, or eps is not positive.
    """
    check_positive("eps", eps)
    check_bounded("embeddings", embeddings)
    return F.normalize(wide(embeddings), dim=-1, eps=eps)


def gpm_scale(logits: Tensor, *, temperature: float = 1.0, total: float = 1.0) -> Tensor:
    """Scales of the 2-D blocks from the prompt's gate: ``total * softmax(logits / temperature)``.

    Train and score with the same two settings. With ``total`` 1 scores of unit vectors shrink by about D/2 against no
    scale at all, and tau wants to shrink with them; ``total`` D/2 keeps their size.

    Args:
        logits: output of a linear head on the hidden state of the prompt's last token, (..., D/2).
        temperature: positive.
        total: sum of the scales, positive.

    Raises:
        ValueError: an element is NaN or infinite, or a setting is not positive.
    """
    check_positive("temperature", temperature)
    check_positive("total", total)
    check_bounded("logits", logits)
    return total * torch.softmax(wide(logits) / temperature, -1)


def gpm_score(first_embedding: Tensor, second_embedding: Tensor, scale: Tensor | None = None) -> Tensor:
    """By how much the first answer beats the second: ``s = sum_l scale_l (v_2l w_2l+1 - v_2l+1 w_2l)``.

    Antisymmetric, and 0 of an answer with itself; any antisymmetric table of K answers is the score of vectors of
    2K numbers. All pairs of K answers: ``gpm_score(v[:, :, None], v[:, None])`` of ``v`` (B, K, D).

    Args:
        first_embedding, second_embedding: one vector an answer, (..., D) with D even; leading dimensions broadcast.
        scale: scale of each block, not negative, (..., D/2); None: 1.

    Returns:
        Scores, of the leading dimensions' shape, in float32 or better.

    Raises:
        ValueError: D is odd or differs, leading dimensions that do not fit, an element is NaN or infinite, or a scale
            is negative.
    """
    first_embedding = _embedding("first_embedding", first_embedding)
    second_embedding = _embedding("second_embedding", second_embedding)
    width = first_embedding.shape[-1]
    if second_embedding.shape[-1] != width:
        raise ValueError(f"embeddings have {width} and {second_embedding.shape[-1]} numbers: both come from one head")
    shapes = [first_embedding.shape[:-1], second_embedding.shape[:-1]]
    if scale is not None:
        check_bounded("scale", scale)
        check_none_negative("scale", scale)
        if scale.ndim < 1 or scale.shape[-1] != width // 2:
            raise ValueError(
                f"scale has shape {tuple(scale.shape)} and must have (..., {width // 2}): one a block of two numbers"
            )
        shapes.append(scale.shape[:-1])
    try:
        torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    except RuntimeError:
        sizes = " and ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"embeddings and scale have leading dimensions {sizes}, which do not fit") from None
    even, odd = slice(0, None, 2), slice(1, None, 2)
    blocks = first_embedding[..., even] * second_embedding[..., odd]
    blocks = blocks - first_embedding[..., odd] * second_embedding[..., even]
    return (blocks if scale is None else wide(scale) * blocks).sum(-1)


@reward_loss(
    "gpm",
    reference=False,
    default_beta=None,
    paper="arXiv:2410.02197",
    formula="-log sigma(s(w, l)/tau)",
    purpose="preference models that may be cyclic: answers are vectors, compared by a skew-symmetric form",
    laws=Laws(not_applicable={"prompt_shift": "answers have vectors, not scores of their own", **SCORES}),
)
def gpm(
    chosen_embedding: Tensor,
    rejected_embedding: Tensor,
    scale: Tensor | None = None,
    preference: Tensor | None = None,
    *,
    tau: Positive = 0.1,
) -> LossOutput:
    """General preference model (arXiv:2410.02197): ``loss = -log sigmoid(s(w, l) / tau)`` with s of ``gpm_score``.

    Args:
        chosen_embedding, rejected_embedding: one vector an answer, (B, D) with D even; often of ``unit_norm``.
        scale: scale of each block, not negative, (B, D/2); None: 1. Multiplying all scales is dividing tau.
        preference: probability that the chosen answer is preferred, (B,); None: it is.
        tau: temperature, in units of the score.

    Returns:
        Unreduced loss (B,), and the rewards ``s / (2 tau)`` and ``-s / (2 tau)``, whose margin is the logit.

    Raises:
        ValueError: tau is not positive, D is odd, sizes that differ, a number that is not finite, a negative scale, or
            a preference outside [0, 1].
    """
    check_type("chosen_embedding", chosen_embedding, Tensor)
    if chosen_embedding.ndim != 2:
        raise ValueError(f"chosen_embedding has shape {tuple(chosen_embedding.shape)} and must have (B, D)")
    check_shape("rejected_embedding", rejected_embedding, chosen_embedding.shape, "one vector a pair")
    # gpm_score refuses the same, under the names that they have there.
    chosen_embedding = _embedding("chosen_embedding", chosen_embedding)
    rejected_embedding = _embedding("rejected_embedding", rejected_embedding)
    if scale is not None:
        rows, width = chosen_embedding.shape
        check_shape("scale", scale, (rows, width // 2), "one a block of two numbers")
    logit = gpm_score(chosen_embedding, rejected_embedding, scale) / tau
    loss = expected(-F.logsigmoid(logit), -F.logsigmoid(-logit), preference)
    return LossOutput.from_rewards(loss, logit / 2, -logit / 2)


def _embedding(name: str, embedding: Tensor) -> Tensor:
    check_type(name, embedding, Tensor)
    if embedding.ndim < 1 or embedding.shape[-1] < 2 or embedding.shape[-1] % 2:
        raise ValueError(
            f"{name} has shape {tuple(embedding.shape)} and must have (..., D) with D even: blocks of two numbers"
        )
    check_bounded(name, embedding)
    return wide(embedding)
