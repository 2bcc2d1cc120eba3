"""A loss on thumbs and what it takes beside the log-probs, for trainer and evaluation alike."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from align.losses import Loss, LossOutput, SequenceLogps
from align.losses.rows import Rows
from align.losses.types import UnpairedLogps

logger = logging.getLogger(__name__)


def thumbs_output(
    loss: Loss,
    policy: UnpairedLogps,
    reference: SequenceLogps | None,
    *,
    shift: Tensor | None = None,
    kl: Tensor | None = None,
    weight: Tensor | None = None,
) -> LossOutput:
    """A loss on thumbs with what of these its function takes.

    Raises:
        ValueError: what the loss takes is missing (``weight`` alone may be), or does not fit.
    """
    state = {"shift": shift, "kl": kl, "weight": weight}
    takes = inspect.signature(loss.info.function).parameters
    missing = [name for name in ("shift", "kl") if name in takes and state[name] is None]
    if missing:
        raise ValueError(f"{loss.info.name} takes {', '.join(missing)}, and none was given")
    models: Sequence[Any] = (policy, reference) if loss.info.reference is not False else (policy,)
    given = {name: value for name, value in state.items() if name in takes}
    return loss.info.function(*models, **given, **loss.settings)


def thumbs_rewards(loss: Loss, policy: UnpairedLogps, reference: SequenceLogps | None) -> Tensor:
    """The rewards of a loss on thumbs, (B,), detached; they see neither shift nor KL, which are 0 here."""
    zero = policy.sequence.total.new_zeros(())
    return thumbs_output(loss, policy, reference, shift=zero, kl=zero).rewards[:, 0]


def sequences(rows: Rows, token_logps: Tensor) -> SequenceLogps:
    """Log-probs of each answer of ``rows`` from those of its tokens."""
    return SequenceLogps(rows.totals(token_logps), rows.lengths())


def warn_of_unequal_thumbs(loss: Loss, labels: Sequence[bool]) -> None:
    """KTO's weights are to make up for unequal numbers of thumbs (arXiv:2402.01306)."""
    defaults = {name: parameter.default for name, parameter in loss.info.parameters.items()}
    if "desirable_weight" not in defaults:
        return
    weights = [{**defaults, **loss.settings}[f"{name}_weight"] for name in ("desirable", "undesirable")]
    up = sum(labels)
    ratio = weights[0] * up / (weights[1] * (len(labels) - up))
    if not 1 <= ratio <= 1.5:
        logger.warning(
            "%d thumbs up weigh %.3g times as much as %d thumbs down; between 1 and 1.5 is advised: multiply "
            "desirable_weight by %.3g",
            up,
            ratio,
            len(labels) - up,
            1 / ratio,
        )
