"""Reference rewards ``r_ref`` of prompts: what an answer has to beat to be good (arXiv:2402.00742).

The reward of a canned answer needs nothing from here. The others are a quantile of the rewards of answers that the
starting policy gave to the prompt, and a regression on the prompt's embedding, which predicts such references for
prompts without samples and evens out the error of small samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.losses.checks import check_finite, check_shape, wide

_PENALTIES = np.logspace(-2, 6, 17)
_FEWEST_PROMPTS = 3


def quantile_reference(samples: Tensor | Sequence[Tensor], *, quantile: float = 0.85) -> Tensor:
    """Quantile of each prompt's sampled rewards, with linear interpolation, (P,).

    Its error is large with few samples: 16 to 64 are usual.

    Args:
        samples: rewards of k answers a prompt, (P, k), or one vector a prompt where their numbers differ.
        quantile: in (0, 1).

    Raises:
        ValueError: a quantile outside (0, 1), no prompt, a prompt without samples, or a reward that is not finite.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile is {quantile}: it is between 0 and 1, without the ends")
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


def sampled_reference(rewards: Sequence[float | None], quantile: float) -> float | None:
    """The reference of one prompt, in float64, from the rewards of answers to it.

    Answers without a reward, None, are left out. Where no answer has one, there is no reference, None.

    Raises:
        ValueError: one answer alone has a reward, which is no quantile.
    """
    there = [reward for reward in rewards if reward is not None]
    if len(there) == 1:
        raise ValueError(f"1 of {len(rewards)} sampled answers has a reward, and a quantile takes two: sample more")
    if not there:
        return None
    return float(quantile_reference(torch.tensor([there], dtype=torch.float64), quantile=quantile))


@dataclass(frozen=True)
class PromptReference:
    """A linear prediction of reference rewards from prompt embeddings.

    Attributes:
        coefficients: in reward units per unit of the embedding, (D,).
        intercept: in reward units.
        prompts: how many it was fitted to.
        explained: share of the references' variance that is predicted of prompts left out of the fit, one by one;
            0 or less is no better than their mean.
    """

    coefficients: tuple[float, ...]
    intercept: float
    prompts: int
    explained: float

    @classmethod
    def fit(cls, embeddings: Tensor, references: Tensor) -> PromptReference:
        """Fit to P prompts by ridge regression on standardised embeddings; the penalty is what predicts best of
        prompts left out one by one.

        Args:
            embeddings: of the prompts, (P, D).
            references: such as ``quantile_reference`` gives, (P,).

        Raises:
            ValueError: sizes that differ, fewer than three prompts, or a number that is not finite.
        """
        from sklearn.linear_model import RidgeCV

        if embeddings.ndim != 2:
            raise ValueError(f"embeddings has shape {tuple(embeddings.shape)} and must have (P, D)")
        check_shape("references", references, embeddings.shape[:1], "one a prompt")
        check_finite("embeddings", embeddings)
        check_finite("references", references)
        count = len(references)
        if count < _FEWEST_PROMPTS:
            raise ValueError(f"{count} prompts: a regression takes {_FEWEST_PROMPTS} or more")
        x, y = embeddings.detach().double().cpu().numpy(), references.detach().double().cpu().numpy()
        mean, scale = x.mean(0), x.std(0)
        scale[scale == 0] = 1.0
        model = RidgeCV(alphas=_PENALTIES).fit((x - mean) / scale, y)
        spread = y.var() * (count / (count - 1)) ** 2  # the mean's own error when each prompt is left out of it
        coefficients = model.coef_ / scale
        return cls(
            tuple(map(float, coefficients)),
            float(model.intercept_ - coefficients @ mean),
            count,
            1 + float(model.best_score_) / float(spread) if spread else 1.0,
        )

    def predict(self, embeddings: Tensor) -> Tensor:
        """Reference rewards, (B,), in float64, of prompts with embeddings (B, D).

        Raises:
            ValueError: another number of dimensions, or a number that is not finite.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.coefficients):
            raise ValueError(
                f"embeddings has shape {tuple(embeddings.shape)} and must have (B, {len(self.coefficients)})"
            )
        check_finite("embeddings", embeddings)
        x = embeddings.detach().double().cpu()
        return x @ torch.tensor(self.coefficients, dtype=torch.float64) + self.intercept
