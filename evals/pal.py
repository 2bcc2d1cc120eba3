"""PAL suite: does a model with a reward an annotator beat one reward for all, for annotators it knows and new ones?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .result import suite_result
from .statistics import Estimate, bootstrap_interval, finite_vector, share_interval


@dataclass(frozen=True)
class Margins:
    """What several models say of the same N judgements.

    Args:
        by_model: the preferred answer's reward less the other one's, (N,), by the name of the model.
        annotators: who judged, N names.
    """

    by_model: Mapping[str, Tensor]
    annotators: Sequence[str]

    def right(self, name: str) -> NDArray[np.float64]:
        """1 where a model ranks the pair as its annotator did, 1/2 where it cannot tell, else 0, (N,).

        Raises:
            ValueError: another count than that of annotators, or a margin that is not finite.
        """
        values = finite_vector(self.by_model[name].detach().double().cpu().numpy(), name)
        if len(values) != len(self.annotators):
            raise ValueError(f"{name}: {len(values)} margins and {len(self.annotators)} annotators")
        return np.where(values == 0, 0.5, values > 0)


def pal_suite(
    parts: Mapping[str, Margins],
    *,
    against: Sequence[str],
    start: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Accuracy of each model on each part of the held-out judgements, and its gain over those it is compared with.

    Args:
        parts: the judgements by the kind of annotator, such as ``seen`` and ``unseen``; empty parts are left out.
        against: names of the models that the others are compared with, in every part.
        start: the model that the others begin from, compared with where it is there: what they gained since.
        settings: what made the models, kept in the result.

    Returns:
        Metrics ``PART/accuracy/MODEL`` (share of judgements), ``PART/macro/MODEL`` (mean over annotators of their own
        shares) and ``PART/gain/MODEL/OTHER`` (difference of shares on the same judgements). Annotators are resampled
        whole, and n counts them. Rows: one an annotator and part, with n and each model's accuracy.

    Raises:
        ValueError: no judgements at all, or margins that do not fit.
    """
    metrics: dict[str, Estimate] = {}
    rows: list[dict[str, Any]] = []
    for part, margins in parts.items():
        who = margins.annotators
        if not len(who):
            continue
        right = {name: margins.right(name) for name in margins.by_model}
        names = sorted(set(who))
        of = {name: np.flatnonzero([user == name for user in who]) for name in names}
        shares = {model: [float(values[of[name]].mean()) for name in names] for model, values in right.items()}
        for model, values in right.items():
            metrics[f"{part}/accuracy/{model}"] = share_interval(values, groups=who)
            metrics[f"{part}/macro/{model}"] = share_interval(shares[model])
        for model, values in right.items():
            for other in (*against, *([start] if start in right else [])):
                if model not in (*against, other):
                    metrics[f"{part}/gain/{model}/{other}"] = bootstrap_interval(values - right[other], groups=who)
        rows += [
            {
                "annotator": name,
                "part": part,
                "n": len(of[name]),
                **{model: shares[model][place] for model in right},
            }
            for place, name in enumerate(names)
        ]
    if not rows:
        raise ValueError("no held-out judgements: there is nothing to compare on")
    return suite_result("pal", metrics, rows, settings)
