"""What the losses of reward and preference models ask for: scores, not policies.

The scores of a world's answers are free numbers, trained on all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from align.losses.catalogue import Loss
from align.losses.preference import MASKED, gpm_score

from .descent import every_pair, minimise
from .games import circular_labels
from .rows import Row, Stack, Target
from .worlds import make_world

TOLERANCE = 1e-6


def random_starts(shape: tuple[int, ...], stack: Stack, count: int = 3) -> list[Tensor]:
    """Normal numbers to start from."""
    draw = torch.Generator().manual_seed(stack.seed + 2)
    return [stack.here(torch.randn(shape, generator=draw, dtype=torch.float64)) for _ in range(count)]


def furthest(
    name: str, quantity: str, exact: Tensor, ours: list[Tensor], tolerance: float, *, free_shift: bool = False
) -> Row:
    """The number, of all starts, that is furthest from the exact one; scores may be shifted as a whole."""
    wanted = exact - exact.mean(-1, keepdim=True) if free_shift else exact
    found = torch.stack([x.double().cpu() for x in ours])
    found = found - found.mean(-1, keepdim=True) if free_shift else found
    gap = (found - wanted).abs().flatten()
    at = int(torch.nan_to_num(gap, nan=math.inf).argmax())
    return Row.number(
        name, quantity, float(wanted.flatten()[at % wanted.numel()]), float(found.flatten()[at]), tolerance
    )


def check_bradley_terry(stack: Stack) -> Iterator[Row]:
    """Soft labels give the world's rewards back, up to a constant."""
    world = make_world(seed=stack.seed, prompts=1)
    reward = world.reward[0]
    i, j = every_pair(len(reward))
    p, loss = stack.here(world.labels[0, i, j]), Loss.of("bradley_terry").info.function
    ours = [minimise(lambda u: loss(u[i], u[j], p).loss.mean(), start) for start in random_starts(reward.shape, stack)]
    yield furthest(
        "bradley_terry", "rewards, up to a shift", reward, ours, stack.tolerance(TOLERANCE, 1e-2), free_shift=True
    )


def check_margin(stack: Stack) -> Iterator[Row]:
    """Two answers, a share of the labels wrong: the gap is the log-odds plus the margin."""
    loss, noise = Loss.of("margin_bradley_terry").info.function, 0.2
    share = stack.here(torch.tensor([noise], dtype=torch.float64))
    for margin in (0.0, 3.0):
        m = torch.full_like(share, margin)

        def objective(u: Tensor, m: Tensor = m) -> Tensor:
            right, wrong = loss(u[:1], u[1:], m).loss, loss(u[1:], u[:1], m).loss
            return ((1 - share) * right + share * wrong).mean()

        exact = torch.tensor(noisy_gap(noise, margin), dtype=torch.float64)
        ours = [u[0] - u[1] for u in (minimise(objective, start) for start in random_starts((2,), stack))]
        quantity = f"gap at noise {noise}, margin {margin:g}"
        yield furthest("margin_bradley_terry", quantity, exact, ours, stack.tolerance(TOLERANCE, 1e-2))
    added = math.log((1 - noise) / noise) + 3.0
    quantity = "beside log-odds + 3"  # the gap if a wrong label turned the margin too
    yield Row.number("margin_bradley_terry", quantity, added, float(ours[0]), None)


def noisy_gap(noise: float, margin: float) -> float:
    """The gap g with ``(1 - e) sigma(m - g) = e sigma(m + g)``.

    A wrong label asks for the margin too: the expected loss is ``(1 - e) softplus(m - g) + e softplus(m + g)``, whose
    slope vanishes there. With ``x = exp(g)``, ``(1 - e) / (1 + x exp(-m)) = e / (1 + exp(-m) / x)``, that is
    ``e exp(-m) x^2 + (2 e - 1) x - (1 - e) exp(-m) = 0``.
    """
    a, b, c = noise * math.exp(-margin), 2 * noise - 1, -(1 - noise) * math.exp(-margin)
    return math.log((-b + math.sqrt(b * b - 4 * a * c)) / (2 * a))


def check_scaled(stack: Stack) -> Iterator[Row]:
    """Strengths that do not depend on the label leave Bradley-Terry's optimum where it is."""
    world = make_world(seed=stack.seed, prompts=1)
    reward = world.reward[0]
    i, j = every_pair(len(reward))
    p = stack.here(world.labels[0, i, j])
    strength = stack.here(1 + (torch.arange(len(i)) % 3).double())
    for normalised in (False, True):
        loss = Loss.of("scaled_bradley_terry", normalize_weights=normalised)

        def objective(u: Tensor, loss: Loss = loss) -> Tensor:
            right, wrong = (
                loss.info.function(u[a], u[b], strength, **loss.settings).loss for a, b in ((i, j), (j, i))
            )
            return (p * right + (1 - p) * wrong).mean()

        ours = [minimise(objective, start) for start in random_starts(reward.shape, stack)]
        quantity = "the same, weights normalised" if normalised else "rewards, up to a shift"
        tolerance = stack.tolerance(TOLERANCE, 1e-2)
        yield furthest("scaled_bradley_terry", quantity, reward, ours, tolerance, free_shift=True)


def check_regression(stack: Stack) -> Iterator[Row]:
    """Four ratings of three attributes, some missing: the mean of those that are there, weighed by attribute."""
    labels = torch.tensor([[4, 2, 1], [3, MASKED, 0], [MASKED, 1, 2], [0, 3, MASKED]], dtype=torch.float64)
    rated = labels != MASKED
    exact = (labels * rated).sum(0) / rated.sum(0)
    loss, given = Loss.of("regression").info.function, stack.here(labels)

    def objective(x: Tensor) -> Tensor:
        out = loss(x.expand(given.shape), given)
        return (out.loss * out.metrics["attributes"]).sum() / out.metrics["attributes"].sum()

    ours = [minimise(objective, start) for start in random_starts((3,), stack)]
    yield furthest("regression", "mean rating of each attribute", exact, ours, stack.tolerance(TOLERANCE))


def check_centering(stack: Stack) -> Iterator[Row]:
    """Alone it asks for scores of zero once there are three answers: every sum of two vanishes."""
    loss = Loss.of("centering").info.function
    i, j = every_pair(4)
    ours = [minimise(lambda u: loss(u[i], u[j]).loss.mean(), start) for start in random_starts((4,), stack)]
    yield furthest("centering", "scores", torch.zeros(4, dtype=torch.float64), ours, stack.tolerance(TOLERANCE))


def check_gpm(stack: Stack) -> Iterator[Row]:
    """Cycles, which no reward ranks, and the preferences of a random game."""
    loss = Loss.of("gpm", tau=0.1)

    def train(count: int, width: int, i: Tensor, j: Tensor, p: Tensor) -> list[Tensor]:
        def objective(v: Tensor) -> Tensor:
            return loss.info.function(v[i], v[j], None, p, **loss.settings).loss.mean()

        ours = [minimise(objective, start) for start in random_starts((count, width), stack)]
        return [gpm_score(v[i], v[j]) / loss.settings["tau"] for v in ours]

    for count in (3, 4, 5):
        i = torch.arange(count)
        j = (i + 1) % count
        logits = train(count, 2, i, j, stack.here(torch.full((count,), 0.9, dtype=torch.float64)))
        ranked = min(float((x > 0).double().mean()) for x in logits)
        yield Row.number("gpm", f"cycle of {count}: pairs ranked right", 1.0, ranked, 0.0)
        scalar = minimise(
            lambda u, i=i, j=j: F.softplus(u[j] - u[i]).mean(),  # type: ignore[misc]
            random_starts((count,), stack)[0],
        )
        best = best_order(count)
        yield Row.number("gpm", f"cycle of {count}: best scalar order", (count - 1) / count, best, 0.0)
        gap = float((scalar.max() - scalar.min()).abs())
        yield Row.number("gpm", f"cycle of {count}: Bradley-Terry gaps", 0.0, gap, stack.tolerance(1e-6))
    p = circular_labels(1, 4, seed=stack.seed)[0]
    i, j = every_pair(4)
    ours = [x.sigmoid() for x in train(4, 8, i, j, stack.here(p[i, j]))]
    yield furthest("gpm", "p in a random game of 4", p[i, j], ours, stack.tolerance(TOLERANCE))


def best_order(count: int) -> float:
    """The largest share of a cycle's pairs ``i > i + 1`` that an order of the answers has right, by trying all."""
    return (
        max(sum(order[i] > order[(i + 1) % count] for i in range(count)) for order in permutations(range(count)))
        / count
    )


def _signed(name: str, stack: Stack, right: float, width: int) -> list[Tensor]:
    """Where training on one pair ends of which ``right`` prefer the right answer."""
    loss = Loss.of(name).info.function
    label = torch.tensor([1, -1], device=stack.device)
    share = stack.here(torch.tensor([right, 1 - right], dtype=torch.float64))

    def objective(x: Tensor) -> Tensor:
        rows = x.expand(2) if width == 1 else x.expand(2, width)
        return (share * loss(rows, label).loss).sum()

    return [minimise(objective, start) for start in random_starts((width,), stack)]


def check_pal(name: str, width: int, value: Callable[[float], float]) -> Callable[[Stack], Iterator[Row]]:
    """The value that a pair should get whose right, or whose left, answer most prefer."""

    def check(stack: Stack) -> Iterator[Row]:
        for right in (0.8, 0.3):
            ours = [x[-1] - x[0] if width == 2 else x[0] for x in _signed(name, stack, right, width)]
            exact = torch.tensor(value(right), dtype=torch.float64)
            quantity = f"{'logit gap' if width == 2 else 'delta'}, {right:.0%} for the right"
            yield furthest(name, quantity, exact, ours, stack.tolerance(TOLERANCE, 1e-2))

    return check


def _log_odds(p: float) -> float:
    return math.log(p / (1 - p))


REWARDS: dict[str, Target] = {
    "bradley_terry": Target("closed form", "r, up to a constant", check_bradley_terry),
    "margin_bradley_terry": Target(
        "closed form", "two answers at noise e: the root of a quadratic, log((1 - e)/e) at m = 0", check_margin
    ),
    "scaled_bradley_terry": Target("closed form", "r, where strength does not depend on the label", check_scaled),
    "regression": Target("closed form", "the mean rating of each attribute", check_regression),
    "centering": Target("closed form", "0: scores of which any two sum to 0", check_centering),
    "gpm": Target("closed form", "s/tau = logit p for any game; a cycle of K is ranked whole", check_gpm),
    "pal_hinge": Target(
        "closed form",
        "delta = sign(p - 1/2): the label of most",
        check_pal("pal_hinge", 1, lambda p: math.copysign(1, p - 0.5)),
    ),
    "pal_logistic": Target(
        "closed form",
        "delta = logit p, so positive where the right is preferred",
        check_pal("pal_logistic", 1, _log_odds),
    ),
    "pal_cross_entropy": Target(
        "closed form", "a gap of logits of logit p", check_pal("pal_cross_entropy", 2, _log_odds)
    ),
}
