"""How much likelier a prompt is among the thumbs up than among the thumbs down.

BCO's underlying distribution matching (arXiv:2404.04656) weighs the answers with a thumb down by
``p(prompt | up) / p(prompt | down)``, so that a domain with many thumbs down is not taken for a fault of its answers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from align.losses.checks import check_finite, check_number, check_positive, check_shape, check_whole, wide
from align.losses.types import as_mask, check_type

FOLDS = 5
# Inverse strengths of the L2 penalty on standardised embeddings, from sklearn's default down.
INVERSE_PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_SCALARS = ("intercept", "accuracy", "held_out_accuracy", "minimum", "maximum")


@dataclass(frozen=True, eq=False)
class DensityRatio:
    """A fitted ``log p(x | up) / p(x | down) = x . coefficients + intercept`` of prompt embeddings ``x``.

    Args:
        coefficients: (D,), float64.
        intercept: the constant.
        accuracy: share of the prompts that it was fitted on which it tells right, mean over the two classes; 1/2 is
            chance. In many dimensions it is high on classes that do not differ.
        held_out_accuracy: the same on prompts that were left out of the fit.
        minimum, maximum: of the weights.

    Raises:
        ValueError: coefficients are not of shape (D,) or not finite, or not 0 < minimum <= maximum.
    """

    coefficients: Tensor
    intercept: float
    accuracy: float
    held_out_accuracy: float
    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        check_type("coefficients", self.coefficients, Tensor)
        if self.coefficients.ndim != 1:
            raise ValueError(f"coefficients have shape (D,), not {tuple(self.coefficients.shape)}")
        check_finite("coefficients", self.coefficients)
        check_finite("intercept", torch.tensor(self.intercept))
        _check_range(self.minimum, self.maximum)

    @classmethod
    def fit(
        cls,
        up: Tensor,
        down: Tensor,
        *,
        sample: int = 1024,
        seed: int = 0,
        minimum: float = 0.5,
        maximum: float = 10.0,
    ) -> DensityRatio:
        """Fit a logistic regression of up against down, in which both classes weigh the same.

        Embeddings are standardised (hidden states have a few huge dimensions), and the strength of the L2 penalty is
        the one with the highest likelihood of left-out prompts: at sklearn's default a thousand prompts of each class
        and some hundred dimensions give log-ratios that are several times too large. The same rows and seed give the
        same fit; with several processes, fit on one and hand the result on.

        Args:
            up, down: embeddings of the prompts with thumbs up, (N, D), and with thumbs down, (M, D).
            sample: at most that many prompts of each class, drawn without replacement.
            seed: of that draw and of what is left out.
            minimum, maximum: bounds of the weights.

        Raises:
            ValueError: a class with fewer than two rows (one to fit on, one to leave out), rows of different
                dimension, a value that is NaN or infinite, sample < 2, or not 0 < minimum <= maximum.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict

        _check_range(minimum, maximum)
        check_number("sample", sample)
        check_whole("sample", sample)
        if sample < 2:
            raise ValueError(f"sample is {sample}: a fit needs two prompts of each class or more")
        for name, rows in (("up", up), ("down", down)):
            check_type(name, rows, Tensor)
            if rows.ndim != 2 or len(rows) < 2:
                raise ValueError(
                    f"{name} has shape {tuple(rows.shape)}: embeddings are (N, D), of two prompts or more"
                )
            check_finite(name, rows)
        if up.shape[1] != down.shape[1]:
            raise ValueError(f"up has {up.shape[1]} dimensions and down {down.shape[1]}: one encoder makes both")
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            rows.detach().cpu().double()[torch.randperm(len(rows), generator=generator)[:sample]]
            for rows in (down, up)
        ]
        x = torch.cat(drawn)
        label = torch.arange(2).repeat_interleave(torch.tensor([len(rows) for rows in drawn]))
        centre, scale = x.mean(0), x.std(0)
        # A dimension that is constant but for rounding says nothing, and must not be blown up.
        scale = torch.where(scale > 1e-6 * centre.abs(), scale, torch.inf)
        x = (x - centre) / scale

        folds = StratifiedKFold(min(FOLDS, *(len(rows) for rows in drawn)), shuffle=True, random_state=seed)
        trials = []
        for inverse in INVERSE_PENALTIES:
            model = LogisticRegression(C=inverse, class_weight="balanced", max_iter=1000)
            logits = cross_val_predict(model, x.numpy(), label.numpy(), cv=folds, method="decision_function")
            held_out = torch.from_numpy(logits)
            trials.append(
                (_balanced(F.softplus(torch.where(label == 1, -held_out, held_out)), label), held_out, model)
            )
        _, held_out, model = min(trials, key=lambda trial: trial[0])
        model.fit(x.numpy(), label.numpy())
        slope = torch.from_numpy(model.coef_[0])
        fitted = x @ slope + float(model.intercept_[0])
        coefficients = slope / scale
        return cls(
            coefficients,
            float(model.intercept_[0]) - float(centre @ coefficients),
            accuracy=_balanced(((fitted > 0) == (label == 1)).double(), label),
            held_out_accuracy=_balanced(((held_out > 0) == (label == 1)).double(), label),
            minimum=minimum,
            maximum=maximum,
        )

    def log_ratio(self, embeddings: Tensor) -> Tensor:
        """``log p(x | up) / p(x | down)`` of each prompt, nats.

        Args:
            embeddings: (B, D).

        Returns:
            (B,), float32 or better, detached.

        Raises:
            ValueError: another shape than (B, D), or a value that is NaN or infinite.
        """
        check_type("embeddings", embeddings, Tensor)
        shape = (*embeddings.shape[:1], len(self.coefficients))
        check_shape("embeddings", embeddings, shape, "of the encoder that it was fitted on")
        check_finite("embeddings", embeddings)
        found = embeddings.detach().cpu().double() @ self.coefficients + self.intercept
        return found.to(wide(embeddings.new_empty(0)))

    def weights(self, embeddings: Tensor) -> Tensor:
        """``exp(log_ratio)`` between ``minimum`` and ``maximum``, (B,); raises as ``log_ratio`` does."""
        # Clamped before exp: odds p / (1 - p) would divide by 0 at p = 1.
        return self.log_ratio(embeddings).clamp(math.log(self.minimum), math.log(self.maximum)).exp()

    def save(self, path: str | Path) -> None:
        """Write it as one JSON file; every number comes back as it was."""
        found: dict[str, Any] = {name: getattr(self, name) for name in _SCALARS}
        Path(path).write_text(json.dumps({**found, "coefficients": self.coefficients.tolist()}), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> DensityRatio:
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            scalars = {name: float(found[name]) for name in _SCALARS}
            coefficients = torch.tensor(found["coefficients"], dtype=torch.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no density ratio: {error!r}") from error
        return cls(coefficients, **scalars)


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean hidden state of each row's tokens.

    Args:
        hidden: (B, T, D). What stands where the mask is false is never read, NaN included.
        mask: true on tokens, false on padding, (B, T).

    Returns:
        (B, D), summed in float32; float64 stays.

    Raises:
        ValueError: the shapes do not fit, the mask is neither true nor false somewhere, or a row has no token.
    """
    check_type("hidden", hidden, Tensor)
    if hidden.ndim != 3:
        raise ValueError(f"hidden has shape (B, T, D), not {tuple(hidden.shape)}")
    check_shape("mask", mask, hidden.shape[:2], "one a token")
    mask = as_mask("mask", mask)
    count = mask.sum(1)
    if bool((count == 0).any()):
        raise ValueError(f"mask[{int((count == 0).nonzero()[0])}] has no token: there is nothing to average")
    kept = torch.where(mask[..., None], hidden, hidden.new_zeros(()))
    return kept.sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32)) / count[:, None]


def _balanced(values: Tensor, label: Tensor) -> float:
    """Mean over the two classes of their means."""
    return float((values[label == 0].mean() + values[label == 1].mean()) / 2)


def _check_range(minimum: float, maximum: float) -> None:
    check_positive("minimum", minimum)
    check_positive("maximum", maximum)
    if minimum > maximum:
        raise ValueError(f"minimum is {minimum} and maximum {maximum}: weights lie between the two")
