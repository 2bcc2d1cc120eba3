"""What the losses on thumbs ask for.

Ten people give a thumb to each answer; an answer of reward r gets about ``10 sigma(r)`` thumbs up, and one of each
kind at least.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from scipy.optimize import minimize_scalar, root
from torch import Tensor

from align.losses.binary import RewardShift, kto_kl
from align.losses.catalogue import Loss
from align.losses.types import SequenceLogps, UnpairedLogps

from .descent import minimise, starts
from .rows import Row, Stack, Target
from .worlds import World, make_world

PEOPLE = 10
TOLERANCE = 1e-6


def thumbs_up(world: World) -> Tensor:
    """Thumbs up of each answer, 1 to 9 of 10, (P, N)."""
    return (PEOPLE * torch.sigmoid(world.reward)).round().clamp(1, PEOPLE - 1)


class ThumbsData:
    """A world's thumbs as rows of a data set: every answer ten times, those with thumbs up first.

    Args:
        world: where the answers come from.
        stack: where the rows live.
    """

    def __init__(self, world: World, stack: Stack) -> None:
        up = thumbs_up(world).flatten().long()
        self.world = world
        self.answer = torch.arange(len(up)).repeat_interleave(PEOPLE).to(stack.device)
        self.label = (torch.arange(PEOPLE) < up[:, None]).flatten().to(stack.device)
        self.length = stack.here(world.length.repeat(len(world.reward)))[self.answer]
        self.reference = self.rows(stack.here(world.log_mu))

    def rows(self, logps: Tensor) -> SequenceLogps:
        """The rows' log-probs from those of all answers, (P, N)."""
        return SequenceLogps(logps.flatten()[self.answer], self.length)

    def policy(self, logits: Tensor) -> UnpairedLogps:
        """The rows under the policy with these logits."""
        return UnpairedLogps(self.rows(self.world.sequence_logps(logits)), self.label)


def bco_fixed_point(world: World, beta: float) -> Tensor:
    """The policy (P, N) and shift at which BCO's gradient vanishes, the shift being the mean of its class means.

    With u and d thumbs up and down of an answer, ``h`` its log-ratio and ``z = beta h - delta``, the conditions are
    ``beta (d sigma(z) - u sigma(-z)) + m_x mu exp(h) = 0`` for every answer, with a multiplier ``m_x`` for each
    prompt, ``sum mu exp(h) = 1``, and ``delta`` the mean of the mean ``beta h`` of thumbs up and that of thumbs down.
    At small beta (here 1/2) there are several such points, each with most of the mass on one answer; at 2 there is
    one.

    Raises:
        RuntimeError: the solver found none.
    """
    up = thumbs_up(world)
    down, mu, size = PEOPLE - up, world.mu, up.shape

    def conditions(x: Tensor) -> Tensor:
        ratio, multiplier, shift = x[: up.numel()].view(size), x[up.numel() : -1], x[-1]
        z = beta * ratio - shift
        slope = beta * (down * torch.sigmoid(z) - up * torch.sigmoid(-z)) + multiplier[:, None] * mu * ratio.exp()
        mass = (mu * ratio.exp()).sum(-1) - 1
        middle = beta * ((up * ratio).sum() / up.sum() + (down * ratio).sum() / down.sum()) / 2
        return torch.cat([slope.flatten(), mass, (middle - shift)[None]])

    start = torch.zeros(up.numel() + size[0] + 1, dtype=torch.float64)
    found = root(
        lambda x: conditions(torch.from_numpy(x)).numpy(),
        start.numpy(),
        jac=lambda x: torch.func.jacrev(conditions)(torch.from_numpy(x)).numpy(),
        tol=1e-13,
    )
    x = torch.from_numpy(found.x)
    if float(conditions(x).abs().max()) > 1e-9:
        raise RuntimeError(f"no fixed point of BCO: residual {float(conditions(x).abs().max()):.1e}")
    return world.log_mu + x[: up.numel()].view(size)


def train_bco(world: World, stack: Stack, beta: float, start: Tensor, *, rounds: int = 60) -> Tensor:
    """Where training with the running shift ends, (P, N): the shift follows the rewards, the loss the shift."""
    data, loss, logits = ThumbsData(world, stack), Loss.of("bco", beta=beta), start
    shift = RewardShift(decay=0.2)
    for _ in range(rounds):
        with torch.no_grad():
            rewards = beta * (data.policy(logits).sequence.total - data.reference.total)
        shift.update(rewards, data.label)
        delta = stack.here(shift.value)

        def objective(x: Tensor, delta: Tensor = delta) -> Tensor:
            return loss.info.function(data.policy(x), data.reference, delta, **loss.settings).loss.mean()

        before, logits = logits, minimise(objective, logits, iterations=100, rounds=1)
        if float((logits - before).abs().max()) < 1e-10:
            break
    return world.sequence_logps(logits).exp()


def check_bco(stack: Stack) -> Iterator[Row]:
    """The bound on a pair's DPO loss, its best shift, and the end of training with the running shift."""
    beta, a, b = 0.5, 1.2, -0.3
    rewards = stack.here(torch.tensor([a, b], dtype=torch.float64))
    one = torch.ones(2, dtype=torch.long, device=stack.device)
    policy = UnpairedLogps(SequenceLogps(rewards / beta - 9, one), torch.tensor([True, False], device=stack.device))
    reference = SequenceLogps(torch.full_like(rewards, -9), one)
    loss = Loss.of("bco", beta=beta)

    def bound(shift: float) -> float:
        at = torch.tensor(shift, dtype=stack.dtype, device=stack.device)
        return float(loss.info.function(policy, reference, at, **loss.settings).loss.double().sum())

    best = float(minimize_scalar(bound, bracket=(-1.0, 1.0), tol=1e-10).x)
    yield Row.number("bco", "least bound at shift (a + b)/2", (a + b) / 2, best, stack.tolerance(1e-6))
    dpo = float(torch.tensor(b - a, dtype=torch.float64).exp().log1p())
    yield Row.at_least("bco", "bound, over the pair's DPO loss", dpo, bound(best))
    world = make_world(seed=stack.seed, steps=2)
    exact = bco_fixed_point(world, 2.0).exp()
    ours = [train_bco(world, stack, 2.0, start) for start in starts(world, stack)]
    tolerance = stack.tolerance(TOLERANCE)
    yield Row.policy("bco", "fixed point with running shift", exact, ours, world.reward, tolerance)


def check_kto(stack: Stack) -> Iterator[Row]:
    """Answers with more thumbs down than up lose their probability, and no point stops that."""
    world, beta = make_world(seed=stack.seed, steps=2), 0.5
    data, loss = ThumbsData(world, stack), Loss.of("kto", beta=beta)
    reference = stack.here(world.log_mu)
    every = stack.here(world.length).expand(reference.shape)
    disliked = thumbs_up(world) < PEOPLE / 2
    masses, ratios = [], []
    for start in starts(world, stack):
        logits = start
        for _ in range(4):
            # Mismatched answers: every answer, under every prompt.
            policy = world.sequence_logps(logits)
            kl = kto_kl(
                SequenceLogps(policy.flatten(), every.flatten()), SequenceLogps(reference.flatten(), every.flatten())
            )

            def objective(x: Tensor, kl: Tensor = kl) -> Tensor:
                return loss.info.function(data.policy(x), data.reference, kl, **loss.settings).loss.mean()

            logits = minimise(objective, logits, iterations=200, rounds=1)
        end = world.sequence_logps(logits).double().cpu()
        masses.append(float((end.exp() * disliked).sum(-1).max()))
        ratios.append(float((end - world.log_mu)[disliked].max()))
    yield Row.at_most("kto", "more thumbs down: their mass", 1e-3, max(masses))
    yield Row.at_most("kto", "and their log-ratios, in nats", -6.0, max(ratios))


THUMBS: dict[str, Target] = {
    "bco": Target("solver", "fixed point of loss and shift; the best shift of a pair is (a + b)/2", check_bco),
    "kto": Target(
        "none",
        "it falls while answers with more thumbs down than up lose probability: it runs to the simplex's edge",
        check_kto,
    ),
}
