"""Training of PAL models on embeddings that a frozen backbone made once.

The backbone is not trained here: its states come from ``align.models.embeddings``, a step costs milliseconds, and all
of training seconds to minutes on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from align.rewards.pal import Pal

PENALTY = 1e-2


@dataclass(frozen=True)
class Judgements:
    """Who preferred which of two answers; answers and prompts are rows of a table of embeddings.

    Args:
        answers: the embeddings, (M, H).
        prompts: of the same answers' prompts, (M, H).
        left, right: rows of the two answers of each judgement, (N,).
        label: -1 where the left answer was preferred, +1 where the right one was, (N,).
        users: who judged, N names.
    """

    answers: Tensor
    prompts: Tensor
    left: Tensor
    right: Tensor
    label: Tensor
    users: Sequence[str]

    def __post_init__(self) -> None:
        if not len(self.left) == len(self.right) == len(self.label) == len(self.users):
            raise ValueError(
                f"{len(self.left)} left and {len(self.right)} right answers, {len(self.label)} labels and "
                f"{len(self.users)} users: one of each a judgement"
            )

    def __len__(self) -> int:
        return len(self.users)

    def part(self, index: Sequence[int] | Tensor) -> Judgements:
        """Some of the judgements, on the same table."""
        rows = torch.as_tensor(index, dtype=torch.long)
        users = [self.users[row] for row in rows.tolist()]
        return Judgements(self.answers, self.prompts, self.left[rows], self.right[rows], self.label[rows], users)

    def of(self, users: Sequence[str]) -> Judgements:
        """The judgements of some users."""
        wanted = set(users)
        return self.part([row for row, user in enumerate(self.users) if user in wanted])

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of left answers, right answers and prompts, (N, H) each."""
        return self.answers[self.left], self.answers[self.right], self.prompts[self.left]


def train_pal(
    model: Pal,
    data: Judgements,
    *,
    epochs: int = 10,
    batch_size: int = 256,
    projectors: float = 3e-4,
    users: float = 5e-2,
    scale: float = 1e-1,
    seed: int = 0,
    after_epoch: Callable[[int, float], bool] | None = None,
) -> None:
    """Train a model in place by its own loss, with one rate of AdamW each for projectors, users and prototypes, scale.

    The model is calibrated on the answers first. A step moves the weights of the users in its batch alone
    (``SparseAdam``): old moments do not carry off those who are not in it.

    Args:
        data: of users that the model knows.
        epochs: passes over all judgements, in an order drawn by ``seed``.
        after_epoch: called with the epoch, from 1, and its mean loss; training stops where it returns True.

    Raises:
        ValueError: no judgements, an unknown user, or a loss that is not finite.
    """
    if not len(data):
        raise ValueError("no judgements: there is nothing to learn from")
    used = torch.unique(torch.cat([data.left, data.right]))
    model.calibrate(data.answers[used], data.prompts[used])
    table = model.logits.weight
    groups = model.parameter_groups(projectors=projectors, users=users, scale=scale)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter is not table]
    optimizers = [torch.optim.AdamW(groups), torch.optim.SparseAdam([table], lr=users)]
    index = {user: row for row, user in enumerate(model.settings["users"])}
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in torch.randperm(len(data), generator=generator).split(batch_size):  # type: ignore[no-untyped-call]
            part = data.part(rows)
            left, right, prompts = part.pairs()
            value = model.losses(model(left, right, part.users, prompts), part.label).mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            if table.grad is not None:
                present = torch.tensor(sorted({index[user] for user in part.users}))
                table.grad = torch.sparse_coo_tensor(
                    present[None], table.grad[present], table.shape, check_invariants=False
                )
            for optimizer in optimizers:
                optimizer.step()
            total += float(value.detach()) * len(part)
        if after_epoch is not None and after_epoch(epoch, total / len(data)):
            break
    model.eval()


def train_linear(data: Judgements, *, penalty: float = PENALTY, steps: int = 100) -> Callable[[Tensor], Tensor]:
    """Bradley-Terry on the same embeddings, one linear reward for all: what a model of users is compared with.

    ``mean -log sigmoid(y (r(right) - r(left))) + penalty |w|^2`` with ``r(x) = w . (x - center) / spread``, by L-BFGS
    to its optimum: the problem is convex.

    Returns:
        The reward: (N, H) to (N,).

    Raises:
        ValueError: no judgements.
    """
    if not len(data):
        raise ValueError("no judgements: there is nothing to learn from")
    used = data.answers[torch.unique(torch.cat([data.left, data.right]))].double()
    center, spread = used.mean(0), used.std(0)
    spread = spread.clamp(min=0.05 * float(spread.mean())) + (spread.mean() == 0)
    weight = torch.zeros(data.answers.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")
    scaled = (data.answers.double() - center) / spread

    def closure() -> Tensor:
        optimizer.zero_grad()
        rewards = scaled @ weight
        margin = data.label * (rewards[data.right] - rewards[data.left])
        value = F.softplus(-margin).mean() + penalty * (weight**2).sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    found = weight.detach()
    return lambda answers: ((answers.double() - center) / spread) @ found
