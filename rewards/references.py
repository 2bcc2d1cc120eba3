"""Reference rewards ``r_ref`` of prompts: what an answer has to beat to be good.

Three sources, each a column in the end: the reward of a canned answer (score it and keep the column), a quantile of
the rewards of answers that the starting policy gave to the prompt, and a regression that predicts such a quantile from
the prompt's embedding, for prompts without samples (arXiv:2402.00742).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from align.losses.checks import check_finite, wide

Method = Literal["ridge", "quantile"]


def quantile_reference(samples: Tensor | Sequence[Tensor], *, quantile: float = 0.85) -> Tensor:
    """Quantile of each prompt's sampled rewards, with linear interpolation, (P,).

    Its error is large with few samples: 16 to 64 are usual.

    Args:
        samples: rewards of k answers a prompt, (P, k), or one vector a prompt where their numbers differ.
        quantile: in (0, 1).

    Raises:
        ValueError: a quantile outside (0, 1), no prompt, a prompt without samples, or a reward that is not finite.
    """
    _check_quantile(quantile)
    rows = list(samples)
    if not rows:
        raise ValueError("samples has no prompt")
    for number, row in enumerate(rows):
        if row.ndim != 1 or not len(row):
            raise ValueError(f"samples[{number}] has shape {tuple(row.shape)}: rewards of one or more answers, (k,)")
        check_finite(f"samples[{number}]", row)
    few = [number for number, row in enumerate(rows) if len(row) < 2]
    if few:
        warnings.warn(
            f"{len(few)} of {len(rows)} prompts have one sampled answer, the first is {few[0]}: its reward is the "
            f"reference, which is no {quantile:g} quantile",
            stacklevel=2,
        )
    return torch.stack([wide(row.detach()).quantile(quantile) for row in rows])


@dataclass(frozen=True)
class PromptReference:
    """A linear prediction of reference rewards from prompt embeddings.

    Attributes:
        coefficients: in reward units per unit of the embedding, (D,).
        intercept: in reward units.
        quantile: what it predicts a quantile of.
        method: how it was fitted.
    """

    coefficients: tuple[float, ...]
    intercept: float
    quantile: float
    method: str

    @classmethod
    def fit(
        cls,
        embeddings: Tensor,
        samples: Tensor | Sequence[Tensor],
        *,
        quantile: float = 0.85,
        method: Method = "ridge",
        alpha: float = 1.0,
    ) -> PromptReference:
        """Fit to P prompts.

        Args:
            embeddings: of the prompts, (P, D).
            samples: rewards of the answers to each prompt, as in ``quantile_reference``.
            quantile: in (0, 1).
            method: ``ridge`` fits each prompt's own sample quantile by least squares; ``quantile`` fits all samples at
                once by the quantile (pinball) loss, which needs no more than one sample a prompt, but minutes where
                samples and dimensions are thousands.
            alpha: strength of the penalty, on squares (ridge) or on sizes (quantile), of coefficients of the
                embedding as it is.

        Raises:
            ValueError: sizes that differ, a number that is not finite, an unknown method, or a negative alpha.
        """
        from sklearn.linear_model import QuantileRegressor, Ridge

        _check_quantile(quantile)
        rows = list(samples)
        if embeddings.ndim != 2 or len(embeddings) != len(rows):
            raise ValueError(f"embeddings of shape {tuple(embeddings.shape)} for the samples of {len(rows)} prompts")
        check_finite("embeddings", embeddings)
        if not alpha >= 0:
            raise ValueError(f"alpha is {alpha}: it must not be negative")
        x = embeddings.detach().double().cpu().numpy()
        if method == "ridge":
            y = quantile_reference(rows, quantile=quantile).double().cpu().numpy()
            model = Ridge(alpha=alpha).fit(x, y)
        elif method == "quantile":
            for number, row in enumerate(rows):
                check_finite(f"samples[{number}]", row)
            y = torch.cat(rows).detach().double().cpu().numpy()
            x = np.repeat(x, [len(row) for row in rows], axis=0)
            model = QuantileRegressor(quantile=quantile, alpha=alpha, solver="highs").fit(x, y)
        else:
            raise ValueError(f"method is {method!r}: it is ridge or quantile")
        return cls(tuple(map(float, model.coef_)), float(model.intercept_), quantile, method)

    def predict(self, embeddings: Tensor) -> Tensor:
        """Reference rewards, (B,), float32 or better, of prompts with embeddings (B, D).

        Raises:
            ValueError: another number of dimensions, or a number that is not finite.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.coefficients):
            raise ValueError(
                f"embeddings has shape {tuple(embeddings.shape)} and must have (B, {len(self.coefficients)})"
            )
        check_finite("embeddings", embeddings)
        x = wide(embeddings.detach())
        return x @ torch.tensor(self.coefficients, dtype=x.dtype, device=x.device) + self.intercept

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(vars(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PromptReference:
        """Read what ``save`` wrote."""
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**found, "coefficients": tuple(found["coefficients"])})


def _check_quantile(quantile: float) -> None:
    if not 0 < quantile < 1:
        raise ValueError(f"quantile is {quantile}: it is between 0 and 1, without the ends")
