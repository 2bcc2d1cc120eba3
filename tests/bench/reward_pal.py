"""PAL models on a table of embeddings, for ``reward_study.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from reward_data import FEW, Arguments
from reward_heads import right_or_tie
from torch import Tensor

from align.rewards.pal import Pal, PalA, PalB
from align.trainers.pal import Judgements, train_pal

DEPTHS = ((0, 3e-5), (2, 2e-4))  # of the maps, with their learning rates


@dataclass(frozen=True)
class Table:
    """Embeddings of all answers and of their prompts, (M, H) each."""

    answers: Tensor
    prompts: Tensor

    def judgements(self, data: Arguments, rows: np.ndarray, users: Sequence[str]) -> Judgements:
        """Some rows of the judgements, by the names of who judged."""
        left, right, label = (torch.as_tensor(x[rows]) for x in (data.left, data.right, data.label))
        return Judgements(self.answers, self.prompts, left, right, label, list(users))


def fitted_pal(name: str, fitted: Judgements, valid: Judgements) -> tuple[Pal, float, float]:
    """``best_pal`` of a name such as "PAL-A, K = 2"."""
    kind, _, groups = name.partition(", K = ")
    made = {"PAL-A": PalA, "PAL-B": PalB}[kind]
    width, users = fitted.answers.shape[1], sorted(set(fitted.users))
    return best_pal(lambda depth: made(width, users, groups=int(groups), dimension=64, depth=depth), fitted, valid)


def deltas(model: Pal, data: Judgements, unknown: Any) -> Tensor:
    left, right, prompts = data.pairs()
    with torch.no_grad():
        weights = model.weights(data.users, unknown=unknown)
        return model.reward(right, weights, prompts) - model.reward(left, weights, prompts)


def best_pal(make: Callable[[int], Pal], fitted: Judgements, valid: Judgements) -> tuple[Pal, float, float]:
    """The depth and epoch that do best on validation, and how much the users' weights differ there."""
    known = set(fitted.users)
    names = [user if user in known else FEW for user in valid.users]
    valid = Judgements(valid.answers, valid.prompts, valid.left, valid.right, valid.label, names)
    best: dict[str, Any] = {"accuracy": -1.0}
    for depth, learning_rate in DEPTHS:
        torch.manual_seed(0)
        model = make(depth)
        here = {"accuracy": -1.0, "epoch": 0}

        def after_epoch(epoch: int, loss: float, model: Pal = model, here: dict[str, Any] = here) -> bool:
            with torch.no_grad():
                found = float(right_or_tie(deltas(model, valid, "mean"), valid.label.numpy()).mean())
            if found > here["accuracy"]:
                here.update(accuracy=found, epoch=epoch, state=copy.deepcopy(model.state_dict()), model=model)
            return epoch - int(here["epoch"]) >= 4

        train_pal(
            model, fitted, epochs=25, batch_size=512, projectors=learning_rate, users=5e-2, after_epoch=after_epoch
        )
        if here["accuracy"] > best["accuracy"]:
            best = here
    model = best["model"]
    model.load_state_dict(best["state"])
    with torch.no_grad():
        spread = float(torch.softmax(model.logits.weight, -1).std(0).mean()) if model.groups > 1 else 0.0
    return model, best["accuracy"], spread
