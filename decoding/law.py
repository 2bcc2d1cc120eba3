"""The law that tokens are drawn from: the model's own, or one that temperature, top-k and top-p make of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .lazy import Live


@dataclass(frozen=True)
class Law:
    """What ``temperature``, ``top_k`` and ``top_p`` make of the model's next-token law p: a law q.

    All weights are with respect to q unless ``target`` says otherwise: they correct for the constraint, and q is what
    is being conditioned. With ``target="model"`` every token's weight is multiplied by p/q, so that the model's own
    law is conditioned and q is no more than a proposal; what top-k and top-p cut off is then lost to the target, which
    is why a proposal by temperature alone is the sounder one.

    Args:
        temperature: logits are divided by it; positive.
        top_k: only the k most likely tokens, and those as likely as the last of them.
        top_p: of these only the fewest that hold this share of the mass, and those as likely as the last of them.
        target: the law that weights are with respect to.

    Raises:
        ValueError: a setting is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    target: Literal["law", "model"] = "law"

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature is {self.temperature}: it must be positive; top_k=1 takes the likeliest token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: it must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be over 0 and at most 1")
        if self.target not in ("law", "model"):
            raise ValueError(f"target is {self.target!r}: it must be 'law' or 'model'")

    def log_probs(self, logits: Tensor) -> NDArray[np.float64]:
        """``log q`` of every token, normalised, nats, float64, -inf where q is 0.

        Args:
            logits: (V,) or (N, V); -inf is a token that the model rules out.

        Raises:
            ValueError: a row holds NaN or +inf, or -inf alone.
        """
        wide = logits.detach().double()
        logps = (wide if self.temperature == 1 else wide / self.temperature).log_softmax(-1)
        _check(logits, logps)
        if self.top_k is not None and self.top_k < logps.shape[-1]:
            least = logps.topk(self.top_k, -1).values[..., -1:]
            logps = logps.masked_fill(logps < least, -math.inf).log_softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            logps = logps.masked_fill(logps < _least_of_nucleus(logps, self.top_p), -math.inf).log_softmax(-1)
        numbers: NDArray[np.float64] = logps.cpu().numpy()
        return numbers

    def rows(self, logits: Tensor) -> list[Live]:
        """The law q of every row, (N, V), ready to be drawn from: exponentials in float32, sums in float64.

        The same as ``log_probs`` to some 1e-6 of each probability, at a sixth of its price where q is all of p; but a
        token of probability under 1e-38 has none here. Under a temperature of 1/2, which makes many so small, and with
        top-k or top-p it is what ``log_probs`` says.

        Raises:
            ValueError: a row holds NaN or +inf, or -inf alone.
        """
        if self.top_k is not None or (self.top_p or 1) < 1 or self.temperature < 0.5:
            return [Live(row) for row in self.log_probs(logits)]
        scaled = logits.detach().float()
        p = (scaled if self.temperature == 1 else scaled / self.temperature).softmax(-1)
        return [Live.of(row) for row in p.cpu().numpy()]

    def log_correction(self, logits: Tensor, token: int) -> float:
        """What the log-weight of a token gains for the target: 0 for the law, ``log p - log q`` for the model.

        Args:
            logits: (V,).
            token: one that q can draw.
        """
        if self.target == "law" or self == Law(target="model"):
            return 0.0
        return float(logits.detach().double().log_softmax(-1)[token]) - float(self.log_probs(logits)[token])


def _check(logits: Tensor, logps: Tensor) -> None:
    """A row of log-probs is NaN throughout where its logits are unusable, and only there."""
    bad = torch.isnan(logps).any(-1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0]) if bad.ndim else None
        values = logits if row is None else logits[row]
        what = "-inf alone" if bool((values == -math.inf).all()) else "NaN or +inf"
        raise ValueError(f"logits{'' if row is None else f' of row {row}'} hold {what}: there is no law to draw from")


def _least_of_nucleus(logps: Tensor, top_p: float) -> Tensor:
    """Log-prob of the last token that is needed for a mass of ``top_p``, (…, 1); sorts no more than it must."""
    size, count = logps.shape[-1], 256
    while True:
        count = min(count, size)
        values = logps.topk(count, -1).values
        mass = values.exp().cumsum(-1)
        if count == size or bool((mass[..., -1] >= top_p).all()):
            # A token is needed if those before it hold less; the first always is.
            needed = (mass < top_p).sum(-1, keepdim=True).clamp(max=count - 1)
            return values.gather(-1, needed)
        count *= 8
