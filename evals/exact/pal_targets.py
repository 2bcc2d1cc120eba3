"""What PAL asks for: rewards of annotators who disagree, in a world of two opposed groups (arXiv:2406.08469).

Of ten annotators seven prefer the answer that has more of a first feature, three the one that has less, and of their
labels a tenth is wrong; a second feature means nothing. The data are all pairs that differ in the first, judged by
everyone, each label with its probability. With m the majority's share and e that of wrong labels:

- one reward for all is right on ``m (1 - e) + (1 - m) e`` of the labels at most;
- two prototypes are right on ``1 - e``: ``delta`` is logit(1 - e) for one group and logit e for the other;
- a new annotator's weights side with most of their n labels. After an odd n ``P (1 - e) + (1 - P) e`` are right, P the
  probability that fewer than half of the n are wrong; after none, what the majority gets right.

The models are ideal points, of which rewards at a squared distance are linear in the weights, and the fitting of new
annotators is theirs, all of ``align.rewards.pal``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product

import torch
from torch import Tensor
from torch.func import functional_call

from align.rewards.pal import PalA

from .descent import minimise
from .rows import Row, Stack, Target

NOISE, SIDES = 0.1, torch.tensor([1] * 7 + [-1] * 3)
USERS = [f"user {number}" for number in range(len(SIDES))]
MAJORITY = 0.7 * (1 - NOISE) + 0.3 * NOISE
LOG_ODDS = math.log((1 - NOISE) / NOISE)
STARTS = 3
EXACT = 1e-9  # for shares of labels: which answer is ranked first is right or wrong, whatever the rounding


@dataclass(frozen=True)
class Pairs:
    """M pairs of answers, (M, 2) each: the right one has more of the first feature."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, stack: Stack) -> Pairs:
        """Three answers against three."""
        second = torch.tensor(list(product((-1.0, 0.0, 1.0), repeat=2)), dtype=torch.float64)
        first = torch.ones_like(second[:, 0])
        left, right = torch.stack([-first, second[:, 0]], 1), torch.stack([first, second[:, 1]], 1)
        return cls(stack.here(left), stack.here(right))

    @torch.no_grad()
    def deltas(self, model: PalA, weights: Tensor) -> Tensor:
        """Of users of these weights (U, K), (U, M), in float64 on the CPU."""
        rewards = [[model.reward(answers, own) for answers in (self.left, self.right)] for own in weights]
        return torch.stack([right - left for left, right in rewards]).double().cpu()


def accuracy(deltas: Tensor, sides: Tensor) -> float:
    """Expected share of labels that are ranked right, a tie as a half: deltas (U, M) of users of these sides (U,)."""
    agreement = float((deltas.sign() * sides[:, None]).double().mean())
    return 0.5 + (0.5 - NOISE) * agreement


def best_order() -> float:
    """The largest accuracy for all users that one order of the six answers has, by trying all."""
    ranks = torch.tensor(list(permutations(range(6))))
    gaps = (ranks[:, 3:, None] - ranks[:, None, :3]).flatten(1)  # the last three have more of the first feature
    return max(accuracy(gap.expand(len(SIDES), -1), SIDES) for gap in gaps)


def train(groups: int, pairs: Pairs, stack: Stack, start: int) -> PalA:
    """The model at the end of descent on the expected loss, over users, pairs and labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stack.seed + start)
        model = PalA(2, USERS, groups=groups, dimension=2, depth=0, squared=True).to(stack.device, stack.dtype)
    count = len(pairs.left)
    left, right = (answers.repeat(len(USERS), 1) for answers in (pairs.left, pairs.right))
    users = [user for user in USERS for _ in range(count)]
    p = stack.here((0.5 + (0.5 - NOISE) * SIDES.double()).repeat_interleave(count))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def named(x: Tensor) -> dict[str, Tensor]:
        parts = torch.split(x, [shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}

    def objective(x: Tensor) -> Tensor:
        delta = functional_call(model, named(x), (left, right, users))
        sure = torch.ones_like(delta)
        return (p * model.losses(delta, sure) + (1 - p) * model.losses(delta, -sure)).mean()

    found = minimise(objective, torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    model.load_state_dict(named(found), strict=False)
    return model


def own_weight(weights: Tensor) -> float:
    """The least weight, of (U, 2), that a user has on their group's prototype; which one that is, is not given."""
    of_first = torch.where(SIDES[:, None] > 0, weights.detach().cpu(), weights.detach().cpu().flip(-1))
    return float(of_first.min(0).values.max())


def new_user(count: int) -> float:
    """Expected accuracy for a new user after an odd number of their labels, or none."""
    if not count:
        return MAJORITY
    found = sum(_chance(wrong, count) for wrong in range(count) if 2 * wrong < count)
    return found * (1 - NOISE) + (1 - found) * NOISE


def fitted_user(model: PalA, pairs: Pairs, count: int) -> float:
    """The same with weights that are fitted, from the known users' mean, to any labels that the new one may give.

    Pairs are all alike to a model at its optimum, so that it matters alone how many are labelled right.
    """
    total = 0.0
    for right in range(count + 1):
        label = torch.where(torch.arange(count, device=pairs.left.device) < right, 1, -1)
        weights = model.fit_user(pairs.left[:count], pairs.right[:count], label, prior="mean")
        deltas = pairs.deltas(model, weights[None])
        for side, share, wrong in ((1, 0.7, count - right), (-1, 0.3, right)):
            total += share * _chance(wrong, count) * accuracy(deltas, torch.tensor([side]))
    return total


def _chance(wrong: int, count: int) -> float:
    """That so many of ``count`` labels are wrong."""
    return math.comb(count, wrong) * NOISE**wrong * (1 - NOISE) ** (count - wrong)


def check_pal(stack: Stack) -> Iterator[Row]:
    """One reward for all, by trying every order and by training; two groups; and new users of the first model."""
    pairs = Pairs.of(stack)
    one, two = ([train(groups, pairs, stack, start) for start in range(STARTS)] for groups in (1, 2))

    def row(quantity: str, exact: float, ours: list[float], tolerance: float = EXACT) -> Row:
        return Row.number("pal", quantity, exact, max(ours, key=lambda found: abs(found - exact)), tolerance)

    yield row("best order for all: accuracy", MAJORITY, [best_order()])
    for models, exact in ((one, MAJORITY), (two, 1 - NOISE)):
        ours = [accuracy(pairs.deltas(model, model.weights(USERS)), SIDES) for model in models]
        yield row(f"K = {models[0].groups}: accuracy", exact, ours)
    deltas = torch.stack([pairs.deltas(model, model.weights(USERS)) for model in two])
    yield row(
        "K = 2: delta for one's group",
        LOG_ODDS,
        (deltas * SIDES[:, None]).flatten().tolist(),
        stack.tolerance(1e-5, 1e-2),
    )
    yield Row.over("pal", "K = 2: weight on own group", 0.5, min(own_weight(m.weights(USERS)) for m in two))
    for count in (0, 1, 3, 5):
        yield row(f"new user, labels: {count}: accuracy", new_user(count), [fitted_user(two[0], pairs, count)])


PAL: dict[str, Target] = {
    "pal": Target("closed form", "K = 1: at most m (1 - e) + (1 - m) e; K = 2: 1 - e, and the groups", check_pal)
}
